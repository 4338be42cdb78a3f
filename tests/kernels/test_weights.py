"""The fused binary-weight operation against the quantizer in plain autograd, and its cache."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from qsnn_ext import kernels
from qsnn_ext.errors import StateError
from qsnn_ext.kernels.weights import PreparedWeight, binary_weight, covers
from qsnn_ext.layers import BinaryConv2d, BinaryLinear, QuantLinear
from qsnn_ext.quantizers import BinaryWeight

OPTIONS = list(
    itertools.product(
        ("layer", "channel", None),
        ("mean", "power_of_two", None),
        ("clipped", "identity", "annealed"),
    )
)


def value_and_gradient(function, weight, g):
    w = weight.clone().requires_grad_()
    value = function(w)
    value.backward(g)
    return value.detach(), w.grad


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7), (2, 1, 1, 3)], ids=str)
def test_equals_the_quantizer(options, shape):
    torch.manual_seed(0)
    quantizer = BinaryWeight(*options, temperature=0.7)
    weight, g = torch.randn(shape) + 0.1, torch.randn(shape)
    with kernels.use_backend("function"):
        value, grad = value_and_gradient(lambda w: binary_weight(w, quantizer), weight, g)
    expected, expected_grad = value_and_gradient(quantizer, weight, g)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_a_zero_weight_is_positive():
    quantizer = BinaryWeight(standardize=None, scale=None)
    with kernels.use_backend("function"):
        value = binary_weight(torch.tensor([[0.0, -2.0], [-0.0, 1.0]]), quantizer)
    assert value.tolist() == [[1.0, -1.0], [1.0, 1.0]]


@pytest.mark.parametrize("value", [0.0, -0.5, 3.0])
def test_constant_weights_are_finite(value):
    quantizer = BinaryWeight()
    weight = torch.full((3, 4), value)
    with kernels.use_backend("function"):
        fused, grad = value_and_gradient(
            lambda w: binary_weight(w, quantizer), weight, torch.ones(3, 4)
        )
    expected, expected_grad = value_and_gradient(quantizer, weight, torch.ones(3, 4))
    assert torch.equal(fused, expected)
    assert torch.equal(grad, expected_grad)


def test_covers_only_what_it_computes():
    weight = torch.randn(3, 4)

    class Other(BinaryWeight):
        pass

    assert covers(BinaryWeight(), weight)
    assert not covers(Other(), weight)
    assert not covers(BinaryWeight(), torch.randn(3))
    assert not covers(BinaryWeight("channel"), torch.randn(3, 1))
    watched = BinaryWeight()
    watched.register_forward_hook(lambda *a: None)
    assert not covers(watched, weight)


def test_opcheck():
    w = torch.randn(3, 4, requires_grad=True)
    args = (w, torch.tensor(0.5), "channel", "mean", "annealed")
    with kernels.use_backend("function"):
        torch.library.opcheck(torch.ops.qsnn_ext.binary_weight.default, args)
        _value, *statistics = torch.ops.qsnn_ext.binary_weight(*args)
        statistics = [s.detach() for s in statistics]
        args = (torch.randn(3, 4), w.detach(), *statistics, torch.tensor(0.5), "channel", "clipped")
        torch.library.opcheck(torch.ops.qsnn_ext.binary_weight_backward.default, args)


def test_time_steps_and_micro_batches_share_one_preparation():
    torch.manual_seed(0)
    layer = BinaryLinear(6, 5, bias=False)
    first = layer.quantized_weight
    assert layer.quantized_weight is first
    # Two micro-batches, each with its own backward, accumulate as plain autograd does.
    xs = torch.randn(2, 3, 6)
    for x in xs:
        layer(x).square().sum().backward()
    assert layer.quantized_weight.data_ptr() == first.data_ptr()  # in a node of its own
    accumulated, layer.weight.grad = layer.weight.grad.clone(), None
    with kernels.use_backend("eager"):
        layer(xs.flatten(0, 1)).square().sum().backward()
    torch.testing.assert_close(accumulated, layer.weight.grad, rtol=1e-5, atol=1e-6)


def test_an_optimizer_step_is_noticed():
    layer = BinaryLinear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    first = layer.quantized_weight
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert layer.quantized_weight is not first


@pytest.mark.parametrize("layer_type", [BinaryLinear, QuantLinear])
def test_evaluation_caches_and_notices_changes(layer_type):
    layer = layer_type(6, 5).eval()
    with torch.no_grad():
        first = layer.quantized_weight
        assert layer.quantized_weight is first
        assert not first.requires_grad
        layer.weight.mul_(-1)
        assert torch.equal(layer.quantized_weight, layer.quantizer(layer.weight))
        layer.weight.data[0, 0] += 9.0  # passes the version counter by
        assert torch.equal(layer.quantized_weight, layer.quantizer(layer.weight))
        layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})
        assert torch.equal(layer.quantized_weight, layer.quantizer(layer.weight))
        codes, scale = layer.quantizer.codes(layer.weight)
        assert torch.equal(codes * scale, layer.quantized_weight)


def test_evaluation_notices_other_options():
    layer = QuantLinear(6, 5).eval()
    with torch.no_grad():
        first = layer.quantized_weight
        layer.quantizer = type(layer.quantizer)(2)
        assert not torch.equal(layer.quantized_weight, first)


def test_changing_weights_before_backward_is_an_error():
    layer = BinaryLinear(6, 5)
    out = layer(torch.randn(2, 6)).sum()
    with torch.no_grad():
        layer.weight.add_(1.0)
    with pytest.raises((StateError, RuntimeError), match=r"chang|modified"):
        out.backward()


def test_prepared_weights_do_not_hinder_copies():
    layer = BinaryConv2d(2, 3, 3)
    layer(torch.randn(1, 2, 5, 5)).sum()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.quantized_weight, layer.quantized_weight)
        assert twin.quantized_weight is not layer.quantized_weight


def test_checkpointing_recomputes_with_prepared_weights():
    layer = nn.Sequential(BinaryLinear(6, 5), BinaryLinear(5, 4))
    x = torch.randn(3, 6, requires_grad=True)
    out = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    out.sum().backward()
    got = layer[0].weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(got, layer[0].weight.grad)


@pytest.mark.slow
def test_compiled_equals_function():
    torch.manual_seed(0)
    quantizer = BinaryWeight("channel", "power_of_two", "annealed", temperature=0.7)
    for shape in [(5, 3, 3, 3), (4, 7), (16, 8, 3, 3)]:
        weight, g = torch.randn(shape), torch.randn(shape)
        with kernels.use_backend("compiled"):
            value, grad = value_and_gradient(lambda w: binary_weight(w, quantizer), weight, g)
        expected, expected_grad = value_and_gradient(quantizer, weight, g)
        torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_a_prepared_weight_belongs_to_one_parameter():
    prepared, quantizer = PreparedWeight(), BinaryWeight()
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    prepared.get(a, quantizer)
    assert torch.allclose(prepared.get(b, quantizer), quantizer(b))


# --------------------------------------------------------------------------- whoever writes


def _optimizer(kind, **options):
    def write(layer):
        optimizer = kind(layer.parameters(), lr=0.3, **options)
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    return write


def _zero_sum(weight):
    """A change that a sum of the weights does not show, like those of standardised weights."""
    change = torch.randn_like(weight)
    change[0] *= 3
    return change - change.mean()


def _unwatched(layer):
    layer.weight.data += _zero_sum(layer.weight.data)


def _one_value(layer):
    layer.weight.data[0, 0] *= -1


def _foreach(layer):
    with torch.no_grad():
        torch._foreach_add_(list(layer.parameters()), 0.4)
        torch._foreach_mul_([layer.weight], -1.0)


def _detached(layer):
    layer.weight.detach().copy_(torch.randn_like(layer.weight))


def _no_grad(layer):
    with torch.no_grad():
        layer.weight += _zero_sum(layer.weight)


def _averaged(layer):
    twin = copy.deepcopy(layer)
    average = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.1)
    )
    with torch.no_grad():
        twin.weight.neg_()
    average.update_parameters(twin)
    average.update_parameters(twin)
    layer.weight.data.copy_(average.module.weight)


def _storage(layer):
    """As sharded training does it: the parameter stays, its memory is filled from elsewhere."""
    shard = torch.randn_like(layer.weight.data).flatten()
    layer.weight.data.untyped_storage().copy_(shard.untyped_storage())


def _other_memory(layer):
    layer.weight.data = torch.randn_like(layer.weight)


def _loaded(layer):
    layer.load_state_dict({k: torch.randn_like(v) for k, v in layer.state_dict().items()})


def _assigned(layer):
    state = {k: torch.randn_like(v) for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def _numpy(layer):
    layer.weight.detach().numpy()[:] *= -1


WRITES = {
    "sgd": _optimizer(torch.optim.SGD, foreach=False),
    "sgd-foreach": _optimizer(torch.optim.SGD, foreach=True),
    "sgd-fused": _optimizer(torch.optim.SGD, fused=True),
    "sgd-momentum-fused": _optimizer(torch.optim.SGD, momentum=0.9, fused=True),
    "adam-fused": _optimizer(torch.optim.Adam, fused=True),
    "adamw": _optimizer(torch.optim.AdamW, foreach=False),
    "adamw-foreach": _optimizer(torch.optim.AdamW, foreach=True),
    "adamw-fused": _optimizer(torch.optim.AdamW, fused=True),
    "adagrad-fused": _optimizer(torch.optim.Adagrad, fused=True),
    "rmsprop": _optimizer(torch.optim.RMSprop),
    "data": _unwatched,
    "data-one-value": _one_value,
    "foreach": _foreach,
    "copy": _detached,
    "no-grad": _no_grad,
    "ema": _averaged,
    "storage": _storage,
    "other-memory": _other_memory,
    "load": _loaded,
    "load-assign": _assigned,
    "numpy": _numpy,
}


@pytest.mark.parametrize("gradients", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layer_type", [BinaryLinear, QuantLinear])
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_no_write_goes_unnoticed(write, layer_type, gradients):
    torch.manual_seed(0)
    layer = layer_type(6, 5, bias=False)
    for _ in range(6):
        with torch.set_grad_enabled(gradients):
            before = layer.quantized_weight.detach().clone()
            assert torch.equal(layer(torch.eye(6)).T, before)
        write(layer)
        with torch.set_grad_enabled(gradients):
            after = layer.quantized_weight
            torch.testing.assert_close(after, layer.quantizer(layer.weight), rtol=2e-6, atol=0)
            assert torch.equal(layer(torch.eye(6)).T, after)
            assert after.requires_grad is gradients
        assert not torch.equal(after, before)


def test_a_step_that_moves_nothing_hinders_no_backward():
    """A layer behind silent neurons has no gradient; its optimizer writes the same values."""
    layer = BinaryLinear(6, 5, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.zeros(2, 6)).square().sum().backward()
        optimizer.step()
    assert layer.weight.grad.count_nonzero() == 0


def test_weights_written_between_two_calls_of_one_pass():
    """Test-time training and the like: an optimizer step inside a forward pass."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = BinaryLinear(6, 5, bias=False)

        def forward(self, x):
            first = self.layer(x)
            with torch.no_grad():
                _unwatched(self.layer)
            return first, self.layer(x)

    torch.manual_seed(0)
    net, x = Net(), torch.eye(6)
    old = net.layer.quantizer(net.layer.weight)
    first, second = net(x)
    torch.testing.assert_close(first, old.T, rtol=2e-6, atol=0)
    torch.testing.assert_close(second, net.layer.quantizer(net.layer.weight).T, rtol=2e-6, atol=0)


def test_the_gradient_is_that_of_the_forward_pass():
    """A write that no version counter shows, between forward and backward, changes no gradient."""
    layer = BinaryLinear(6, 5, bias=False)
    x = torch.randn(3, 6)
    layer(x).square().sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    loss = layer(x).square().sum()
    layer.weight.data.mul_(-2.0)
    loss.backward()
    assert torch.equal(layer.weight.grad, expected)


def test_the_quantizers_options_are_no_secret():
    layer = BinaryLinear(6, 5, bias=False)
    layer.quantizer.gradient = "annealed"
    g = torch.randn(5, 6)
    gradients = []
    for t in (0.3, 2.0):
        layer.quantizer.temperature.data.fill_(t)
        (gradient,) = torch.autograd.grad(layer.quantized_weight, layer.weight, g)
        (expected,) = torch.autograd.grad(layer.quantizer(layer.weight), layer.weight, g)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
        gradients.append(gradient)
    assert not torch.equal(*gradients)
    layer.quantizer.scale = None
    assert layer.quantized_weight.detach().abs().unique().tolist() == [1.0]


def test_a_quantizer_of_somebody_elses_is_asked_every_time():
    class Learned(BinaryWeight):
        def __init__(self):
            super().__init__(standardize=None, scale=None)
            self.width = nn.Parameter(torch.ones(()))

        def forward(self, weight):
            return super().forward(weight) * self.width

    layer = BinaryLinear(6, 5, quantizer=Learned())
    with torch.no_grad():
        assert layer.quantized_weight.abs().max() == 1.0
        layer.quantizer.width.fill_(3.0)
        assert layer.quantized_weight.abs().max() == 3.0
    seen = []
    layer = BinaryLinear(6, 5)
    layer.quantizer.register_forward_hook(lambda *a: seen.append(a))
    with torch.no_grad():
        assert layer.quantized_weight is not layer.quantized_weight
    assert len(seen) == 2


def test_time_steps_cost_one_backward_of_the_weights():
    """Called once per time step, the layer is prepared, and differentiated, once."""
    layer = BinaryLinear(6, 5)
    with torch.profiler.profile() as profile:
        out = sum(layer(x) for x in torch.randn(4, 3, 6))
        out.sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["qsnn_ext::binary_weight"] == 1
    assert counts["qsnn_ext::binary_weight_backward"] == 1


def test_computed_weights_are_prepared_for_each_use():
    """Equal values of other origin have another gradient, so they are not shared."""
    quantizer, prepared = BinaryWeight(), PreparedWeight()
    base = torch.randn(3, 4, requires_grad=True)
    factor = torch.ones(3, 4, requires_grad=True)
    weight = base * 1.0
    prepared.get(weight, quantizer)
    weight.mul_(factor)
    prepared.get(weight, quantizer).square().sum().backward()
    assert factor.grad is not None


@pytest.mark.parametrize("layer_type", [BinaryLinear, QuantLinear])
def test_inference_mode(layer_type):
    torch.manual_seed(0)
    layer, x = layer_type(6, 5), torch.randn(3, 6)
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        expected = layer(x)
    for shared in (layer, layer_type(6, 5)):
        shared.load_state_dict(state)
        with torch.inference_mode():
            assert torch.equal(shared(x), expected)
        shared(x).sum().backward()  # nothing of inference mode is left behind
        with torch.no_grad():
            assert torch.equal(shared(x), expected)
        with torch.inference_mode():
            shared.weight.data.neg_()
            assert torch.equal(shared.quantized_weight, shared.quantizer(shared.weight))
            assert not torch.equal(shared(x), expected)
    with torch.inference_mode():
        born = layer_type(6, 5)
        born.load_state_dict(state)
        assert torch.equal(born(x), expected)


@pytest.mark.parametrize("layer_type", [BinaryLinear, QuantLinear])
def test_tracing_and_transforms_see_through(layer_type):
    torch.manual_seed(0)
    net = nn.Sequential(layer_type(6, 5), nn.Tanh(), layer_type(5, 4))
    x = torch.randn(3, 6)
    expected = net(x)

    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), expected)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.neg_()  # the traced program computes with the parameters, not a copy
        torch.testing.assert_close(traced(x), net(x))
        assert not torch.allclose(traced(x), expected)

    params = {name: p.detach() for name, p in net.named_parameters()}

    def loss(params, x):
        return torch.func.functional_call(net, params, (x,)).square().sum()

    net(x).square().sum().backward()
    for name, gradient in torch.func.grad(loss)(params, x).items():
        torch.testing.assert_close(gradient, net.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x[:, None])
    for name, gradient in per_sample.items():
        total = net.get_parameter(name).grad
        torch.testing.assert_close(gradient.sum(0), total, rtol=1e-4, atol=1e-5)
    many = {name: torch.stack([p, p.flip(0)]) for name, p in params.items()}
    both = torch.func.vmap(lambda p: torch.func.functional_call(net, p, (x,)))(many)
    torch.testing.assert_close(both[0], net(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.func.functional_call(net, params, (x,)), net(x))


def test_counters_of_operations_see_the_layer_and_not_its_quantizer():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    ran = []
    for layer in (BinaryLinear(6, 5), nn.Linear(6, 5)):
        with Watch() as watch:
            layer(torch.ones(3, 6)).sum().backward()
        ran.append(watch.seen)
    assert ran[0] == ran[1]


def test_threads_share_a_layer():
    """Each gets the weights of the moment, while another thread exchanges them."""
    import threading

    torch.manual_seed(0)
    layer = BinaryLinear(64, 64, bias=False)
    values = [torch.randn(64, 64) for _ in range(2)]
    allowed = [layer.quantizer(v) for v in values]
    wrong, shared = [], PreparedWeight()
    start = threading.Barrier(4)

    def read(number):
        mine = BinaryLinear(64, 64, bias=False)
        mine.__dict__["_prepared"] = {"weight": shared}
        start.wait()
        for step in range(50):
            mine.weight.data = values[(number + step) % 2].clone()
            with torch.set_grad_enabled(step % 3 == 0):
                got = mine.quantized_weight
            if not torch.allclose(got, allowed[(number + step) % 2]):
                wrong.append((number, step))

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
