"""The quantized SpikingJelly neurons against the oracle and against their float parents."""

import copy
import itertools
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from spikingjelly.activation_based import functional, layer, neuron, surrogate

from qsnn_ext import functional as F
from qsnn_ext.checkpoint import load_checkpoint, save_checkpoint
from qsnn_ext.conversion.quantize import quantize_
from qsnn_ext.errors import InputError, QSNNError
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.spikingjelly import QuantIFNode, QuantLIFNode, QuantParametricLIFNode, Triangle
from tests.pairwise import pairwise

BITS = [2, 3, 4, 8]
RESETS = {"hard0": 0.0, "hard": -0.4, "soft": None}
ORDERS = ["fire_first", "quantize_first"]
PRESETS = ["paper", "official"]

bits_ = pytest.mark.parametrize("bits", BITS, ids=lambda k: f"{k}u")
orders = pytest.mark.parametrize("order", ORDERS)
presets = pytest.mark.parametrize("preset", PRESETS)
resets = pytest.mark.parametrize("reset", RESETS)
detached = pytest.mark.parametrize("detach_reset", [False, True], ids=["through", "detached"])


def _inputs(rng, T, shape=(3, 8), mean=0.35, std=1.1):
    return rng.normal(mean, std, size=(T, *shape))


def _upstream(rng, x):
    return rng.normal(size=x.shape), rng.normal(size=x.shape)


def _model(bits, preset, order, reset, tau=2.0, decay_input=False, **keywords):
    membrane = ref.Membrane(bits, **ref.PRESET_MEMBRANE[preset])
    return ref.SpikingJellyLIF.from_tau(
        membrane, tau, decay_input, RESETS[reset], order=order, **keywords
    )


def _check_sequence(node, model, x, g_s, g_v):
    """Spikes, every state and the input's gradient of a multi-step run equal the oracle's."""
    node.step_mode = "m"
    node.store_v_seq = True
    node.reset()
    trace = model.forward(x)
    xt = torch.tensor(x, requires_grad=True)
    s = node(xt)
    assert_array_equal(s.detach().numpy(), trace.stack("s"))
    assert_allclose(node.v_seq.detach().numpy(), trace.stack("v"), rtol=0, atol=1e-12)
    assert_allclose(node.v.detach().numpy(), trace.steps[-1]["v"], rtol=0, atol=1e-12)
    loss = (s * torch.tensor(g_s)).sum() + (node.v_seq * torch.tensor(g_v)).sum()
    expected = model.backward(trace, g_s, g_v)
    parameters = list(node.parameters())
    gradients = torch.autograd.grad(loss, [xt, *parameters])
    assert_allclose(gradients[0].numpy(), expected["x"], rtol=1e-9, atol=1e-11)
    return trace, expected, gradients[1:]


# ------------------------------------------------------------------ the oracle


@bits_
@orders
@presets
@resets
@detached
def test_oracle(rng, bits, order, preset, reset, detach_reset):
    for T, tau, decay_input in [(1, 2.0, True), (5, 2.0, False), (16, 1.25, True)]:
        model = _model(
            bits, preset, order, reset, tau, decay_input, theta=0.6, detach_reset=detach_reset
        )
        node = QuantLIFNode(
            tau, decay_input, 0.6, RESETS[reset], surrogate.Sigmoid(), detach_reset,
            bits=bits, preset=preset, order=order,
        )  # fmt: skip
        x = _inputs(rng, T)
        trace, _, _ = _check_sequence(node, model, x, *_upstream(rng, x))
    assert 0.02 < trace.stack("s").mean() < 0.98


@bits_
@orders
@resets
@pytest.mark.parametrize("alpha", [0.4, 0.9, 1.6])
def test_oracle_with_a_frozen_scale(rng, bits, order, reset, alpha):
    """States beyond the scale are clipped, and pass no gradient."""
    node = QuantLIFNode(2.0, False, 1.0, RESETS[reset], bits=bits, order=order)
    node.membrane.freeze(alpha)
    node.eval()
    model = _model(bits, "paper", order, reset)
    model = replace(model, membrane=ref.Membrane(bits, frozen_alpha=float(node.membrane.alpha)))
    x = _inputs(rng, 10)
    _check_sequence(node, model, x, *_upstream(rng, x))


@bits_
@orders
@resets
def test_oracle_with_the_papers_surrogate(rng, bits, order, reset):
    """tau = 0.5 of the paper is tau = 2 with undecayed input; its surrogate is the triangle."""
    model = _model(bits, "paper", order, reset, derivative=ref.triangle_derivative)
    node = QuantLIFNode(
        2.0, False, 1.0, RESETS[reset], F.triangle, bits=bits, preset="paper", order=order
    )
    x = _inputs(rng, 8)
    _check_sequence(node, model, x, *_upstream(rng, x))


@pytest.mark.parametrize(
    ("step", "bits", "preset", "kind"),
    pairwise(
        [*itertools.product(ORDERS, RESETS)], BITS, PRESETS, ["zeros", "negative", "very-negative"]
    ),
)
def test_states_without_a_positive_value(rng, step, bits, preset, kind):
    """alpha <= 0 and all-zero tensors give a zero state, and no NaN anywhere."""
    order, reset = step
    x = {
        "zeros": np.zeros((4, 2, 5)),
        "negative": -np.abs(rng.normal(size=(4, 2, 5))),
        "very-negative": np.full((4, 2, 5), -50.0),
    }[kind]
    model = _model(bits, preset, order, reset)
    node = QuantLIFNode(
        2.0, False, 1.0, RESETS[reset], surrogate.Sigmoid(), bits=bits, preset=preset, order=order
    )
    _, _, _ = _check_sequence(node, model, x, *_upstream(rng, x))
    assert torch.isfinite(node.v_seq).all()
    if preset == "paper" and reset in ("hard0", "soft"):
        assert torch.equal(node.v_seq, torch.zeros_like(node.v_seq))


@bits_
@presets
def test_integrate_and_fire(rng, bits, preset):
    membrane = ref.Membrane(bits, **ref.PRESET_MEMBRANE[preset])
    for v_reset in RESETS.values():
        model = ref.SpikingJellyLIF(membrane, decay=1.0, gain=1.0, v_reset=v_reset)
        node = QuantIFNode(1.0, v_reset, surrogate.Sigmoid(), bits=bits, preset=preset)
        assert isinstance(node, neuron.IFNode)
        x = _inputs(rng, 6, mean=0.1)
        _check_sequence(node, model, x, *_upstream(rng, x))


@bits_
@orders
@resets
@pytest.mark.parametrize("decay_input", [True, False], ids=["decayed", "plain"])
def test_parametric_lif(rng, bits, order, reset, decay_input):
    """The time constant learns: 1 / tau = sigmoid(w)."""
    tau = 1.7
    model = _model(bits, "paper", order, reset, tau, decay_input, theta=0.6)
    node = QuantParametricLIFNode(
        tau, decay_input, 0.6, RESETS[reset], surrogate.Sigmoid(), bits=bits, order=order
    ).double()
    assert isinstance(node, neuron.ParametricLIFNode)
    with torch.no_grad():  # the constructor keeps w in float32
        node.w.copy_(torch.tensor(-np.log(tau - 1.0)))
    x = _inputs(rng, 6)
    trace, g, (g_w,) = _check_sequence(node, model, x, *_upstream(rng, x))
    rate = 1.0 / tau
    g_rate = (
        -g["decay"] + (g["gain"] if decay_input else 0.0) + (RESETS[reset] or 0.0) * g["offset"]
    )
    assert_allclose(g_w.item(), g_rate * rate * (1.0 - rate), rtol=1e-8)
    assert trace.stack("s").any()


@given(
    x=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12),
    bits=st.sampled_from(BITS),
    reset=st.sampled_from(list(RESETS)),
    order=st.sampled_from(ORDERS),
)
def test_each_float32_step_equals_the_oracle_but_for_ties(x, bits, reset, order):
    """In float32 each step starts from the package's own state; only near-ties may differ."""
    model = _model(bits, "paper", order, reset)
    node = QuantLIFNode(2.0, False, 1.0, RESETS[reset], bits=bits, order=order)
    v = np.full((1, len(x)), RESETS[reset] or 0.0)
    for scale in (1.0, -0.7, 1.3):
        xt = torch.tensor([x], dtype=torch.float32) * scale
        s = node(xt)
        assert s.dtype == node.v.dtype == torch.float32
        step = model.step(xt.double().numpy(), v)
        ratio = model.membrane.ratio(step["pre"])
        clear = np.abs(step["u"] - 1.0) > 1e-5
        assert_array_equal(s.numpy()[clear], step["s"][clear])
        untied = np.abs(ratio - np.floor(ratio) - 0.5) > 1e-4
        if clear.all():  # a spike that differs moves alpha for everyone
            assert_allclose(node.v.numpy()[untied], step["v"][untied], rtol=1e-5, atol=1e-6)
        v = node.v.double().numpy()


@bits_
@presets
def test_state_is_on_its_grid(rng, bits, preset):
    node = QuantLIFNode(2.0, False, bits=bits, preset=preset)
    model = ref.Membrane(bits, **ref.PRESET_MEMBRANE[preset])
    twin = _model(bits, preset, "fire_first", "hard0")
    v = np.zeros((3, 40))
    for x in _inputs(rng, 6, (3, 40)):
        node(torch.tensor(x))
        unit = model.unit(twin.step(x, v)["pre"])
        codes = node.v.numpy() / unit
        assert_allclose(codes, np.round(codes), atol=1e-9)
        assert np.abs(codes).max() <= 2 ** (bits - 1) - 1 + 1e-9
        assert len(node.v.unique()) <= 2**bits - 1
        v = node.v.numpy()
    assert len(node.v.unique()) > 1


def test_the_two_orders_differ(rng):
    x = torch.tensor(_inputs(rng, 8, (4, 50)))
    spikes = [QuantLIFNode(2.0, False, step_mode="m", bits=2, order=order)(x) for order in ORDERS]
    assert not torch.equal(*spikes)


def test_quantized_differs_from_float(rng):
    """In both step modes: overriding only one of them would run the float neuron in the other."""
    x = torch.tensor(_inputs(rng, 8, (4, 50)))
    plain = neuron.LIFNode(2.0, False, step_mode="m")(x)
    for mode in "sm":
        node = QuantLIFNode(2.0, False, step_mode=mode, bits=2)
        s = node(x) if mode == "m" else torch.stack([node(step) for step in x])
        assert not torch.equal(s, plain)


def test_a_charge_at_the_threshold_fires():
    node = QuantLIFNode(2.0, False, bits=2)
    assert node(torch.tensor([[1.0, 0.999]])).tolist() == [[1.0, 0.0]]
    assert node.v[0, 0] == 0.0


# ------------------------------------------------------------------ step modes


@pytest.mark.parametrize("bits", [*BITS, None], ids=lambda k: f"{k or 32}u")
@orders
@presets
@resets
@pytest.mark.parametrize("store", [False, True], ids=["last", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_multi_step_equals_single_step_bit_for_bit(rng, bits, order, preset, reset, store, dtype):
    options = {"bits": bits, "order": order, "preset": preset, "store_v_seq": store}
    x = torch.tensor(_inputs(rng, 6), dtype=dtype)
    g = torch.tensor(rng.normal(size=x.shape), dtype=dtype)
    results = []
    for mode in "sm":
        node = QuantLIFNode(2.0, False, v_reset=RESETS[reset], step_mode=mode, **options)
        xt = x.clone().requires_grad_()
        s = node(xt) if mode == "m" else torch.stack([node(step) for step in xt])
        ((s * g).sum() + (node.v * g[0]).sum()).backward()
        results.append([s, node.v, xt.grad, *([node.v_seq] if store else [])])
    for single, multi in zip(*results, strict=True):
        assert multi.dtype == dtype
        assert torch.equal(single, multi)


def test_state_is_carried_between_calls_and_reset(rng):
    x = torch.tensor(_inputs(rng, 8))
    node = QuantLIFNode(2.0, False, step_mode="m", bits=2)
    whole = node(x)
    node.reset()
    halves = torch.cat([node(x[:4]), node(x[4:])])
    assert torch.equal(whole, halves)
    functional.reset_net(node)
    assert torch.equal(node(x), whole)


def test_no_grad_and_broken_graphs(rng):
    x = torch.tensor(_inputs(rng, 3), requires_grad=True)
    node = QuantLIFNode(2.0, False, step_mode="m", bits=2)
    with torch.no_grad():
        quiet = node(x)
    assert not quiet.requires_grad
    node.reset()
    assert torch.equal(node(x), quiet)
    assert node.v.requires_grad
    functional.detach_net(node)
    assert not node.v.requires_grad


# ------------------------------------------------------------------ 32 bits


@pytest.mark.parametrize(
    ("arithmetic", "bits", "store", "spike"),
    pairwise(
        [*itertools.product(RESETS, [False, True], [True, False], ["s", "m"])], [None, 32],
        [False, True], [surrogate.Sigmoid(), surrogate.ATan(), F.triangle],
    ),
)  # fmt: skip
def test_32_bit_equals_float_neuron(arithmetic, bits, store, spike):
    reset, detach_reset, decay_input, step_mode = arithmetic
    arguments = (1.3, decay_input, 0.7, RESETS[reset], spike, detach_reset, step_mode, store)
    x = torch.randn(5, 3, 8) + 0.3
    g = torch.randn_like(x)
    results = []
    for node in (neuron.LIFNode(*arguments), QuantLIFNode(*arguments, bits=bits)):
        xt = x.clone().requires_grad_()
        s = node(xt) if step_mode == "m" else torch.stack([node(step) for step in xt])
        ((s * g).sum() + (node.v * g[0]).sum()).backward()
        results.append([s, node.v, xt.grad, *([node.v_seq] if store else [])])
    for plain, ours in zip(*results, strict=True):
        assert torch.equal(plain, ours)
    assert results[0][0].any()
    assert node.membrane is None


@pytest.mark.parametrize("step_mode", ["s", "m"])
@resets
def test_32_bit_if_and_parametric_equal_their_parents(reset, step_mode):
    x = torch.randn(5, 3, 8) + 0.3
    pairs = [
        (neuron.IFNode, QuantIFNode, (1.0, RESETS[reset])),
        (neuron.ParametricLIFNode, QuantParametricLIFNode, (1.7, True, 0.8, RESETS[reset])),
    ]
    for parent, ours, arguments in pairs:
        results = []
        for node in (parent(*arguments), ours(*arguments, bits=None)):
            node.step_mode = step_mode
            xt = x.clone().requires_grad_()
            s = node(xt) if step_mode == "m" else torch.stack([node(step) for step in xt])
            (s * x).sum().backward()
            results.append([s, node.v, xt.grad, *(p.grad for p in node.parameters())])
        for plain, quantized in zip(*results, strict=True):
            assert torch.equal(plain, quantized)


def test_defaults_are_those_of_the_parent():
    for parent, ours in [
        (neuron.LIFNode, QuantLIFNode),
        (neuron.IFNode, QuantIFNode),
        (neuron.ParametricLIFNode, QuantParametricLIFNode),
    ]:
        plain, node = parent(), ours()
        assert isinstance(node, parent)
        for name in ("tau", "decay_input", "v_threshold", "v_reset", "detach_reset", "step_mode"):
            assert getattr(node, name, None) == getattr(plain, name, None)
        assert type(node.surrogate_function) is type(plain.surrogate_function)
        assert (node.bits, node.order) == (2, "fire_first")
        assert isinstance(node.membrane, MembraneQuantizer)


# ------------------------------------------------------------------ options of the membrane


def test_given_membrane_is_used():
    membrane = MembraneQuantizer(4, scale="absmax")
    node = QuantLIFNode(2.0, False, membrane=membrane)
    assert node.membrane is membrane
    assert node.bits == 4


def test_options_override_the_preset(rng):
    x = _inputs(rng, 6)
    node = QuantLIFNode(2.0, False, bits=3, preset="paper", scale="absmax", squash="tanh")
    model = _model(3, "official", "fire_first", "hard0")
    _check_sequence(node, model, x, *_upstream(rng, x))


@orders
def test_frozen_scale_makes_samples_independent(rng, order):
    x = torch.tensor(_inputs(rng, 6, (4, 10)))
    node = QuantLIFNode(2.0, False, step_mode="m", bits=2, mode="frozen", order=order)
    for _ in range(5):
        node.reset()
        node(x)
    node.eval()
    node.reset()
    together = node(x)
    node.reset()
    assert torch.equal(node(x[:, :1]), together[:, :1])


@pytest.mark.parametrize("reset", RESETS)
def test_frozen_scale_learns_alike_in_both_step_modes(rng, reset):
    """In training the running mean moves once for each time step, whoever runs the loop."""
    x = torch.tensor(_inputs(rng, 6), dtype=torch.float32)
    single = QuantLIFNode(v_reset=RESETS[reset], step_mode="s", bits=3, mode="frozen")
    multi = QuantLIFNode(v_reset=RESETS[reset], step_mode="m", bits=3, mode="frozen")
    for _ in range(3):
        assert torch.equal(torch.stack([single(step) for step in x]), multi(x))
        assert torch.equal(single.membrane.alpha, multi.membrane.alpha)
        functional.reset_net(single)
        functional.reset_net(multi)
    assert single.membrane.alpha > 0


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=str)
def test_an_empty_batch_is_no_error(shape):
    assert QuantLIFNode(bits=2)(torch.zeros(shape)).shape == shape
    assert QuantLIFNode(bits=2, step_mode="m")(torch.zeros(3, *shape)).shape == (3, *shape)


@orders
def test_dynamic_scale_is_over_the_whole_batch(rng, order):
    """The paper's rule: batch mates matter. Kept, because it is what was published."""
    x = torch.tensor(_inputs(rng, 16, (8, 60)))
    node = QuantLIFNode(2.0, False, step_mode="m", bits=2, order=order)
    together = node(x)
    node.reset()
    assert not torch.equal(node(x[:, :1]), together[:, :1])


# ------------------------------------------------------------------ checkpoints and copies


def _net(node):
    return torch.nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1), layer.BatchNorm2d(4), node(), layer.Flatten(),
        layer.Linear(4 * 25, 3), node(),
    )  # fmt: skip


def test_float_checkpoint_loads_strictly():
    plain = _net(neuron.LIFNode)
    for options in ({}, {"mode": "frozen"}, {"bits": None}, {"preset": "official"}):
        quantized = _net(lambda options=options: QuantLIFNode(**options))
        quantized.load_state_dict(plain.state_dict(), strict=True)
        plain.load_state_dict(quantized.state_dict(), strict=True)


def test_state_dict_round_trips_strictly(rng):
    x = torch.tensor(_inputs(rng, 4, (2, 6)), dtype=torch.float32)
    trained = QuantLIFNode(step_mode="m", bits=3, mode="frozen")
    trained(x)
    trained.eval()
    trained.reset()
    restored = QuantLIFNode(step_mode="m", bits=3, mode="frozen").eval()
    restored.load_state_dict(trained.state_dict(), strict=True)
    assert torch.equal(restored(x), trained(x))
    assert torch.equal(restored.v, trained.v)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_behave_alike(rng, copier):
    x = torch.tensor(_inputs(rng, 4), dtype=torch.float32)
    node = QuantLIFNode(step_mode="m", bits=2)
    twin = copier(node)
    assert torch.equal(twin(x), node(x))


# ------------------------------------------------------------------ dtypes, compile, errors


@bits_
@orders
def test_bfloat16_autocast(bits, order):
    net = torch.nn.Sequential(
        layer.Linear(6, 12), QuantLIFNode(bits=bits, order=order), layer.Linear(12, 2)
    )
    functional.set_step_mode(net, "m")
    x = torch.randn(4, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    y.float().sum().backward()
    assert torch.isfinite(y).all()
    assert net[0].weight.grad.abs().sum() > 0
    assert torch.isfinite(net[0].weight.grad).all()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dtype_is_kept(dtype):
    node = QuantLIFNode(step_mode="m", bits=4)
    x = torch.randn(3, 2, 5).to(dtype).requires_grad_()
    s = node(x)
    s.sum().backward()
    assert s.dtype == node.v.dtype == x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool], ids=str)
def test_input_must_be_floating(dtype):
    for mode in "sm":
        with pytest.raises(QSNNError, match="float"):
            QuantLIFNode(step_mode=mode, bits=2)(torch.ones(2, 3, dtype=dtype))


def test_multi_step_needs_a_time_dimension():
    node = QuantLIFNode(step_mode="m")
    for x in (torch.tensor(1.0), torch.ones(3)):
        with pytest.raises(QSNNError):
            node(x)


@pytest.mark.parametrize("bits", [1, 0, 9, 31, "two", 2.5], ids=repr)
def test_unknown_bits_are_refused(bits):
    with pytest.raises(QSNNError, match="bits"):
        QuantLIFNode(bits=bits)


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
        QuantLIFNode(**options)


@pytest.mark.parametrize(
    ("order", "mode"), [("fire_first", "dynamic"), ("quantize_first", "frozen")]
)
def test_neuron_compiles_without_a_graph_break(order, mode):
    class Small(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Linear(6, 8)
            self.spike = QuantLIFNode(2.0, False, step_mode="m", bits=2, order=order, mode=mode)

        def forward(self, x):
            return self.spike(self.weight(x))

    net, x = Small(), torch.randn(3, 4, 6)
    net(x)  # a frozen scale takes its first value here
    net.spike.reset()
    net.eval()
    eager = net(x)
    net.spike.reset()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)


def test_zoo_model_takes_the_neuron():
    from spikingjelly.activation_based.model import sew_resnet

    net = sew_resnet.sew_resnet18(
        cnf="ADD", spiking_neuron=QuantLIFNode, num_classes=3, bits=2, order="quantize_first"
    )
    nodes = [m for m in net.modules() if isinstance(m, QuantLIFNode)]
    assert len(nodes) == 20
    assert {(n.bits, n.order) for n in nodes} == {(2, "quantize_first")}


def test_a_sequence_needs_a_step():
    with pytest.raises(InputError, match="T = 0"):
        QuantLIFNode(bits=2, step_mode="m")(torch.zeros(0, 3, 4))


def test_the_presets_squash_can_be_switched_off():
    assert QuantLIFNode(bits=2, preset="official").membrane.squash == "tanh"
    assert QuantLIFNode(bits=2, preset="official", squash="none").membrane.squash is None


@pytest.mark.parametrize(("preset", "fires"), [("paper", 1.0), ("official", 0.0)])
def test_a_converted_neuron_fires_at_its_threshold_as_the_preset_does(preset, fires, tmp_path):
    """The authors' code compares with ``>``; where the model itself says which, that counts."""

    def network(**strict):
        return torch.nn.Sequential(neuron.IFNode(surrogate_function=Triangle(**strict)))

    def at_threshold(model):
        return model(torch.ones(2, 3)).mean().item()

    model = network()
    quantize_(model, preset)
    assert at_threshold(model) == fires
    save_checkpoint(model, tmp_path / "net.safetensors")
    assert at_threshold(load_checkpoint(tmp_path / "net.safetensors", network)) == fires
    for said in (True, False):
        model = network(strict=said)
        quantize_(model, preset)
        assert at_threshold(model) == float(not said)
