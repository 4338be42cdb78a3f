"""QLeaky against the oracle and against snnTorch's Leaky, in every way Leaky is called."""

import copy
import inspect
import itertools
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import reference as ref
import snntorch as snn
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from snntorch import surrogate, utils

from qsnn_ext import functional as F
from qsnn_ext.errors import InputError, QSNNError
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.snntorch import OverTime, QLeaky, Triangle
from tests.pairwise import pairwise

BITS = [2, 3, 4, 8]
MECHANISMS = ["subtract", "zero", "none"]
ORDERS = ["fire_first", "quantize_first"]
PRESETS = ["paper", "official"]

bits_ = pytest.mark.parametrize("bits", BITS, ids=lambda k: f"{k}u")
orders = pytest.mark.parametrize("order", ORDERS)
presets = pytest.mark.parametrize("preset", PRESETS)
mechanisms = pytest.mark.parametrize("mechanism", MECHANISMS)
delays = pytest.mark.parametrize("delay", [True, False], ids=["delayed", "immediate"])


@pytest.fixture(autouse=True)
def _no_instances():
    """snnTorch keeps every neuron alive in a list; leave none behind."""
    yield
    snn.SpikingNeuron.instances.clear()


def _inputs(rng, T, shape=(3, 8), mean=0.25, std=0.9):
    return rng.normal(mean, std, size=(T, *shape))


def _model(bits, preset, order, mechanism, delay, beta=0.75, theta=0.875, **keywords):
    membrane = ref.Membrane(bits, **ref.PRESET_MEMBRANE[preset])
    return ref.SnnTorchLeaky(
        membrane, beta, theta, mechanism, delay, order, ref.triangle_derivative, **keywords
    )


def _neuron(bits, preset, order, mechanism, delay, beta=0.75, theta=0.875, **keywords):
    return QLeaky(
        beta, theta, Triangle(), learn_beta=True, learn_threshold=True, reset_mechanism=mechanism,
        reset_delay=delay, bits=bits, preset=preset, order=order, **keywords,
    ).double()  # fmt: skip


def _run(node, x, mem=None):
    """Explicit-membrane loop: stacked spikes and membranes."""
    mem = torch.zeros_like(x[0]) if mem is None else mem
    spikes, membranes = [], []
    for step in x:
        s, mem = node(step, mem)
        spikes.append(s)
        membranes.append(mem)
    return torch.stack(spikes), torch.stack(membranes)


def _check_sequence(node, model, x, g_s, g_v):
    trace = model.forward(x)
    xt = torch.tensor(x, requires_grad=True)
    s, m = _run(node, xt)
    assert_array_equal(s.detach().numpy(), trace.stack("s"))
    assert_allclose(m.detach().numpy(), trace.stack("v"), rtol=0, atol=1e-12)
    node.zero_grad()
    ((s * torch.tensor(g_s)).sum() + (m * torch.tensor(g_v)).sum()).backward()
    expected = model.backward(trace, g_s, g_v)
    assert_allclose(xt.grad.numpy(), expected["x"], rtol=1e-9, atol=1e-11)
    assert_allclose(node.beta.grad.item(), expected["beta"], rtol=1e-8, atol=1e-9)
    assert_allclose(node.threshold.grad.item(), expected["theta"], rtol=1e-8, atol=1e-9)
    return trace


# ------------------------------------------------------------------ the oracle


@bits_
@orders
@presets
@mechanisms
@delays
def test_oracle(rng, bits, order, preset, mechanism, delay):
    for T in (1, 5, 16):
        x = _inputs(rng, T)
        options = (bits, preset, order, mechanism, delay)
        g_s, g_v = rng.normal(size=x.shape), rng.normal(size=x.shape)
        trace = _check_sequence(_neuron(*options), _model(*options), x, g_s, g_v)
    assert 0.02 < trace.stack("b").mean() < 0.98


@bits_
@mechanisms
@delays
def test_oracle_with_the_default_surrogate(rng, bits, mechanism, delay):
    """snnTorch's own surrogates hand out float32 spikes, hence the tolerance."""
    x = _inputs(rng, 6)
    model = _model(bits, "paper", "fire_first", mechanism, delay)
    model = replace(model, derivative=ref.atan_derivative)
    node = QLeaky(
        0.75, 0.875, reset_mechanism=mechanism, reset_delay=delay, bits=bits, preset="paper"
    ).double()
    trace = model.forward(x)
    g = rng.integers(-4, 5, size=x.shape) / 4.0
    xt = torch.tensor(x, requires_grad=True)
    s, _ = _run(node, xt)
    (s * torch.tensor(g)).sum().backward()
    assert_array_equal(s.detach().numpy(), trace.stack("s"))
    expected = model.backward(trace, g, np.zeros_like(g))
    assert_allclose(xt.grad.numpy(), expected["x"], rtol=1e-5, atol=1e-5)


@bits_
@orders
@mechanisms
@delays
@pytest.mark.parametrize("alpha", [0.4, 0.9, 1.6])
def test_oracle_with_a_frozen_scale(rng, bits, order, mechanism, delay, alpha):
    """States beyond the scale are clipped, and pass no gradient; levels may exceed theta."""
    node = _neuron(bits, "paper", order, mechanism, delay)
    node.membrane.freeze(alpha)
    node.eval()
    # The stored scale was float32 when the neuron became float64, or is now: either will do.
    frozen = float(node.membrane.alpha)
    model = _model(bits, "paper", order, mechanism, delay)
    model = replace(model, membrane=ref.Membrane(bits, frozen_alpha=frozen))
    x = _inputs(rng, 10)
    _check_sequence(node, model, x, rng.normal(size=x.shape), rng.normal(size=x.shape))


@delays
@mechanisms
def test_a_rounded_up_silent_neuron_keeps_its_charge(mechanism, delay):
    """0.9 rounds to 1.7, over the threshold: without a spike there is nothing to reset."""
    node = QLeaky(
        0.5, bits=2, scale="absmax", reset_mechanism=mechanism, reset_delay=delay
    ).double()
    mem, first, second = np.zeros((1, 2)), [[0.9, -1.7]], [[0.4, 0.0]]
    model = ref.SnnTorchLeaky(ref.Membrane(2, "absmax"), 0.5, 1.0, mechanism, delay)
    trace = model.forward(np.array([first, second]), mem)
    s, m = _run(node, torch.tensor([first, second], dtype=torch.float64))
    assert not s[0].any()
    assert_array_equal(s.numpy(), trace.stack("s"))
    assert_allclose(m.numpy(), trace.stack("v"), atol=1e-12)


@pytest.mark.parametrize(
    ("step", "bits", "preset", "kind"),
    pairwise(
        [*itertools.product(ORDERS, MECHANISMS, [True, False])],
        BITS,
        PRESETS,
        ["zeros", "negative"],
    ),
)
def test_states_without_a_positive_value(rng, step, bits, preset, kind):
    order, mechanism, delay = step
    x = np.zeros((4, 2, 5)) if kind == "zeros" else -np.abs(rng.normal(size=(4, 2, 5)))
    options = (bits, preset, order, mechanism, delay)
    node, model = _neuron(*options), _model(*options)
    _check_sequence(node, model, x, rng.normal(size=x.shape), rng.normal(size=x.shape))
    _, m = _run(node, torch.tensor(x))
    assert torch.isfinite(m).all()
    if preset == "paper":
        assert torch.equal(m, torch.zeros_like(m))


@given(
    x=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12),
    bits=st.sampled_from(BITS),
    mechanism=st.sampled_from(["subtract", "zero"]),
    delay=st.booleans(),
    order=st.sampled_from(ORDERS),
    preset=st.sampled_from(PRESETS),
    beta=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_one_spike_is_followed_by_one_reset(x, bits, mechanism, delay, order, preset, beta):
    """With the delay, the reset that Leaky reads from the membrane is the spike just emitted."""
    node = QLeaky(
        beta, reset_mechanism=mechanism, reset_delay=delay, bits=bits, order=order, preset=preset
    )
    mem = torch.zeros(1, len(x))
    for scale in (1.0, -0.5, 1.0, 2.0, 0.3):
        s, mem = node(torch.tensor([x]) * scale, mem)
        if delay:
            assert torch.equal(node.mem_reset(mem), s)
        assert torch.isfinite(mem).all()


@given(
    x=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12),
    bits=st.sampled_from(BITS),
    mechanism=st.sampled_from(MECHANISMS),
    order=st.sampled_from(ORDERS),
    beta=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_each_float32_step_equals_the_oracle_but_for_ties(x, bits, mechanism, order, beta):
    """In float32 each step starts from the package's own membrane; only near-ties may differ."""
    node = QLeaky(beta, reset_mechanism=mechanism, bits=bits, order=order)
    model = ref.SnnTorchLeaky(
        ref.Membrane(bits), beta, reset_mechanism=mechanism, order=order, dtype=np.float32
    )
    mem = torch.zeros(1, len(x))
    for scale in (1.0, -0.7, 1.3, 0.4):
        xt = torch.tensor([x], dtype=torch.float32) * scale
        step = model.step(xt.double().numpy(), mem.double().numpy())
        s, mem = node(xt, mem)
        assert s.dtype == mem.dtype == torch.float32
        clear = np.abs(step["u"] - 1.0) > 1e-5
        assert_array_equal(s.numpy()[clear], step["s"][clear])
        ratio = model.membrane.ratio(step["pre"])
        near_theta = np.abs(step["v"] - 1.0) < 1e-4  # which side is settled by the last digit
        untied = (np.abs(ratio - np.floor(ratio) - 0.5) > 1e-4) & ~near_theta
        if clear.all():  # a spike that differs moves alpha for everyone
            assert_allclose(mem.numpy()[untied], step["v"][untied], rtol=1e-5, atol=1e-6)


def test_a_refused_neuron_leaves_nothing_behind():
    """snnTorch lists every neuron that is made: one that fails must not stay there."""
    before = len(snn.SpikingNeuron.instances)
    for options in ({"bits": 1}, {"order": "x"}, {"bits": 2, "state_quant": torch.round}):
        with pytest.raises(QSNNError):
            QLeaky(0.5, **options)
    assert len(snn.SpikingNeuron.instances) == before


def test_the_spike_whose_membrane_rounds_down_is_reset():
    """A charge of 1.05 beside one of 1.8: at two bits plain rounding would forget the reset."""
    for mechanism in ("subtract", "zero"):
        node = QLeaky(1.0, bits=2, reset_mechanism=mechanism)
        s, mem = node(torch.tensor([[1.05, 1.8, 0.2]]), torch.zeros(1, 3))
        assert s.tolist() == [[1.0, 1.0, 0.0]]
        _, after = node(torch.zeros(1, 3), mem)
        assert after[0, 0].abs() <= 1e-6


def test_a_silent_neuron_rounded_over_the_threshold_is_not_reset():
    """0.95 rounds up to alpha = 1.2 here, beside a spike at 2.2: it must stay under 1."""
    node = QLeaky(1.0, bits=2)
    s, mem = node(torch.tensor([[2.2, 0.95, 0.1]]), torch.zeros(1, 3))
    assert s.tolist() == [[1.0, 0.0, 0.0]]
    assert mem[0, 1] <= 1.0
    assert node.mem_reset(mem).tolist() == [[1.0, 0.0, 0.0]]


@pytest.mark.parametrize("spike_grad", [None, Triangle(), surrogate.fast_sigmoid()])
def test_a_charge_at_the_threshold_does_not_fire(spike_grad):
    """Leaky's rule is strict."""
    node = QLeaky(0.5, spike_grad=spike_grad, bits=2)
    s, _ = node(torch.tensor([[1.0, 1.001, 0.999]]), torch.zeros(1, 3))
    assert s.tolist() == [[0.0, 1.0, 0.0]]


@bits_
@presets
def test_carried_state_is_on_its_grid(rng, bits, preset):
    """Without the delay the membrane handed over is the rounded one."""
    model = ref.Membrane(bits, **ref.PRESET_MEMBRANE[preset])
    node = _neuron(bits, preset, "fire_first", "zero", False)
    twin = _model(bits, preset, "fire_first", "zero", False)
    mem = torch.zeros(3, 40, dtype=torch.float64)
    for x in _inputs(rng, 6, (3, 40)):
        unit = model.unit(twin.step(x, mem.numpy())["pre"])
        with torch.no_grad():
            _, mem = node(torch.tensor(x), mem)
        codes = mem.numpy() / unit
        assert_allclose(codes, np.round(codes), atol=1e-9)
        assert len(mem.unique()) <= 2**bits - 1
    assert len(mem.unique()) > 1


@bits_
def test_membrane_less_the_spike_is_on_its_grid(rng, bits):
    """With the delay it is on the grid once theta is taken off the neurons that fired."""
    node = _neuron(bits, "paper", "fire_first", "subtract", True)
    twin = _model(bits, "paper", "fire_first", "subtract", True)
    mem = torch.zeros(3, 40, dtype=torch.float64)
    for x in _inputs(rng, 6, (3, 40)):
        unit = twin.membrane.unit(twin.step(x, mem.numpy())["pre"])
        with torch.no_grad():
            s, mem = node(torch.tensor(x), mem)
        codes = ((mem - s * 0.875) / unit).numpy()
        assert_allclose(codes, np.round(codes), atol=1e-9)


def test_orders_presets_and_widths_differ(rng):
    x = torch.tensor(_inputs(rng, 8, (4, 50)))
    outputs = [
        _run(QLeaky(0.75, bits=bits, order=order, preset=preset).double(), x)[0]
        for bits, order, preset in [
            (2, "fire_first", "paper"), (2, "quantize_first", "paper"),
            (3, "fire_first", "paper"), (None, "fire_first", "paper"),
        ]
    ]  # fmt: skip
    for i, one in enumerate(outputs):
        assert not any(torch.equal(one, other) for other in outputs[i + 1 :])


@orders
def test_zero_reset_without_delay_equals_spikingjellys_hard_reset(rng, order):
    """Two hosts, one neuron."""
    from qsnn_ext.spikingjelly import QuantLIFNode

    x = torch.tensor(_inputs(rng, 8, (4, 20)))
    leaky = QLeaky(0.5, reset_mechanism="zero", reset_delay=False, bits=3, order=order).double()
    node = QuantLIFNode(2.0, False, step_mode="m", store_v_seq=True, bits=3, order=order)
    spikes, membranes = _run(leaky, x)
    assert torch.equal(node(x), spikes)
    assert_allclose(node.v_seq.numpy(), membranes.detach().numpy(), atol=1e-12)


# ------------------------------------------------------------------ 32 bits


def _check_equal_to_leaky(bits, options, x, g):
    results = []
    for kind in (snn.Leaky, QLeaky):
        extra = {} if kind is snn.Leaky else {"bits": bits}
        node = kind(**copy.deepcopy(options), **extra)
        xt = x.clone().requires_grad_()
        s, m = _run(node, xt)
        ((s * g).sum() + (m * g[0]).sum()).backward()
        parameters = {name: p.grad for name, p in node.named_parameters()}
        results.append({"s": s, "m": m, "x": xt.grad, **parameters})
    plain, ours = results
    assert plain.keys() == ours.keys()
    for name in plain:
        assert torch.equal(plain[name], ours[name]), name


@pytest.mark.parametrize("bits", [None, 32])
@mechanisms
@delays
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threshold": 0.6, "spike_grad": surrogate.fast_sigmoid()},
        {"learn_beta": True, "learn_threshold": True},
        {"beta": torch.tensor([0.2, 0.5, 0.9, 1.0, 0.0]), "learn_beta": True},
        {"threshold": torch.tensor([0.5, 1.0, 1.5, 0.7, 0.3]), "learn_threshold": True},
        {"graded_spikes_factor": 0.5, "learn_graded_spikes_factor": True},
        {"inhibition": True},
        {"surrogate_disable": True, "learn_beta": True},
        {"state_quant": lambda m: torch.round(m * 4) / 4},
    ],
    ids=[
        "plain", "surrogate", "learn", "betas", "thresholds", "graded", "inhibition", "bypass",
        "state_quant",
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_32_bit_equals_leaky(bits, mechanism, delay, options):
    x = torch.randn(6, 3, 5) + 0.3
    options = {"beta": 0.8, **options, "reset_mechanism": mechanism, "reset_delay": delay}
    _check_equal_to_leaky(bits, options, x, torch.randn_like(x))


@pytest.mark.parametrize("bits", [2, None], ids=["2u", "32u"])
@pytest.mark.filterwarnings("ignore:Inhibition")
def test_constructor_takes_what_leaky_takes(bits):
    """Every argument by position and by name, with Leaky's defaults."""
    changed = {
        "beta": 0.3, "threshold": 0.7, "spike_grad": surrogate.sigmoid(),
        "surrogate_disable": True, "init_hidden": True, "inhibition": True, "learn_beta": True,
        "learn_threshold": True, "reset_mechanism": "zero", "state_quant": False, "output": True,
        "graded_spikes_factor": 0.5, "learn_graded_spikes_factor": True, "reset_delay": False,
    }  # fmt: skip
    assert list(changed) == list(inspect.signature(snn.Leaky).parameters)
    for arguments, keywords in (((0.5,), {}), (tuple(changed.values()), {}), ((), changed)):
        theirs, ours = snn.Leaky(*arguments, **keywords), QLeaky(*arguments, **keywords, bits=bits)
        assert isinstance(ours, snn.Leaky)
        for name in changed:
            if name in ("spike_grad", "surrogate_disable"):
                continue
            learned = name.removeprefix("learn_")
            if name.startswith("learn_"):
                assert isinstance(getattr(ours, learned), torch.nn.Parameter) == isinstance(
                    getattr(theirs, learned), torch.nn.Parameter
                )
            else:
                assert getattr(ours, name) == getattr(theirs, name), name
        plain, quantized = theirs.state_dict(), ours.state_dict()
        assert plain.keys() == quantized.keys()
        assert all(torch.equal(plain[k], quantized[k]) for k in plain)
    assert QLeaky(0.5).bits == 2


# ------------------------------------------------------------------ calling styles


def _sequential(kind, output, **extra):
    torch.manual_seed(3)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 6), kind(beta=0.7, init_hidden=True, **extra),
        torch.nn.Linear(6, 3), kind(beta=0.7, init_hidden=True, output=output, **extra),
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, None], ids=["2u", "32u"])
@pytest.mark.parametrize("init_hidden", [True, False], ids=["hidden", "explicit"])
@pytest.mark.parametrize("output", [True, False], ids=["output", "inner"])
@pytest.mark.parametrize("delay", [True, False], ids=["delayed", "immediate"])
def test_return_arity(bits, init_hidden, output, delay):
    """A bare spike only when the state is hidden and not asked for, as in Leaky."""
    keywords = {"beta": 0.5, "init_hidden": init_hidden, "output": output, "reset_delay": delay}
    x = torch.randn(2, 3)
    theirs, ours = snn.Leaky(**keywords)(x), QLeaky(**keywords, bits=bits)(x)
    assert type(theirs) is type(ours)
    if isinstance(theirs, tuple):
        assert [t.shape for t in theirs] == [t.shape for t in ours]
        assert torch.equal(theirs[0], ours[0])  # the first step starts from the same state
    else:
        assert torch.equal(theirs, ours)


def _styles(bits):
    """One neuron's output by each way of calling it; all are to be the same."""
    x = torch.randn(5, 3, 4)

    def explicit():
        return _run(QLeaky(0.7, bits=bits), x)

    def from_reset_mem():
        node = QLeaky(0.7, bits=bits)
        mem = node.reset_mem()
        spikes, membranes = [], []
        for step in x:
            s, mem = node(step, mem)
            spikes.append(s)
            membranes.append(mem)
        return torch.stack(spikes), torch.stack(membranes)

    def remembered():
        node = QLeaky(0.7, bits=bits)
        node.reset_mem()
        outs = [node(step) for step in x]
        return torch.stack([s for s, _ in outs]), torch.stack([m for _, m in outs])

    def hidden_output():
        node = QLeaky(0.7, init_hidden=True, output=True, bits=bits)
        outs = [node(step) for step in x]
        return torch.stack([s for s, _ in outs]), torch.stack([m for _, m in outs])

    def hidden():
        node = QLeaky(0.7, init_hidden=True, bits=bits)
        outs = [(node(step), node.mem) for step in x]
        return torch.stack([s for s, _ in outs]), torch.stack([m for _, m in outs])

    return [explicit, from_reset_mem, remembered, hidden_output, hidden]


@pytest.mark.parametrize("bits", [2, 4, None], ids=["2u", "4u", "32u"])
def test_every_calling_style_computes_the_same(bits):
    first, *others = _styles(bits)
    spikes, membranes = first()
    assert spikes.any()
    for style in others:
        s, m = style()
        assert torch.equal(s, spikes), style.__name__
        assert torch.equal(m, membranes), style.__name__


def test_one_neuron_with_two_membranes():
    """Used for two layers in one step, the states given must not mix."""
    x, y = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    apart = [_run(QLeaky(0.7, bits=2), z) for z in (x, y)]
    node, one, two = QLeaky(0.7, bits=2), torch.zeros(2, 5), torch.zeros(2, 5)
    for t in range(4):
        s, one = node(x[t], one)
        assert torch.equal(s, apart[0][0][t])
        s, two = node(y[t], two)
        assert torch.equal(s, apart[1][0][t])


def test_membrane_is_refused_with_a_hidden_state():
    node = QLeaky(0.5, init_hidden=True, bits=2)
    node(torch.ones(1, 2))
    kept = node.mem
    with pytest.raises(TypeError, match="init_hidden"):
        node(torch.zeros(1, 2), torch.zeros(1, 2))
    assert node.mem is kept


def test_a_sequence_of_no_time_steps_is_refused():
    with pytest.raises(InputError, match="T = 0"):
        OverTime(QLeaky(0.5))(torch.zeros(0, 1, 2))


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_sequential_and_utils_reset(nested):
    """snnTorch's `utils.reset` sees direct children only; deeper ones need the class's own."""
    net = _sequential(QLeaky, True, bits=2)
    if nested:
        net = torch.nn.Sequential(net[:2], torch.nn.Sequential(*net[2:]))
    x = torch.randn(5, 3, 4)

    def outputs():
        if nested:
            QLeaky.reset_hidden()
        else:
            utils.reset(net)
        return [torch.stack(t) for t in zip(*[net(step) for step in x], strict=True)]

    one, two = outputs(), outputs()
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    one[0].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_class_methods_reach_the_neuron():
    node = QLeaky(0.5, init_hidden=True, bits=2)
    node(torch.ones(2, 3, requires_grad=True))
    assert node.mem.requires_grad
    QLeaky.detach_hidden()
    assert not node.mem.requires_grad
    QLeaky.reset_hidden()
    assert not node.mem.any()


def test_state_restarts_when_the_shape_changes():
    node = QLeaky(0.9, init_hidden=True, bits=2)
    node(torch.full((4, 3), 0.7))
    fresh = QLeaky(0.9, init_hidden=True, bits=2)
    assert torch.equal(node(torch.full((2, 3), 0.7)), fresh(torch.full((2, 3), 0.7)))


@bits_
@pytest.mark.parametrize("delay", [True, False], ids=["delayed", "immediate"])
def test_graded_spikes_reset_once(rng, bits, delay):
    """The factor scales what is sent on, not what is reset."""
    x = _inputs(rng, 6)
    options = (bits, "paper", "fire_first", "subtract", delay)
    node = _neuron(*options, graded_spikes_factor=0.5)
    model = _model(*options, graded=0.5)
    _check_sequence(node, model, x, rng.normal(size=x.shape), rng.normal(size=x.shape))


@pytest.mark.filterwarnings("ignore:Inhibition")
def test_inhibition_lets_one_neuron_fire(rng):
    node = QLeaky(0.9, inhibition=True, bits=4)
    s, _ = _run(node, torch.tensor(_inputs(rng, 6, (3, 8), 0.8), dtype=torch.float32))
    assert s.sum(-1).max() == 1.0
    assert s.any()


def test_learnable_tensors_get_gradients(rng):
    node = QLeaky(
        torch.full((8,), 0.7), torch.full((8,), 0.9), learn_beta=True, learn_threshold=True, bits=2
    )
    x = torch.tensor(_inputs(rng, 6), dtype=torch.float32)
    s, m = _run(node, x)
    (s.sum() + m.sum()).backward()
    for p in (node.beta, node.threshold):
        assert p.grad.shape == (8,)
        assert torch.isfinite(p.grad).all()
        assert p.grad.abs().sum() > 0


# ------------------------------------------------------------------ scale, checkpoints, copies


def test_given_membrane_is_used():
    membrane = MembraneQuantizer(4, scale="absmax")
    node = QLeaky(0.5, membrane=membrane)
    assert node.membrane is membrane
    assert node.bits == 4
    assert QLeaky(0.5, bits=None).membrane is None


def test_frozen_scale_makes_samples_independent(rng):
    x = torch.tensor(_inputs(rng, 6, (4, 10)), dtype=torch.float32)
    node = QLeaky(0.7, bits=2, mode="frozen")
    for _ in range(4):
        _run(node, x)
    node.eval()
    together, _ = _run(node, x)
    alone, _ = _run(node, x[:, :1])
    assert torch.equal(alone, together[:, :1])


@pytest.mark.parametrize(
    "options", [{}, {"mode": "frozen"}, {"bits": None}, {"preset": "official"}], ids=str
)
def test_checkpoints_load_strictly_both_ways(options):
    plain = _sequential(snn.Leaky, True, learn_beta=True, learn_threshold=True)
    quantized = _sequential(QLeaky, True, learn_beta=True, learn_threshold=True, **options)
    quantized.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(quantized.state_dict(), strict=True)


def test_state_dict_round_trips_strictly(rng):
    x = torch.tensor(_inputs(rng, 4), dtype=torch.float32)
    trained = QLeaky(0.6, 0.8, learn_beta=True, bits=3, mode="frozen")
    _run(trained, x)
    trained.eval()
    restored = QLeaky(0.1, 0.2, learn_beta=True, bits=3, mode="frozen").eval()
    restored.load_state_dict(trained.state_dict(), strict=True)
    for one, two in zip(_run(restored, x), _run(trained, x), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_behave_alike(rng, copier):
    x = torch.tensor(_inputs(rng, 4), dtype=torch.float32)
    node = QLeaky(0.6, bits=2, spike_grad=F.triangle)
    assert torch.equal(_run(copier(node), x)[0], _run(node, x)[0])


# ------------------------------------------------------------------ dtypes, compile, errors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@delays
def test_dtypes_are_those_of_leaky(dtype, delay):
    """snnTorch's own surrogates hand out float32 spikes, and promote a narrow membrane by them."""
    node = QLeaky(0.5, bits=4, reset_delay=delay).to(dtype)
    x = torch.randn(3, 2, 5).to(dtype).requires_grad_()
    s, m = _run(node, x)
    theirs = _run(snn.Leaky(0.5, reset_delay=delay).to(dtype), x)
    assert (s.dtype, m.dtype) == (theirs[0].dtype, theirs[1].dtype)
    node = QLeaky(0.5, spike_grad=Triangle(), bits=4, reset_delay=delay).to(dtype)
    assert {t.dtype for t in _run(node, x)} == {dtype}
    (s.sum() + m.sum()).backward()
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


@delays
def test_bfloat16_autocast(delay):
    net = torch.nn.Sequential(
        torch.nn.Linear(4, 6), QLeaky(0.7, init_hidden=True, bits=2, reset_delay=delay)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.stack([net(x) for x in torch.randn(4, 3, 4)])
    y.float().sum().backward()
    assert net[0].weight.grad.abs().sum() > 0
    assert torch.isfinite(net[0].weight.grad).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_input_must_be_floating(dtype):
    with pytest.raises(QSNNError, match="float"):
        QLeaky(0.5, bits=2)(torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize("bits", [1, 0, 9, 31, "two", 2.5], ids=repr)
def test_unknown_bits_are_refused(bits):
    with pytest.raises(QSNNError, match="bits"):
        QLeaky(0.5, bits=bits)


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "poster"}, {"order": "reset_first"}, {"scale": "median"}, {"squash": "relu"},
        {"mode": "thawed"},
    ],
    ids=lambda o: next(iter(o)),
)  # fmt: skip
def test_unknown_options_are_refused(options):
    with pytest.raises(QSNNError, match=next(iter(options.values()))):
        QLeaky(0.5, **options)


@pytest.mark.parametrize(
    ("order", "delay"),
    [("fire_first", True), ("quantize_first", False)],
    ids=["delayed", "immediate"],
)
def test_neuron_compiles_without_a_graph_break(order, delay):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Linear(6, 8)
            self.spike = QLeaky(0.5, reset_delay=delay, bits=2, order=order)

        def forward(self, x):
            mem = torch.zeros(x.shape[1], 8)
            spikes = []
            for step in x:
                s, mem = self.spike(self.weight(step), mem)
                spikes.append(s)
            return torch.stack(spikes)

    net, x = Small(), torch.randn(2, 4, 6)  # steps are unrolled
    eager = net(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)
