"""The neurons of sinabs: the host's at 32 bits, rounded states below, and what its tools expect."""

import copy
import pickle
import subprocess
import sys

import pytest
import reference as ref
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import qsnn_ext
from qsnn_ext import hosts, quantize_
from qsnn_ext.errors import ConfigError, LoweringError
from qsnn_ext.kernels import recognize
from qsnn_ext.quantizers import MembraneQuantizer

sinabs = pytest.importorskip(
    "sinabs", reason="sinabs is not installed: pip install 'qsnn_ext[sinabs]'", exc_type=ImportError
)
from sinabs import activation, layers  # noqa: E402

from qsnn_ext.sinabs import QuantALIF, QuantIAF, QuantLIF, Triangle, paper_neuron  # noqa: E402

ONCE = {"spike_fn": activation.SingleSpike}
HARD = {**ONCE, "reset_fn": activation.MembraneReset()}
NEURONS = {
    "LIF": lambda: layers.LIF(5.0),
    "once": lambda: layers.LIF(5.0, **ONCE),
    "hard": lambda: layers.LIF(5.0, **HARD),
    "current": lambda: layers.LIF(5.0, tau_syn=3.0, **ONCE),
    "bounded": lambda: layers.LIF(5.0, min_v_mem=-0.5, **ONCE),
    "alphas": lambda: layers.LIF(5.0, train_alphas=True, norm_input=False, **ONCE),
    "recorded": lambda: layers.LIF(5.0, record_states=True, **ONCE),
    "IAF": lambda: layers.IAF(**ONCE),
    "ALIF": lambda: layers.ALIF(5.0, 4.0),
    "leak": lambda: layers.ExpLeak(5.0),
    "recurrent": lambda: layers.LIFRecurrent(5.0, nn.Linear(6, 6), **ONCE),
}
FUSED = ("once", "hard", "alphas", "IAF")


def quantized(neuron, bits, order="fire_first"):
    kind = hosts.counterpart(neuron)
    return kind.from_float(neuron, None if bits is None else MembraneQuantizer(bits), order)


def states(neuron):
    return {s.name: getattr(neuron, s.name) for s in hosts.describe(neuron).rounded}


class Stepped(layers.LIF):
    """The same neuron in words of its own: nothing is known of it."""

    def forward(self, input_data):
        return super().forward(input_data)


@pytest.mark.parametrize("name", NEURONS)
def test_32_bits_are_the_hosts_own(name):
    made = []
    for _ in range(2):  # the host cannot copy its recurrent neurons
        torch.manual_seed(1)
        made.append(NEURONS[name]())
    theirs, ours = made[0], quantized(made[1], None)
    x = torch.randn(3, 5, 6) * 3
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours(x), theirs(x))  # both go on
    for state, value in states(ours).items():
        assert torch.equal(value, getattr(theirs, state))


@pytest.mark.parametrize("name", NEURONS)
@pytest.mark.parametrize("bits", [2, 4])
def test_states_are_on_their_grids(name, bits):
    neuron = quantized(NEURONS[name](), bits)
    assert (hosts.describe(neuron).charge is not None) == (name in FUSED)
    x = (torch.randn(3, 5, 6) * 3).requires_grad_()
    out = neuron(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    for value in states(neuron).values():
        assert len(value.unique()) <= 2**bits - 1
    if name == "recorded":
        assert torch.equal(neuron.recordings["v_mem"][:, -1], neuron.v_mem)


@pytest.mark.parametrize("options", [ONCE, HARD, {**ONCE, "norm_input": False}], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_one_operation_is_the_hosts_steps(options, bits):
    x = torch.randn(4, 7, 50) * 3
    fused, stepped = (quantized(kind(5.0, **options), bits) for kind in (layers.LIF, Stepped))
    assert hosts.describe(fused).charge is not None
    assert hosts.describe(stepped).charge is None
    results = []
    for neuron in (fused, stepped):
        leaf = x.clone().requires_grad_()
        spikes = neuron(leaf)
        (spikes.sum() + neuron.v_mem.square().sum()).backward()
        results.append((spikes, neuron.v_mem, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert 0.02 < results[0][0].mean() < 0.98
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lif_is_the_oracles(rng, bits):
    x = rng.normal(0.6, 1.0, size=(8, 3, 40))
    neuron = paper_neuron(bits).double()
    decay = neuron.neuron.alpha_mem_calculated.item()
    expected = ref.spikingjelly_node(x, lambda x, v, w: (decay * v + x, w), 1.0, 0.0, bits)
    spikes = neuron(torch.tensor(x))
    assert_array_equal(spikes.detach().numpy(), expected["s"])
    assert_allclose(neuron.neuron.v_mem.detach().numpy(), expected["v"], atol=1e-9)
    assert decay == pytest.approx(0.5, abs=1e-7)
    assert 0.02 < expected["s"].mean() < 0.98


def test_feedback_reaches_the_next_step_as_in_the_host():
    class Exact(MembraneQuantizer):
        def quantize(self, u):
            return u, u.new_ones(())

    neuron = layers.LIFRecurrent(5.0, nn.Linear(6, 6), **ONCE)
    x = torch.randn(3, 5, 6) * 3
    expected = neuron(x)
    hosts.reset(neuron)
    neuron = hosts.counterpart(neuron).from_float(neuron, Exact(4))
    assert torch.equal(neuron(x), expected)


def test_batch_and_time_may_be_folded():
    x = torch.randn(3, 5, 6) * 3
    folded = quantized(layers.LIFSqueeze(batch_size=3, tau_mem=5.0, **ONCE), 3)
    apart = quantized(layers.LIF(5.0, **ONCE), 3)
    assert torch.equal(folded(x.flatten(0, 1)).view_as(x), apart(x))


def test_a_batch_of_another_size_goes_on_and_another_shape_starts():
    neuron = quantized(layers.LIF(5.0, **ONCE), 2)
    neuron(torch.rand(3, 5, 6) * 3)
    assert neuron(torch.rand(2, 5, 6)).shape == (2, 5, 6)
    assert neuron(torch.rand(2, 5, 7)).shape == (2, 5, 7)


# ------------------------------------------------------------------ the host's tools


def test_the_hosts_tools_find_the_neurons():
    net = nn.Sequential(nn.Linear(6, 6), layers.LIF(5.0, **ONCE), layers.ALIF(5.0, 4.0))
    quantize_(net, "32w-2u")
    x = torch.rand(3, 5, 6) * 5
    first = net(x)
    assert net[1].v_mem.any()
    sinabs.zero_grad(net)
    assert net[1].v_mem.grad_fn is None
    sinabs.reset_states(net)
    assert not net[1].v_mem.any()
    assert torch.equal(net(x), first)
    net.double().eval()
    assert net[1].membrane.alpha.dtype == torch.float64
    assert not net[1].membrane.training
    assert net[2].carried["b"].alpha.dtype == torch.float64


def test_copies_of_a_neuron_in_use():
    neuron = QuantLIF(5.0, bits=3, order="quantize_first", **ONCE)
    x = (torch.rand(3, 5, 6) * 5).requires_grad_()
    neuron(x)
    again = copy.deepcopy(neuron)
    assert (again.bits, again.order) == (3, "quantize_first")
    assert torch.equal(again.v_mem, neuron.v_mem)
    assert again.membrane is not neuron.membrane
    hosts.reset(neuron)
    assert torch.equal(pickle.loads(pickle.dumps(neuron))(x), neuron(x))
    assert "bits=3" in repr(neuron)
    assert type(neuron.to_float()) is layers.LIF


def test_from_conversion_to_checkpoint(tmp_path):
    def network():
        return nn.Sequential(
            nn.Linear(6, 16), layers.LIF(5.0, **HARD), nn.Linear(16, 16), layers.LIF(5.0, **ONCE),
            nn.Linear(16, 4), layers.ExpLeak(5.0),
        )  # fmt: skip

    net, batches = network(), [torch.rand(4, 5, 6) * 3 for _ in range(3)]
    report = quantize_(net, "1w-2u", sample=batches[0])
    assert [report[n].action for n in "135"] == ["converted", "converted", "kept"]
    assert isinstance(net[1], QuantLIF)
    wsdr = qsnn_ext.WSDRRegularizer(net, strength=1.0, exclude=None)
    (net(batches[0]).sum() + wsdr()).backward()
    assert torch.isfinite(net[2].weight.grad).all()
    qsnn_ext.calibrate(net, batches)
    summary = qsnn_ext.summarize(net, batches[0])
    assert next(layer for layer in summary.layers if layer.name == "1").membrane_bits == 2
    with pytest.raises(LoweringError, match="batch in front"):
        qsnn_ext.deploy.lower(net.eval(), batches[0])
    qsnn_ext.save_checkpoint(net, tmp_path / "net.safetensors")
    again = qsnn_ext.load_checkpoint(tmp_path / "net.safetensors", network).eval()
    hosts.reset(net)
    hosts.reset(again)
    assert torch.equal(again(batches[0]), net(batches[0]))


def test_the_papers_networks_are_built_with_it():
    net = qsnn_ext.models.vggsnn(width=0.0625, T=2, host="sinabs")
    x = torch.rand(2, 2, 2, 48, 48)
    out = net(x)
    assert torch.equal(net.eval()(x).shape and out, out)
    assert any(isinstance(m, QuantLIF) for m in net.modules())


# ------------------------------------------------------------------ what cannot be


def test_what_cannot_be_quantized_says_why():
    with pytest.raises(ConfigError, match="forgets its synaptic current"):
        quantized(layers.ALIF(5.0, 4.0, tau_syn=3.0), 2)
    with pytest.raises(ConfigError, match="fire_first"):
        QuantALIF(5.0, 4.0, order="quantize_first")
    with pytest.raises(ConfigError, match="positive"):
        Triangle(0.0)
    assert QuantIAF(bits=2, order="quantize_first", **ONCE).bits == 2


@pytest.mark.parametrize("make", [
    Triangle, lambda: Triangle(0.7), activation.Gaussian, lambda: activation.Gaussian(sigma=0.3),
    activation.SingleExponential, activation.Heaviside, lambda: activation.Gaussian(mu=0.5),
])  # fmt: skip
def test_surrogates_are_the_hosts(make):
    """Known in closed form or not, the gradient is what the host's own neuron computes."""
    neuron = quantized(layers.LIF(5.0, surrogate_grad_fn=make(), **ONCE), 4)
    v = torch.linspace(-1, 3, 81).requires_grad_()
    neuron.spike_fn.apply(v, neuron.spike_threshold, neuron.surrogate_grad_fn).sum().backward()
    model = hosts.describe(neuron)
    x = (v.detach() - model.threshold).requires_grad_()
    model.fire(x).sum().backward()
    torch.testing.assert_close(x.grad, v.grad)
    known = recognize(model.fire)
    if known is not None:
        derivative = qsnn_ext.kernels.surrogates.DERIVATIVES[known.kind]
        torch.testing.assert_close(derivative(x.detach(), known.a, known.b), v.grad)
    is_known = isinstance(neuron.surrogate_grad_fn, Triangle | activation.Gaussian)
    assert (known is not None) == (is_known and getattr(neuron.surrogate_grad_fn, "mu", 0) == 0)


def test_absent_it_names_the_extra():
    code = (
        "import sys; sys.modules['sinabs'] = None\n"
        "import qsnn_ext\n"
        "try: qsnn_ext.sinabs\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'qsnn_ext[sinabs]'" in done.stdout
