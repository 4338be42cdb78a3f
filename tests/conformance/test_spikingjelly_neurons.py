"""What SpikingJelly expects of any neuron, asked of ours.

Each neuron is tested with a dynamic and with a frozen membrane scale, in both orders of a step.
"""

import copy
import pickle

import pytest
import torch

sj = pytest.importorskip("spikingjelly.activation_based")
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate  # noqa: E402

from qsnn_ext.spikingjelly import (  # noqa: E402
    QuantIFNode,
    QuantLIFNode,
    QuantParametricLIFNode,
    Triangle,
)

NODES = [QuantLIFNode, QuantIFNode, QuantParametricLIFNode]
T, N, K = 5, 3, 7


def node_of(cls, *, order="fire_first", mode="dynamic", step_mode="s", **options):
    node = cls(order=order, mode=mode, step_mode=step_mode, **options)
    if mode == "frozen":
        node.membrane.freeze(0.8)
        node.eval()
    return node


@pytest.fixture
def x_seq():
    return 2 * torch.randn(T, N, K, generator=torch.Generator().manual_seed(1)) + 0.8


nodes = pytest.mark.parametrize("cls", NODES)
orders = pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
modes = pytest.mark.parametrize("mode", ["dynamic", "frozen"])
resets = pytest.mark.parametrize("v_reset", [0.0, -0.25, None], ids=["hard", "hard-0.25", "soft"])


# --------------------------------------------------------------------------- functional purity


@nodes
@orders
@modes
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_functional_forward_touches_no_memory(cls, order, mode, step_mode, x_seq):
    node = node_of(cls, order=order, mode=mode, step_mode=step_mode, store_v_seq=True)
    x = x_seq[0] if step_mode == "s" else x_seq
    before = list(node._memories.values())
    state = torch.full((N, K), 0.3)
    (spikes,), (v,) = node.functional_forward((x,), (state,))
    assert list(node._memories.values()) == before
    assert node.v_seq is None
    assert torch.equal(state, torch.full((N, K), 0.3))
    assert spikes.shape == x.shape
    assert v.shape == (N, K)


@nodes
@orders
@modes
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_functional_forward_repeats_itself(cls, order, mode, step_mode, x_seq):
    node = node_of(cls, order=order, mode=mode, step_mode=step_mode)
    x = x_seq[0] if step_mode == "s" else x_seq
    first = node.functional_forward((x,), (0.0,))
    second = node.functional_forward((x,), (0.0,))
    assert torch.equal(first[0][0], second[0][0])
    assert torch.equal(first[1][0], second[1][0])


@nodes
@orders
@modes
def test_functional_forward_equals_stateful_forward(cls, order, mode, x_seq):
    node = node_of(cls, order=order, mode=mode, step_mode="m")
    (expected,), (v,) = node.functional_forward((x_seq,), (0.0,))
    assert torch.equal(node(x_seq), expected)
    assert torch.equal(node.v, v)


@nodes
@modes
def test_to_functional_forward_of_a_network(cls, mode, x_seq):
    net = torch.nn.Sequential(
        layer.Linear(K, 4), node_of(cls, mode=mode), layer.Linear(4, 2), node_of(cls, mode=mode)
    )
    functional.set_step_mode(net, "m")
    forward = base.to_functional_forward(net)
    states = tuple(base.extract_memories(net))
    outputs, updated = forward((x_seq,), states)
    assert base.extract_memories(net) == list(states)
    assert torch.equal(net(x_seq), outputs[0])
    for kept, returned in zip(base.extract_memories(net), updated, strict=True):
        assert torch.equal(kept, returned)


@nodes
def test_load_memories_continues_a_sequence(cls, x_seq):
    node = node_of(cls, step_mode="m")
    whole = node(x_seq)
    functional.reset_net(node)
    node(x_seq[:2])
    saved = [m.clone() for m in base.extract_memories(node)]
    functional.reset_net(node)
    node(x_seq)
    base.load_memories(node, saved)
    assert torch.equal(node(x_seq[2:]), whole[2:])


# --------------------------------------------------------------------------- step mode


@nodes
@orders
@modes
@resets
@pytest.mark.parametrize("detach_reset", [False, True])
def test_multi_step_equals_single_steps(cls, order, mode, v_reset, detach_reset, x_seq):
    """Spikes, membrane potential and gradients, bit for bit, and unlike the float neuron."""
    results = []
    for step_mode in ("s", "m"):
        torch.manual_seed(0)
        node = node_of(
            cls,
            order=order,
            mode=mode,
            step_mode=step_mode,
            v_reset=v_reset,
            detach_reset=detach_reset,
        )
        x = x_seq.clone().requires_grad_()
        spikes = node(x) if step_mode == "m" else torch.stack([node(step) for step in x])
        (spikes * torch.arange(1.0, K + 1)).sum().backward()
        results.append((spikes.detach(), node.v.detach(), x.grad))
    for single, multi in zip(*results, strict=True):
        assert torch.equal(single, multi)
    reference = cls.float_type()(step_mode="m", v_reset=v_reset, detach_reset=detach_reset)
    reference(x_seq)
    assert not torch.equal(results[0][1], reference.v.detach())


@nodes
def test_float_membrane_is_the_host_neuron(cls, x_seq):
    """``bits=None``: spikes, state and gradients of the host, bit for bit."""
    results = []
    for node in (cls(bits=None, step_mode="m"), cls.float_type()(step_mode="m")):
        x = x_seq.clone().requires_grad_()
        spikes = node(x)
        spikes.sum().backward()
        results.append((spikes.detach(), node.v.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_set_step_mode_reaches_our_layers_but_not_into_containers():
    from qsnn_ext.spikingjelly import BinaryConv2d, BinaryLinear

    inner = QuantLIFNode()
    net = torch.nn.Sequential(
        BinaryConv2d(1, 2, 3),
        QuantLIFNode(),
        layer.SeqToANNContainer(torch.nn.Conv2d(2, 2, 3)),
        layer.MultiStepContainer(inner),
        BinaryLinear(2, 2),
    )
    functional.set_step_mode(net, "m")
    assert [net[i].step_mode for i in (0, 1, 4)] == ["m", "m", "m"]
    assert inner.step_mode == "s"


@nodes
def test_unknown_step_mode_is_refused(cls):
    node = cls()
    with pytest.raises(ValueError, match="step_mode"):
        node.step_mode = "x"
    assert node.supported_step_mode() == ("s", "m")


# --------------------------------------------------------------------------- reset and detach


@nodes
@resets
def test_reset_net_restores_the_start(cls, v_reset, x_seq):
    node = node_of(cls, step_mode="m", v_reset=v_reset, store_v_seq=True)
    start = node.v
    first = node(x_seq)
    carried = node(x_seq)
    functional.reset_net(node)
    assert node.v == start
    assert node.v_seq is None
    assert torch.equal(node(x_seq), first)
    assert not torch.equal(carried, first)


def test_reset_cache_after_exchanging_a_neuron(x_seq):
    """``reset_net`` remembers which modules to reset, so an exchange must be told to it."""
    net = torch.nn.Sequential(layer.Linear(K, 4), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    net(x_seq)
    functional.reset_net(net)
    net[1] = QuantLIFNode(step_mode="m")
    functional.invalidate_reset_cache(net)
    net(x_seq)
    functional.reset_net(net)
    assert net[1].v == 0.0


def test_reset_cache_after_conversion_in_place(x_seq):
    """``from_float`` keeps the object, so even a cache that nobody invalidated stays right."""
    net = torch.nn.Sequential(layer.Linear(K, 4), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    net(x_seq)
    functional.reset_net(net)
    QuantLIFNode.from_float(net[1], QuantLIFNode().membrane)
    net(x_seq)
    functional.reset_net(net)
    assert net[1].v == 0.0


@nodes
def test_reset_allows_a_new_batch_size(cls, x_seq):
    node = node_of(cls, step_mode="m")
    node(x_seq)
    functional.reset_net(node)
    assert node(x_seq[:, :1]).shape == (T, 1, K)


@nodes
def test_state_follows_shape_and_dtype_of_the_input(cls, x_seq):
    """As the host's: a new shape restarts the state, a new dtype casts it."""
    node = node_of(cls, step_mode="s")
    node(x_seq[0])
    node(x_seq[0, :1])
    assert node.v.shape == (1, K)
    node.double()(x_seq[0, :1].double())
    assert node.v.dtype == torch.float64


@nodes
@modes
def test_detach_net_cuts_the_graph(cls, mode, x_seq):
    node = node_of(cls, mode=mode, step_mode="s", store_v_seq=True)
    x = x_seq.clone().requires_grad_()
    node(x[0])
    functional.detach_net(node)
    assert not node.v.requires_grad
    node(x[1]).sum().backward()
    assert torch.count_nonzero(x.grad[0]) == 0
    assert torch.count_nonzero(x.grad[1]) > 0


@nodes
def test_truncated_back_propagation_trains(cls, x_seq):
    """Online learning as the host's users write it: step, back-propagate, detach."""
    net = torch.nn.Sequential(layer.Linear(K, 4), node_of(cls))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = net[0].weight.detach().clone()
    for x in x_seq:
        optimizer.zero_grad()
        net(x).sum().backward()
        optimizer.step()
        functional.detach_net(net)
    assert not torch.equal(before, net[0].weight)


# --------------------------------------------------------------------------- v_seq


@nodes
@orders
@modes
def test_store_v_seq_is_the_state_after_every_step(cls, order, mode, x_seq):
    multi = node_of(cls, order=order, mode=mode, step_mode="m", store_v_seq=True)
    single = node_of(cls, order=order, mode=mode, step_mode="s", store_v_seq=True)
    plain = node_of(cls, order=order, mode=mode, step_mode="s")
    multi(x_seq)
    expected = []
    for x in x_seq:
        single(x)
        plain(x)
        expected.append(plain.v)
    assert torch.equal(multi.v_seq, torch.stack(expected))
    assert torch.equal(single.v_seq, multi.v_seq)
    assert torch.equal(multi.v_seq[-1], multi.v)


@nodes
def test_store_v_seq_changes_no_result(cls, x_seq):
    with_seq, without = (node_of(cls, step_mode="m", store_v_seq=s) for s in (True, False))
    assert torch.equal(with_seq(x_seq), without(x_seq))
    with_seq.store_v_seq = False
    assert with_seq.v_seq is None


@nodes
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_v_seq_lies_on_the_grid(cls, bits, x_seq):
    """Of each step's own scale: at most 2**bits - 1 values, symmetric around 0."""
    node = node_of(cls, step_mode="m", store_v_seq=True, bits=bits)
    node(x_seq)
    for v in node.v_seq:
        assert len(v.unique()) <= 2**bits - 1


# --------------------------------------------------------------------------- being a node


@nodes
def test_is_a_host_node(cls):
    node = cls()
    assert isinstance(node, base.MemoryModule)
    assert isinstance(node, neuron.BaseNode)
    assert isinstance(node, cls.float_type())
    assert [name for name, _ in node.named_memories()] == ["v"]
    assert not any(key.rsplit(".", 1)[-1] == "v" for key in node.state_dict())


@nodes
def test_constructor_defaults_are_the_hosts(cls):
    ours, theirs = cls(), cls.float_type()()
    names = ["v_threshold", "v_reset", "detach_reset", "step_mode", "store_v_seq"]
    names += [n for n in ("tau", "decay_input", "init_tau") if hasattr(theirs, n)]
    for name in names:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert type(ours.surrogate_function) is type(theirs.surrogate_function)


@nodes
def test_host_checkpoint_loads_strictly(cls):
    ours = cls()
    assert ours.load_state_dict(cls.float_type()().state_dict(), strict=True)


@nodes
@modes
def test_copy_and_pickle_after_reset(cls, mode, x_seq):
    node = node_of(cls, mode=mode, step_mode="m")
    expected = node(x_seq)
    functional.reset_net(node)
    for twin in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        assert torch.equal(twin(x_seq), expected)
        assert twin.membrane is not node.membrane


@nodes
@pytest.mark.parametrize(
    "name",
    ["Sigmoid", "ATan", "PiecewiseQuadratic", "PiecewiseExp", "SoftSign", "LeakyKReLU", "Rect"],
)
def test_surrogates_of_the_host(cls, name, x_seq):
    """Any surrogate works, and its gradient reaches the input."""
    if not hasattr(surrogate, name):
        pytest.skip(f"this SpikingJelly has no surrogate.{name}")
    node = node_of(cls, step_mode="m", surrogate_function=getattr(surrogate, name)())
    x = x_seq.clone().requires_grad_()
    spikes = node(x)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    spikes.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.count_nonzero(x.grad) > 0


def test_triangle_is_a_host_surrogate():
    """Switching ``spiking`` off gives the primitive, whose derivative is the surrogate gradient."""
    assert issubclass(Triangle, surrogate.SurrogateFunctionBase)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    gradients = []
    for spiking in (True, False):
        function = Triangle(beta=1.5)
        function.set_spiking_mode(spiking)
        (gradient,) = torch.autograd.grad(function(x).sum(), x)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients)


@nodes
def test_shared_surrogate_and_threshold_assignment(cls, x_seq):
    """``functional.set_threshold_margin`` puts a tensor in place of the threshold."""
    node = node_of(cls, step_mode="s").train()
    labels = torch.nn.functional.one_hot(torch.arange(N), K).float()
    functional.set_threshold_margin(node, labels)
    assert node(x_seq[0]).shape == (N, K)
    node.eval()
    functional.set_threshold_margin(node, labels)
    assert node.v_threshold == 1.0


@nodes
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_of_input_state_and_output_agree(cls, dtype, x_seq):
    node = node_of(cls, step_mode="m").to(dtype)
    spikes = node(x_seq.to(dtype))
    assert spikes.dtype == dtype
    assert node.v.dtype == dtype
