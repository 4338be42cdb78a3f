"""The spike regularizer by the paper's formula, in every way a network is run."""

import copy
import gc
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import reference as ref
import snntorch as snn
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from qsnn_ext import functional as F
from qsnn_ext import kernels
from qsnn_ext.errors import QSNNError
from qsnn_ext.layers import BinaryLinear
from qsnn_ext.quantizers import BinaryWeight
from qsnn_ext.regularizers import SignGradientSchedule, WSDRRegularizer
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.spikingjelly import QuantLIFNode

T, N = 5, 11


@pytest.fixture(autouse=True)
def _no_instances():
    yield
    snn.SpikingNeuron.instances.clear()


def _net(node=QuantLIFNode, depth=4, step_mode="m"):
    """Widths differ, so that a layer taken for another, or weighted by size, is noticed."""
    torch.manual_seed(2)
    sizes = [6, 12, 10, 7, 9, 8, 11][: depth + 1]
    parts = []
    for a, b in pairwise(sizes):
        parts += [layer.Linear(a, b), node()]
        nn.init.normal_(parts[-2].weight, 0.3, 1.0)  # so that every layer fires
    net = nn.Sequential(*parts)
    functional.set_step_mode(net, step_mode)
    return net


def _record(net, x):
    """The spikes of every neuron layer, without the regularizer's help."""
    spikes, out = [], x
    with torch.no_grad():
        for module in net:
            out = module(out)
            if isinstance(module, neuron.BaseNode):
                spikes.append(out.double().numpy())
    functional.reset_net(net)
    return spikes


def _input():
    return torch.randn(T, N, 6) * 2


def _expected(spikes, hidden=slice(1, -1), **options):
    return ref.firing_rate_loss([ref.firing_rate(s) for s in spikes[hidden]], **options)


def _close(loss, expected):
    return loss.item() == pytest.approx(expected, rel=1e-5)


# ------------------------------------------------------------------ the formula


@pytest.mark.parametrize("node", [QuantLIFNode, neuron.LIFNode], ids=["quantized", "float"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("depth", [3, 4, 6])
def test_loss_over_the_hidden_layers(node, reduction, depth):
    net, x = _net(node, depth), _input()
    spikes = _record(net, x)
    rates = [ref.firing_rate(s) for s in spikes]
    assert len({round(r, 3) for r in rates}) == depth  # no layer could pass for another
    wsdr = WSDRRegularizer(net, strength=0.7, reduction=reduction)
    net(x)
    assert _close(wsdr(), _expected(spikes, strength=0.7, reduction=reduction))


def test_target_and_strength():
    net, x = _net(), _input()
    spikes = _record(net, x)
    with WSDRRegularizer(net, strength=0.3, target=0.1) as wsdr:
        net(x)
        assert _close(wsdr(), _expected(spikes, strength=0.3, target=0.1))
    functional.reset_net(net)
    with WSDRRegularizer(net) as wsdr:
        net(x)
        assert _close(wsdr(), _expected(spikes, strength=1e-3))


@pytest.mark.parametrize(
    ("exclude", "hidden"),
    [
        ("ends", [1, 2]), (None, [0, 1, 2, 3]), (["3"], [0, 2, 3]), (["1", "7"], [1, 2]),
        (["1", "3", "5"], [3]),
    ],
    ids=["ends", "none", "second", "ends-by-name", "first-three"],
)  # fmt: skip
def test_exclusion(exclude, hidden):
    net, x = _net(), _input()
    spikes = _record(net, x)
    wsdr = WSDRRegularizer(net, strength=1.0, exclude=exclude)
    net(x)
    assert _close(wsdr(), _expected([spikes[i] for i in hidden], slice(None), strength=1.0))


class _DefinedBackwards(nn.Module):
    """The last spiking layer to be defined is the first to run."""

    def __init__(self):
        super().__init__()
        parts = list(_net())
        self.d, self.c, self.b, self.a = (nn.Sequential(*parts[i : i + 2]) for i in (6, 4, 2, 0))

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


def test_ends_are_those_of_the_run():
    net, x = _DefinedBackwards(), _input()
    spikes = _record(nn.Sequential(*net.a, *net.b, *net.c, *net.d), x)
    wsdr = WSDRRegularizer(net, strength=1.0)
    net(x)
    assert _close(wsdr(), _expected(spikes, strength=1.0))
    assert list(wsdr.firing_rates()) == ["b.1", "c.1"]
    assert wsdr.layer_names == ("d.1", "c.1", "b.1", "a.1")


def test_unknown_names_and_options_are_refused():
    net = _net()
    with pytest.raises(QSNNError, match="nowhere"):
        WSDRRegularizer(net, exclude=["nowhere"])
    with pytest.raises(QSNNError, match="'middle'"):
        WSDRRegularizer(net, exclude="middle")
    with pytest.raises(QSNNError):
        WSDRRegularizer(net, reduction="median")
    assert not any(m._forward_hooks for m in net.modules())


def test_gradient_reaches_the_hidden_weights():
    """d loss / d spike of a layer is 2 strength (f - 1/2) / size, by Eq. 17."""
    net, x = _net(), _input()
    spikes = _record(net, x)
    caught = {}
    wsdr = WSDRRegularizer(net, strength=0.5)
    for index in (1, 3, 5, 7):
        net[index].register_forward_hook(lambda m, i, o, index=index: caught.update({index: o}))
    # The fused kernel hands the rate's gradient to the neuron without a tensor of the spikes' size.
    with kernels.use_backend("eager"):
        net(x)
    loss = wsdr()
    assert loss.requires_grad
    assert loss.ndim == 0
    g = torch.autograd.grad(loss, caught[5], retain_graph=True)[0]
    rate = ref.firing_rate(spikes[2])
    assert torch.allclose(g, torch.full_like(g, 2 * 0.5 * (rate - 0.5) / g.numel()))
    loss.backward()
    assert net[0].weight.grad.abs().sum() > 0
    assert net[6].weight.grad is None  # it feeds only the last, excluded, layer


def test_rates_and_entropies():
    net, x = _net(), _input()
    spikes = _record(net, x)
    wsdr = WSDRRegularizer(net)
    net(x)
    rates, entropies = wsdr.firing_rates(), wsdr.entropies()
    assert rates.keys() == entropies.keys() >= {"3", "5"}
    for i, name in enumerate(["1", "3", "5", "7"]):
        if name in rates:
            p = ref.firing_rate(spikes[i])
            assert isinstance(rates[name], float)
            assert rates[name] == pytest.approx(p, abs=1e-6)
            assert entropies[name] == pytest.approx(ref.entropy(p), abs=1e-5)


# ------------------------------------------------------------------ ways to run a network


def test_single_step_loop_accumulates_until_the_reset():
    net, x = _net(step_mode="s"), _input()
    multi = _net()
    multi.load_state_dict(net.state_dict())
    expected = _expected(_record(multi, x), strength=1.0)
    wsdr = WSDRRegularizer(net, strength=1.0)
    for _ in range(3):  # a training loop: each batch counts for itself
        for step in x:
            net(step)
        loss = wsdr()
        assert _close(loss, expected)
        loss.backward()
        functional.reset_net(net)
    for step in x:
        net(step)
    functional.reset_net(net)  # and a batch whose term was never taken is forgotten
    for step in -x:
        net(step)
    functional.reset_net(net)
    for step in x:
        net(step)
    assert _close(wsdr(), expected)


def test_multi_step_calls_count_the_last_batch_only():
    net, x = _net(), _input()
    spikes = _record(net, x)
    wsdr = WSDRRegularizer(net, strength=1.0)
    net(-x)
    wsdr()
    functional.reset_net(net)
    net(x)
    assert _close(wsdr(), _expected(spikes, strength=1.0))


def test_batches_of_different_sizes():
    net, x = _net(), _input()
    wsdr = WSDRRegularizer(net, strength=1.0)
    for size in (3, 1, 2):
        spikes = _record(net, x[:, :size])
        functional.reset_net(net)
        net(x[:, :size])
        assert _close(wsdr(), _expected(spikes, strength=1.0))
        functional.reset_net(net)


@pytest.mark.parametrize("kind", [QLeaky, snn.Leaky], ids=["quantized", "float"])
def test_snntorch_loop(kind):
    """Tuples and bare spikes both count; the last layer's membrane is no spike."""
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Linear(6, 8), kind(0.7, init_hidden=True), nn.Linear(8, 7), kind(0.7, init_hidden=True),
        nn.Linear(7, 9), kind(0.7, init_hidden=True), nn.Linear(9, 4),
        kind(0.7, init_hidden=True, output=True),
    )  # fmt: skip
    x = _input()
    caught = {1: [], 3: [], 5: [], 7: []}
    handles = [
        net[i].register_forward_hook(
            lambda m, a, out, i=i: caught[i].append(
                (out[0] if isinstance(out, tuple) else out).detach().numpy()
            )
        )
        for i in caught
    ]
    for step in x:
        net(step)
    utils.reset(net)
    for handle in handles:
        handle.remove()
    spikes = [np.stack(caught[i]) for i in caught]
    for exclude, hidden in (("ends", slice(1, -1)), (None, slice(None))):
        with WSDRRegularizer(net, strength=1.0, exclude=exclude) as wsdr:
            for _ in range(2):
                for step in x:
                    net(step)
                loss = wsdr()
                assert _close(loss, _expected(spikes, hidden, strength=1.0))
                loss.backward()
                utils.reset(net)


def test_snntorch_reset_forgets_a_batch_that_was_not_taken():
    """An evaluation between two training steps leaves no trace in the loss."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 8), QLeaky(0.7, init_hidden=True, bits=2))
    wsdr = WSDRRegularizer(net, strength=1.0, exclude=None)
    x = _input()

    def run(x):
        utils.reset(net)
        for step in x:
            net(step)

    run(x)
    expected = wsdr().item()
    with torch.no_grad():
        run(-x)
    run(x)
    assert _close(wsdr(), expected)


class _Explicit(nn.Module):
    """snnTorch's usual model: the loop and the membranes are its own."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lif1 = nn.Linear(6, 8), QLeaky(0.7, bits=2)
        self.lin2, self.lif2 = nn.Linear(8, 7), QLeaky(0.7, bits=2)
        self.lin3, self.lif3 = nn.Linear(7, 4), QLeaky(0.7, bits=2)

    def forward(self, x, keep=None):
        m1, m2, m3 = self.lif1.reset_mem(), self.lif2.reset_mem(), self.lif3.reset_mem()
        out = []
        for step in x:
            s1, m1 = self.lif1(self.lin1(step), m1)
            s2, m2 = self.lif2(self.lin2(s1), m2)
            s3, m3 = self.lif3(self.lin3(s2), m3)
            out.append(s3)
            if keep is not None:
                keep.append(s2.detach().numpy())
        return torch.stack(out)


def test_snntorch_model_with_its_own_membranes():
    """`reset_mem` opens a new sequence: the second batch is not averaged with the first."""
    torch.manual_seed(4)
    net, x = _Explicit(), _input()
    wsdr = WSDRRegularizer(net, strength=1.0)
    for batch in (x, -x, x):
        keep = []
        net(batch, keep)
        assert _close(wsdr(), _expected([np.stack(keep)], slice(None), strength=1.0))


class _TwoMembranes(nn.Module):
    """One neuron on two currents with a membrane each, among the documented styles."""

    def __init__(self, start):
        super().__init__()
        self.one, self.two, self.lif = nn.Linear(6, 8), nn.Linear(6, 8), QLeaky(0.7, bits=2)
        self.start = start

    def forward(self, x, keep):
        a, b = self.start(self.lif, x), self.start(self.lif, x)
        for step in x:
            s, a = self.lif(self.one(step), a)
            r, b = self.lif(self.two(step), mem=b)
            keep += [s.detach().numpy(), r.detach().numpy()]


@pytest.mark.parametrize(
    "start",
    [lambda lif, x: lif.init_leaky(), lambda lif, x: torch.zeros(x.shape[1], 8)],
    ids=["init_leaky", "zeros"],
)
def test_one_neuron_with_two_membranes_counts_both(start):
    torch.manual_seed(3)
    net, x = _TwoMembranes(start), _input()
    wsdr = WSDRRegularizer(net, strength=1.0, exclude=None)
    for sign in (1, -1):
        keep = []
        net(sign * x, keep)
        assert _close(wsdr(), _expected([np.stack(keep)], slice(None), strength=1.0))


class _Reused(nn.Module):
    """One neuron in two places of one pass, and what happens to its state between them."""

    def __init__(self, lif, between):
        super().__init__()
        self.one, self.two, self.lif = nn.Linear(6, 8), nn.Linear(6, 8), lif
        self.between = between

    def forward(self, x, keep):
        keep.append(self.lif(self.one(x)).detach().numpy().reshape(-1))
        x = self.between(self, x)
        keep.append(self.lif(self.two(x)).detach().numpy().reshape(-1))


def _reset_between(net, x):
    functional.reset_net(net)
    utils.reset(net)
    return x


@pytest.mark.parametrize(
    "between", [_reset_between, lambda net, x: x[:, :4]], ids=["reset", "another batch size"]
)
@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_what_happens_within_a_pass_begins_nothing(host, between):
    torch.manual_seed(3)
    lif = QuantLIFNode(step_mode="m") if host == "spikingjelly" else QLeaky(0.7, init_hidden=True)
    net, x = _Reused(lif, between), _input()
    for layer_ in (net.one, net.two):
        nn.init.normal_(layer_.weight, 0.3, 1.0)
    wsdr = WSDRRegularizer(net, strength=1.0, exclude=None)
    for sign in (1, -1):
        keep = []
        net(sign * x, keep)
        rate = np.concatenate(keep)
        assert _close(wsdr(), _expected([rate], slice(None), strength=1.0))
        functional.reset_net(net)
        utils.reset(net)


def test_a_pass_that_fails_ends():
    net, x = _net(), _input()
    expected = _expected(_record(net, x), strength=1.0)
    wsdr = WSDRRegularizer(net, strength=1.0)
    with pytest.raises(RuntimeError):
        net(torch.ones(T, N, 3))
    net(-x)
    functional.reset_net(net)
    net(x)
    assert _close(wsdr(), expected)


def test_evaluation_under_no_grad():
    net, x = _net(), _input()
    wsdr = WSDRRegularizer(net, strength=1.0)
    with torch.no_grad():
        net(x)
        loss = wsdr()
    assert not loss.requires_grad
    functional.reset_net(net)
    net(x)
    assert wsdr().requires_grad


# ------------------------------------------------------------------ life cycle


def test_called_before_any_forward():
    wsdr = WSDRRegularizer(_net())
    for ask in (wsdr, wsdr.firing_rates, wsdr.entropies):
        with pytest.raises(QSNNError, match="model"):
            ask()


@pytest.mark.parametrize("net", [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 2), nn.ReLU())])
def test_no_spiking_layer(net):
    with pytest.raises(QSNNError, match="spiking"):
        WSDRRegularizer(net)


def test_ends_of_a_network_without_hidden_layers():
    """Two layers are both ends: nothing would be regularized, and silence would hide it."""
    with pytest.raises(QSNNError):
        WSDRRegularizer(_net(depth=2))


def test_close_takes_the_hooks_off():
    net, x = _net(), _input()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
    wsdr = WSDRRegularizer(net)
    net(x)
    wsdr.close()
    wsdr.close()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == before
    with WSDRRegularizer(net) as inner:
        net(x)
        inner()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()] == before


def test_output_is_not_touched():
    net, x = _net(), _input()
    plain = net(x)
    functional.reset_net(net)
    with WSDRRegularizer(net):
        assert torch.equal(net(x), plain)


@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_model_survives_copying(copier, used):
    """A copy runs, and what runs through it is not counted for the original."""
    net, x = _net(), _input()
    wsdr = WSDRRegularizer(net, strength=1.0)
    if used:
        net(x)
        wsdr().backward()
        functional.reset_net(net)
    twin = copier(net)
    functional.reset_net(twin)
    net(x)
    before, rates = wsdr().item(), wsdr.firing_rates()
    twin(-x)
    assert wsdr().item() == before
    assert wsdr.firing_rates() == rates
    functional.reset_net(net)
    functional.reset_net(twin)
    assert torch.equal(twin(x), net(x))


def test_two_regularizers_do_not_disturb_each_other():
    net, x = _net(), _input()
    spikes = _record(net, x)
    one = WSDRRegularizer(net, strength=1.0)
    two = WSDRRegularizer(net, strength=2.0, exclude=None)
    net(x)
    assert _close(one(), _expected(spikes, strength=1.0))
    assert _close(two(), _expected(spikes, slice(None), strength=2.0))


def test_a_training_step_drives_the_rate_towards_the_target():
    net, x = _net(lambda: QuantLIFNode(surrogate_function=F.triangle)), _input()
    optimizer = torch.optim.SGD(net.parameters(), lr=2.0)
    wsdr = WSDRRegularizer(net, strength=1.0)
    losses = []
    for _ in range(40):
        functional.reset_net(net)
        net(x)
        loss = wsdr()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_dropped_regularizer_does_not_keep_the_graph():
    net, x = _net(), _input()
    wsdr = WSDRRegularizer(net)
    net(x)
    wsdr().backward()
    wsdr.close()
    del wsdr
    functional.reset_net(net)
    gc.collect()
    assert not any(m._forward_hooks for m in net.modules())


# ------------------------------------------------------------------ the sign's schedule


def _annealed():
    return nn.Sequential(
        BinaryLinear(4, 3, preset="official"), nn.ReLU(),
        BinaryLinear(3, 3, quantizer=BinaryWeight(gradient="annealed")),
        BinaryLinear(3, 2, preset="paper"),
    )  # fmt: skip


def _temperatures(net):
    return [float(net[i].quantizer.temperature) for i in (0, 2)]


@pytest.mark.parametrize("epochs", [2, 7, 100])
def test_temperature_rises_on_a_log_scale(epochs):
    net = _annealed()
    schedule = SignGradientSchedule(net, epochs, start=0.1, end=10.0)
    seen = [_temperatures(net)]
    for _ in range(epochs):
        schedule.step()
        seen.append(_temperatures(net))
    assert all(a == b for a, b in seen)
    t = [a for a, _ in seen]
    assert t[0] == pytest.approx(0.1)
    assert pytest.approx(max(t)) == 10.0
    assert t[-1] == pytest.approx(10.0)
    ratios = [b / a for a, b in pairwise(t) if b != pytest.approx(a)]
    assert len(ratios) >= epochs - 1
    assert all(r == pytest.approx(ratios[0]) for r in ratios)
    assert ratios[0] > 1
    schedule.step()
    assert _temperatures(net)[0] == pytest.approx(10.0)


def test_schedule_changes_the_gradient_used():
    net = _annealed()
    schedule = SignGradientSchedule(net, 4)
    w = torch.full((3, 4), 0.3) * torch.tensor([1.0, -1.0, 0.5, 0.2])
    gradients = []
    for _ in range(3):
        wt = w.double().requires_grad_()
        g = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
        (gw,) = torch.autograd.grad(net[0].quantizer(wt), wt, g)
        expected = ref.binary_weight_gradient(
            w.double().numpy(), g.numpy(), "channel", "power_of_two", "annealed",
            float(net[0].quantizer.temperature),
        )  # fmt: skip
        np.testing.assert_allclose(gw.numpy(), expected, rtol=1e-4, atol=1e-7)
        gradients.append(gw)
        schedule.step()
    assert not torch.allclose(gradients[0], gradients[1])


def test_schedule_resumes():
    one, two = _annealed(), _annealed()
    first = SignGradientSchedule(one, 10)
    for _ in range(4):
        first.step()
    state = pickle.loads(pickle.dumps(first.state_dict()))
    second = SignGradientSchedule(two, 10)
    second.load_state_dict(state)
    assert _temperatures(two) == _temperatures(one)
    first.step()
    second.step()
    assert _temperatures(two) == _temperatures(one)
    assert _temperatures(one)[0] == pytest.approx(0.1 * 100 ** (5 / 9))


def test_schedule_arguments_are_checked():
    for arguments in ((0,), (-1,), (5, 0.0, 10.0), (5, 0.1, -1.0), (5, math.nan, 1.0)):
        with pytest.raises(QSNNError):
            SignGradientSchedule(_annealed(), *arguments)
