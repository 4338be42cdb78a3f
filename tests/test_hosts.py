"""What both hosts' quantized neurons owe to the rest of PyTorch and to the hosts' tools."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, op_counter
from torch import nn

import qsnn_ext
from qsnn_ext import hosts, kernels, quantize_
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.snntorch import Triangle as Strict
from qsnn_ext.spikingjelly import QuantIFNode, QuantLIFNode, QuantParametricLIFNode, Triangle

BACKENDS = pytest.mark.parametrize("backend", ["function", "eager"])


def _leaky_net(**options):
    return nn.Sequential(
        nn.Linear(8, 16),
        QLeaky(0.9, init_hidden=True, bits=2, spike_grad=Strict(), **options),
        nn.Linear(16, 4),
        QLeaky(0.9, init_hidden=True, bits=4, spike_grad=Strict(), **options),
    )


def _spikingjelly_net(mode="m"):
    net = nn.Sequential(
        layer.Linear(8, 16), QuantLIFNode(surrogate_function=Triangle()),
        layer.Linear(16, 16), QuantParametricLIFNode(v_reset=None),
        layer.Linear(16, 4), QuantIFNode(order="quantize_first"),
    )  # fmt: skip
    functional.set_step_mode(net, mode)
    return net


# ------------------------------------------------------------------ inference mode


@BACKENDS
@pytest.mark.parametrize("mode", ["s", "m"])
def test_spikingjelly_runs_in_inference_mode(backend, mode):
    net = _spikingjelly_net(mode)
    x = torch.rand(3, 2, 8) * 4
    with kernels.use_backend(backend):
        with torch.no_grad():
            expected = net(x)
        functional.reset_net(net)
        with torch.inference_mode():
            assert torch.equal(net(x), expected)
            net(x)  # goes on from the states it has kept
        functional.reset_net(net)
        # Nothing of it is left behind for training.
        net(x).sum().backward()
        assert torch.isfinite(net[0].weight.grad).all()


@BACKENDS
@pytest.mark.parametrize("options", [
    {}, {"reset_mechanism": "zero"}, {"reset_delay": False}, {"learn_beta": True},
    {"reset_mechanism": "none"}, {"graded_spikes_factor": 0.5},
], ids=str)  # fmt: skip
def test_snntorch_runs_in_inference_mode(backend, options):
    net = _leaky_net(**options)
    x = torch.rand(4, 2, 8) * 4

    def run():
        for module in net:
            if isinstance(module, QLeaky):
                module.mem = torch.zeros(0)
        return torch.stack([net(step) for step in x])

    with kernels.use_backend(backend):
        with torch.inference_mode():  # first: what it keeps must serve training afterwards
            got = run()
        with torch.no_grad():
            assert torch.equal(got, run())
        run().sum().backward()
        assert torch.isfinite(net[0].weight.grad).all()


def test_a_model_made_in_inference_mode_runs_there():
    with torch.inference_mode():
        leaky, lif = QLeaky(0.9, bits=2), QuantLIFNode(bits=2)
        x = torch.rand(2, 3) * 3
        assert leaky(x, torch.zeros(2, 3))[0].shape == lif(x).shape


def test_spikes_are_counted_in_inference_mode():
    node = QuantLIFNode(step_mode="m", decay_input=False)
    with torch.inference_mode():
        spikes = node(torch.rand(3, 4, 5) * 3)
        assert kernels.spike_count(spikes) == spikes.sum()


# ------------------------------------------------------------------ tracing and transforms


@pytest.mark.parametrize("name", ["leaky", "spikingjelly"])
def test_neurons_are_traced(name):
    """torch.jit.trace: the traced program computes what the module does, for other input too."""
    x, other = torch.rand(2, 3, 5) * 3
    if name == "leaky":
        node = QLeaky(0.9, bits=3, spike_grad=Strict())
        args = (x, torch.zeros(3, 5))
        traced = torch.jit.trace(node, args, check_trace=False)
        for got, expected in zip(
            traced(other, torch.zeros(3, 5)), node(other, torch.zeros(3, 5)), strict=True
        ):
            assert torch.equal(got, expected)
        return
    node = QuantLIFNode(step_mode="m", bits=3).eval()
    traced = torch.jit.trace(node, x[None], check_trace=False)
    node.reset()
    assert torch.equal(traced(other[None]), node(other[None]))


@pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
@pytest.mark.parametrize("bits", [2, 4])
def test_functional_transforms_see_through_the_neurons(bits, order):
    """torch.func: gradients as autograd's, and vmap as one example after the other."""
    x = torch.randn(3, 2, 6) * 2

    def spikes_of_spikingjelly(x):
        node = QuantLIFNode(
            step_mode="m", bits=bits, order=order, surrogate_function=Triangle(), v_reset=None
        )
        return node(x).sum() + node.v.square().sum()

    def spikes_of_snntorch(x):
        node, mem = QLeaky(0.8, bits=bits, order=order, spike_grad=Strict()), torch.zeros_like(x[0])
        total = 0.0
        for step in x:
            s, mem = node(step, mem)
            total = total + s.sum() + mem.square().sum()
        return total

    for function in (spikes_of_spikingjelly, spikes_of_snntorch):
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(function(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(function)(x), expected)
        batch = torch.stack([x, x * 0.5, -x])
        one_by_one = torch.stack([torch.func.grad(function)(b) for b in batch])
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(function))(batch), one_by_one)


# ------------------------------------------------------------------ the host's counters


def _counted(quantize, counter, strict, grad):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(8, 16), neuron.LIFNode(), layer.Linear(16, 16), neuron.IFNode(),
        layer.Linear(16, 4), neuron.LIFNode(v_reset=None),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    if quantize:
        quantize_(net, "32w-2u")
    x = (torch.rand(3, 2, 8) > 0.5).float()
    count = getattr(op_counter, counter)()
    with op_counter.DispatchCounterMode([count], strict=strict), torch.set_grad_enabled(grad):
        spikes = net(x)
        if grad:
            spikes.sum().backward()
    return count.get_total()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("counter", ["FlopCounter", "MemoryAccessCounter", "NeuronStateCounter"])
def test_strict_counters_know_every_operation(counter, grad):
    """These accept the host's own neurons, so they must accept the quantized ones."""
    assert _counted(False, counter, strict=True, grad=grad) > 0
    assert _counted(True, counter, strict=True, grad=grad) > 0


def test_rounding_is_no_operation_of_the_hosts_energy_model():
    net = _spikingjelly_net()
    plain = nn.Sequential(
        layer.Linear(8, 16), neuron.LIFNode(), layer.Linear(16, 16),
        neuron.ParametricLIFNode(v_reset=None), layer.Linear(16, 4), neuron.IFNode(),
    )  # fmt: skip
    functional.set_step_mode(plain, "m")
    x = (torch.rand(3, 2, 8) > 0.5).float()
    ours = op_counter.estimate_neuromc_runtime_energy(net, x)
    theirs = op_counter.estimate_neuromc_runtime_energy(plain, x)
    assert ours.energy_total_pj > 0
    assert ours.energy_compute_pj == pytest.approx(theirs.energy_compute_pj, rel=0.5)


def test_other_dispatch_modes_still_see_the_rounding():
    """Only a counter of the host has the rounding kept from it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        QuantLIFNode(bits=2)(torch.rand(2, 3))
    assert torch.ops.aten.round.default in seen


# ------------------------------------------------------------------ 32 bits take what LIFNode takes


@pytest.mark.parametrize("x", [
    torch.tensor(1.5), torch.tensor([0.2, 1.7]), torch.tensor([0, 3]), torch.tensor(4),
    torch.tensor([True, False]),
], ids=lambda x: f"{x.dtype}-{x.dim()}d")  # fmt: skip
@pytest.mark.parametrize("mode", ["s", "m"])
def test_a_float_node_takes_what_the_hosts_node_takes(x, mode):
    def outcome(node):
        try:
            return node(x), node.v
        except Exception as error:
            return type(error)

    for ours, theirs in ((QuantLIFNode, neuron.LIFNode), (QuantIFNode, neuron.IFNode)):
        got, expected = outcome(ours(bits=None, step_mode=mode)), outcome(theirs(step_mode=mode))
        if isinstance(expected, type):
            assert got is expected
            continue
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# ------------------------------------------------------------------ snnTorch's reset in the step


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("beta", [0.3, 0.5, 0.9, 1.0])
def test_what_never_fired_is_never_reset(bits, beta):
    """Subtraction in the step: rounding over the threshold is no spike."""
    torch.manual_seed(1)
    node = QLeaky(beta, reset_mechanism="subtract", reset_delay=False, bits=bits)
    mem, fired, rounded_over = torch.zeros(2000), torch.zeros(2000, dtype=torch.bool), 0
    for _ in range(8):
        x = torch.randn(2000) * 0.7 + 0.3
        charge = beta * mem + x
        spikes, mem = node(x, mem)
        assert torch.equal(spikes[~fired].bool(), charge[~fired] > 1)
        fired |= spikes.bool()
        rounded_over += int((~fired & (mem > 1)).sum())
    assert rounded_over or bits == 8


def test_the_neuron_rounded_over_its_threshold_keeps_its_charge():
    """Two bits, currents .9 and 2.3: .9 is rounded to 1.3 and must fire on .9 more."""
    node = QLeaky(0.5, reset_mechanism="subtract", reset_delay=False, bits=2)
    spikes, mem = node(torch.tensor([0.9, 2.3]), torch.zeros(2))
    assert spikes.tolist() == [0.0, 1.0]
    assert mem.tolist() == pytest.approx([1.3, 1.3])
    spikes, mem = node(torch.tensor([0.9, 0.0]), mem)
    assert spikes.tolist() == [1.0, 0.0]


# ------------------------------------------------------------------ the published threshold


def test_the_official_preset_is_strict_on_spikingjelly():
    x = torch.tensor([1.0, 1.001])
    for preset, expected in (("paper", [1.0, 1.0]), ("official", [0.0, 1.0])):
        own = Triangle()
        node = QuantLIFNode(decay_input=False, preset=preset, surrogate_function=own)
        assert node(x).tolist() == expected
        assert own.strict is None  # what the user handed in is not changed
        model = qsnn_ext.models.vggsnn(width=0.0625, T=1, preset=preset)
        fire = next(m for m in model.modules() if isinstance(m, neuron.LIFNode)).surrogate_function
        assert bool(fire.strict) == (preset == "official")
    lenient = QuantLIFNode(
        decay_input=False, preset="official", surrogate_function=Triangle(strict=False)
    )
    assert lenient(x).tolist() == [1.0, 1.0]


# ------------------------------------------------------------------ who knows a host

#: Files whose business hosts are, beside the host's own.
_ABOUT_HOSTS = {"__init__.py", "hosts.py", "models.py"}
#: Where a host is named for another reason.
_NAMED = {
    ("conversion/plan.py", "no neuron of SpikingJelly or snnTorch was found"): (
        "the text of an error, put together before it is raised"
    ),
}
_LIBRARIES = (
    *(f"spikingjelly.activation_based.{name}"
      for name in ("base", "encoding", "layer", "neuron", "rnn", "surrogate")),
    "snntorch", "sinabs.layers", "sinabs.activation",
    "qsnn_ext.spikingjelly", "qsnn_ext.snntorch", "qsnn_ext.sinabs",
)  # fmt: skip


def _class_names():
    """Of all hosts that are installed, and of their files here; not those that torch has too."""
    found = set()
    for name in _LIBRARIES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        root = name if name.startswith("qsnn_ext") else name.partition(".")[0]
        found |= {
            word
            for word, value in vars(module).items()
            if inspect.isclass(value) and value.__module__.startswith(root)
        }
    ours = set(vars(qsnn_ext.layers))
    return {word for word in found if word[0].isupper() and not hasattr(nn, word)} - ours


def _code(node):
    """Strings and imported modules of a program, without docstrings and the texts of errors."""
    if isinstance(node, ast.Raise):
        return
    if isinstance(node, ast.Call):
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name.endswith("Error") or name in ("fail", "_fail", "error_at", "warn"):
            return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield getattr(node, "module", None) or ""
        yield from (a.name for a in node.names if a.name.islower())
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from _code(child)


def test_the_core_knows_no_host_by_name():
    """What is particular to a host stands in its adapter; the rest reads descriptions."""
    root, classes, found = Path(qsnn_ext.__file__).parent, _class_names(), set()
    assert {"LIFNode", "RLeaky", "LinearRecurrentContainer", "OverTime"} <= classes
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        if place in _ABOUT_HOSTS or path.stem in hosts.HOSTS:
            continue
        for text in _code(ast.parse(path.read_text(encoding="utf-8"))):
            words = re.findall(r"\w+", text)
            if any(word in classes or word.lower() in hosts.HOSTS for word in words):
                found.add((place, text))
    assert found == _NAMED.keys()
