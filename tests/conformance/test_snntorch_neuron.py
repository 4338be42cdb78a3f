"""What snnTorch expects of any ``Leaky``, asked of ``QLeaky``.

Where results must differ, because the membrane potential is quantized, the test asks for the
structure of the answer; where ``bits=None``, for the host's answer bit for bit.
"""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

snn = pytest.importorskip("snntorch")
from snntorch import functional as SF  # noqa: E402
from snntorch import spikegen, surrogate, utils  # noqa: E402
from snntorch.functional import probe  # noqa: E402

from qsnn_ext.layers import BinaryLinear  # noqa: E402
from qsnn_ext.snntorch import QLeaky, Triangle  # noqa: E402

T, N, K = 6, 4, 5


@pytest.fixture(autouse=True)
def _no_neuron_stays_behind():
    """The host keeps every neuron ever made on a list."""
    before = list(snn.SpikingNeuron.instances)
    yield
    snn.SpikingNeuron.instances[:] = before


@pytest.fixture
def x_seq():
    return 2 * torch.randn(T, N, K, generator=torch.Generator().manual_seed(1)) + 0.8


def rollout(neuron, x_seq):
    """Spikes and membrane potentials of all steps, the state passed by hand."""
    mem = torch.zeros_like(x_seq[0])
    spikes, potentials = [], []
    for x in x_seq:
        spk, mem = neuron(x, mem)
        spikes.append(spk)
        potentials.append(mem)
    return torch.stack(spikes), torch.stack(potentials)


mechanisms = pytest.mark.parametrize("mechanism", ["subtract", "zero", "none"])
delays = pytest.mark.parametrize("delay", [True, False], ids=["delayed", "immediate"])
orders = pytest.mark.parametrize("order", ["fire_first", "quantize_first"])
modes = pytest.mark.parametrize("mode", ["dynamic", "frozen"])


def leaky(mode="dynamic", **options):
    neuron = QLeaky(beta=options.pop("beta", 0.9), mode=mode, **options)
    if mode == "frozen":
        # Above the threshold: a potential quantized before firing reaches no further than this.
        neuron.membrane.freeze(1.6)
        neuron.eval()
    return neuron


# --------------------------------------------------------------------------- reset mechanisms


@mechanisms
@delays
@pytest.mark.parametrize("bits", [None, 32])
def test_float_membrane_is_leaky(mechanism, delay, bits, x_seq):
    results = []
    for neuron in (
        QLeaky(0.9, reset_mechanism=mechanism, reset_delay=delay, bits=bits),
        snn.Leaky(0.9, reset_mechanism=mechanism, reset_delay=delay),
    ):
        x = x_seq.clone().requires_grad_()
        spikes, potentials = rollout(neuron, x)
        (spikes.sum() + potentials.square().sum()).backward()
        results.append((spikes.detach(), potentials.detach(), x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@mechanisms
@delays
@orders
@modes
def test_reset_mechanisms(mechanism, delay, order, mode, x_seq):
    """Binary spikes, finite gradients, and a state other than the float neuron's."""
    neuron = leaky(mode, reset_mechanism=mechanism, reset_delay=delay, order=order)
    x = x_seq.clone().requires_grad_()
    spikes, potentials = rollout(neuron, x)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    (spikes.sum() + potentials.square().sum()).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.count_nonzero(x.grad) > 0
    _, reference = rollout(snn.Leaky(0.9, reset_mechanism=mechanism, reset_delay=delay), x_seq)
    assert not torch.equal(potentials.detach(), reference)


@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
@orders
@modes
def test_one_spike_is_followed_by_one_reset(mechanism, order, mode, x_seq):
    """With the reset delayed, the next step resets exactly the neurons that have fired."""
    neuron = leaky(mode, reset_mechanism=mechanism, order=order)
    mem = torch.zeros(N, K)
    fired = torch.zeros(N, K)
    for x in x_seq:
        # The host's rule: a step resets what the state handed to it says has fired.
        assert torch.equal(neuron.mem_reset(mem), fired)
        spk, mem = neuron(x, mem)
        fired = spk.detach()
    assert fired.any()


@modes
def test_immediate_reset_to_zero_leaves_fired_neurons_at_zero(mode, x_seq):
    neuron = leaky(mode, reset_mechanism="zero", reset_delay=False)
    spikes, potentials = rollout(neuron, x_seq)
    assert spikes.any()
    assert torch.count_nonzero(potentials[spikes > 0]) == 0


def test_unknown_reset_mechanism_is_refused():
    with pytest.raises(ValueError, match="reset_mechanism"):
        QLeaky(0.9, reset_mechanism="hard")


# --------------------------------------------------------------------------- calling styles


@pytest.mark.parametrize("init_hidden", [False, True])
@pytest.mark.parametrize("output", [False, True])
@pytest.mark.parametrize("bits", [None, 2])
def test_what_forward_returns_is_what_leaky_returns(init_hidden, output, bits, x_seq):
    ours = QLeaky(0.9, init_hidden=init_hidden, output=output, bits=bits)
    theirs = snn.Leaky(0.9, init_hidden=init_hidden, output=output)
    answers = [neuron(x_seq[0]) for neuron in (ours, theirs)]
    assert type(answers[0]) is type(answers[1])
    if isinstance(answers[0], tuple):
        assert [a.shape for a in answers[0]] == [a.shape for a in answers[1]]


@pytest.mark.parametrize("bits", [None, 2])
def test_mem_with_init_hidden_is_refused(bits, x_seq):
    neuron = QLeaky(0.9, init_hidden=True, bits=bits)
    with pytest.raises(TypeError, match="init_hidden"):
        neuron(x_seq[0], torch.zeros(N, K))


@mechanisms
@modes
def test_calling_styles_agree(mechanism, mode, x_seq):
    """State by hand, state kept by the neuron, and ``reset_mem()`` with calls without ``mem``."""
    options = {"reset_mechanism": mechanism, "mode": mode}
    by_hand, _ = rollout(leaky(**options), x_seq)
    hidden = leaky(init_hidden=True, **options)
    kept = torch.stack([hidden(x) for x in x_seq])
    implicit = leaky(**options)
    implicit.reset_mem()
    unnamed = torch.stack([implicit(x)[0] for x in x_seq])
    assert torch.equal(by_hand, kept)
    assert torch.equal(by_hand, unnamed)


def test_sequential_with_output_on_the_last(x_seq):
    net = nn.Sequential(
        BinaryLinear(K, 8),
        QLeaky(0.9, init_hidden=True),
        nn.Sequential(nn.Linear(8, 3), QLeaky(0.9, init_hidden=True, output=True)),
    )
    first = [net(x) for x in x_seq]
    assert first[0][0].shape == (N, 3)
    reset_all()
    second = [net(x) for x in x_seq]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))


def reset_all():
    snn.Leaky.reset_hidden()
    snn.Leaky.detach_hidden()


def test_one_neuron_carrying_two_populations(x_seq):
    """The state passed by hand is the only one that counts."""
    shared, alone = leaky("frozen"), leaky("frozen")
    a = b = torch.zeros(N, K)
    spikes = []
    for x in x_seq:
        spk, a = shared(x, a)
        _, b = shared(-x, b)
        spikes.append(spk)
    assert torch.equal(torch.stack(spikes), rollout(alone, x_seq)[0])


# --------------------------------------------------------------------------- reset and detach


def test_utils_reset_finds_ours_among_the_children(x_seq):
    net = nn.Sequential(nn.Linear(K, 3), QLeaky(0.5, init_hidden=True))
    first = torch.stack([net(x) for x in x_seq])
    assert torch.count_nonzero(net[1].mem) > 0
    utils.reset(net)
    assert torch.count_nonzero(net[1].mem) == 0
    assert not net[1].mem.requires_grad
    assert torch.equal(torch.stack([net(x) for x in x_seq]), first)


def test_utils_reset_with_a_nested_neuron(x_seq):
    """It looks at direct children only, but one of them is enough to reset them all."""
    net = nn.Sequential(
        nn.Sequential(nn.Linear(K, 3), QLeaky(0.5, init_hidden=True)),
        QLeaky(0.5, init_hidden=True),
    )
    for x in x_seq:
        net(x)
    utils.reset(net)
    assert torch.count_nonzero(net[0][1].mem) == 0


def test_class_methods_reach_every_instance(x_seq):
    neurons = [QLeaky(0.5, init_hidden=True), snn.Leaky(0.5, init_hidden=True)]
    x = x_seq.clone().requires_grad_()
    for neuron in neurons:
        neuron(x[0])
        assert neuron.mem.requires_grad
    snn.Leaky.detach_hidden()
    assert not any(neuron.mem.requires_grad for neuron in neurons)
    assert all(torch.count_nonzero(neuron.mem) > 0 for neuron in neurons)
    QLeaky.reset_hidden()
    assert all(torch.count_nonzero(neuron.mem) == 0 for neuron in neurons)


@pytest.mark.parametrize("make", [lambda n: n.reset_mem(), lambda n: n.init_leaky()])
def test_reset_mem_returns_zeros(make, x_seq):
    neuron = QLeaky(0.5)
    neuron(x_seq[0], torch.zeros(N, K))
    mem = make(neuron)
    assert mem.shape == (N, K)
    assert torch.count_nonzero(mem) == 0


def test_new_batch_size_restarts_the_state(x_seq):
    neuron = QLeaky(0.5, init_hidden=True)
    neuron(x_seq[0])
    neuron(x_seq[0, :1])
    assert neuron.mem.shape == (1, K)


def test_instances_hold_the_neuron_once():
    neuron = QLeaky(0.5)
    assert sum(other is neuron for other in snn.SpikingNeuron.instances) == 1


# --------------------------------------------------------------------------- parameters


@mechanisms
@delays
def test_learnable_parameters_get_gradients(mechanism, delay, x_seq):
    neuron = QLeaky(
        torch.full((K,), 0.8),
        threshold=torch.full((K,), 0.9),
        learn_beta=True,
        learn_threshold=True,
        reset_mechanism=mechanism,
        reset_delay=delay,
        graded_spikes_factor=torch.full((K,), 1.0),
        learn_graded_spikes_factor=True,
        bits=4,
    )
    spikes, _ = rollout(neuron, x_seq)
    (spikes * torch.rand_like(spikes)).sum().backward()
    for name in ("beta", "threshold", "graded_spikes_factor"):
        parameter = getattr(neuron, name)
        assert isinstance(parameter, nn.Parameter), name
        assert torch.isfinite(parameter.grad).all(), name
        assert torch.count_nonzero(parameter.grad) > 0, name


@mechanisms
@delays
def test_graded_spikes_have_the_factor_as_height(mechanism, delay, x_seq):
    """And leave the membrane potential alone."""
    graded, plain = (
        leaky("frozen", reset_mechanism=mechanism, reset_delay=delay, graded_spikes_factor=f)
        for f in (2.5, 1.0)
    )
    spikes, potentials = rollout(graded, x_seq)
    expected, expected_potentials = rollout(plain, x_seq)
    assert torch.equal(spikes, 2.5 * expected)
    assert torch.equal(potentials, expected_potentials)


@pytest.mark.parametrize("delay", [True, False])
def test_inhibition_lets_at_most_one_fire(delay, x_seq):
    with pytest.warns(UserWarning, match="Inhibition"):
        neuron = QLeaky(0.9, inhibition=True, reset_delay=delay)
    spikes, _ = rollout(neuron, x_seq)
    assert spikes.sum(-1).max() == 1


def test_beta_is_clamped_as_in_leaky(x_seq):
    assert torch.equal(
        rollout(leaky("frozen", beta=1.7), x_seq)[0], rollout(leaky("frozen", beta=1.0), x_seq)[0]
    )


def test_leaky_checkpoint_loads_strictly_and_back():
    theirs, ours = snn.Leaky(0.7, threshold=0.5, learn_beta=True), QLeaky(0.1, learn_beta=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.beta == theirs.beta
    assert ours.threshold == theirs.threshold
    snn.Leaky(0.2, learn_beta=True).load_state_dict(ours.state_dict(), strict=True)


def test_surrogate_disable(x_seq):
    neuron = QLeaky(0.9, surrogate_disable=True)
    spikes, _ = rollout(neuron, x_seq)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}
    assert not spikes.requires_grad


SURROGATES = {
    "atan": surrogate.atan(),
    "fast_sigmoid": surrogate.fast_sigmoid(),
    "sigmoid": surrogate.sigmoid(),
    "heaviside": surrogate.heaviside(),
    "straight_through_estimator": surrogate.straight_through_estimator(),
    "triangular": surrogate.triangular(),
    "spike_rate_escape": surrogate.spike_rate_escape(),
    "LSO": surrogate.LSO(),
    "SFS": surrogate.SFS(),
    "Triangle": Triangle(),
}


@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates(name, x_seq):
    """The same gradient as Leaky's where one step is all there is."""

    def gradient(neuron):
        x = x_seq[0].clone().requires_grad_()
        neuron(x, torch.zeros(N, K))[0].sum().backward()
        return x.grad

    try:
        expected = gradient(snn.Leaky(0.9, spike_grad=SURROGATES[name]))
    except TypeError as error:
        pytest.skip(f"not with the host's Leaky either: {error}")
    torch.testing.assert_close(gradient(QLeaky(0.9, spike_grad=SURROGATES[name])), expected)
    spikes, _ = rollout(QLeaky(0.9, spike_grad=SURROGATES[name]), x_seq)
    assert set(spikes.unique().tolist()) == {0.0, 1.0}


def test_stochastic_surrogate(x_seq):
    """``SSO`` fires at random, so only that it runs and differentiates can be asked."""
    x = x_seq.clone().requires_grad_()
    rollout(QLeaky(0.9, spike_grad=surrogate.SSO()), x)[0].sum().backward()
    assert torch.isfinite(x.grad).all()


# --------------------------------------------------------------------------- losses, accuracy


class Net(nn.Module):
    """The host's tutorial network, quantized: state by hand, static input shown ``T`` times."""

    def __init__(self):
        super().__init__()
        self.fc1 = BinaryLinear(K, 12)
        self.lif1 = QLeaky(0.9, bits=4)
        self.fc2 = nn.Linear(12, 3)
        self.lif2 = QLeaky(0.9, bits=4)

    def forward(self, x):
        mem1, mem2 = self.lif1.reset_mem(), self.lif2.reset_mem()
        spikes, potentials = [], []
        for _ in range(T):
            spk1, mem1 = self.lif1(self.fc1(x), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spikes.append(spk2)
            potentials.append(mem2)
        return torch.stack(spikes), torch.stack(potentials)


LOSSES = {
    "ce_rate_loss": (lambda: SF.ce_rate_loss(), 0),
    "ce_count_loss": (lambda: SF.ce_count_loss(), 0),
    "ce_max_membrane_loss": (lambda: SF.ce_max_membrane_loss(), 1),
    "mse_count_loss": (lambda: SF.mse_count_loss(correct_rate=0.8, incorrect_rate=0.2), 0),
    "mse_membrane_loss": (lambda: SF.mse_membrane_loss(), 1),
    "mse_temporal_loss": (lambda: SF.mse_temporal_loss(), 0),
    "ce_temporal_loss": (lambda: SF.ce_temporal_loss(), 0),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_train_the_network(name):
    torch.manual_seed(0)
    make, which = LOSSES[name]
    net, x, y = Net(), 3 * torch.rand(12, K), torch.arange(12) % 3
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = make()(net(x)[which], y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-5:]) < losses[0]


def test_accuracy_functions():
    """All spikes of the right class, from the first step on, are a perfect answer."""
    y = torch.tensor([0, 1, 2, 1])
    drive = 5 * torch.nn.functional.one_hot(y, 3).float().repeat(T, 1, 1)
    spikes, _ = rollout(QLeaky(0.9), drive)
    assert SF.acc.accuracy_rate(spikes, y) == 1.0
    assert SF.acc.accuracy_temporal(spikes, y) == 1.0
    assert SF.acc.accuracy_rate(spikes, (y + 1) % 3) == 0.0
    population = spikes.repeat_interleave(2, dim=-1)
    assert SF.acc.accuracy_rate(population, y, population_code=True, num_classes=3) == 1.0


def test_sparsity_regularizer():
    x = torch.ones(T, N, K, requires_grad=True)
    spikes, _ = rollout(QLeaky(0.9), x)
    SF.reg.l1_rate_sparsity(1e-3)(spikes).backward()
    assert torch.count_nonzero(x.grad) > 0


# --------------------------------------------------------------------------- probes


def test_output_probe(x_seq):
    net = nn.Sequential(nn.Linear(K, 3), QLeaky(0.9, init_hidden=True))
    for instance in (QLeaky, snn.Leaky):
        recorded = probe.OutputMonitor(net, instance=instance)
        utils.reset(net)
        expected = [net(x) for x in x_seq]
        assert recorded.monitored_layers == ["1"]
        assert all(torch.equal(a, b) for a, b in zip(recorded["1"], expected, strict=True))
        recorded.remove_hooks()


def test_input_probe(x_seq):
    net = nn.Sequential(nn.Linear(K, 3), QLeaky(0.9, init_hidden=True))
    recorded = probe.InputMonitor(net, instance=QLeaky)
    net(x_seq[0])
    assert torch.equal(recorded["1"][0], net[0](x_seq[0]))
    recorded.remove_hooks()


def test_attribute_probe_reads_the_quantized_potential(x_seq):
    """Without a reset the stored potential is the quantized one itself."""
    net = nn.Sequential(nn.Linear(K, 3), QLeaky(0.9, init_hidden=True, reset_mechanism="none"))
    recorded = probe.AttributeMonitor("mem", False, net, instance=QLeaky)
    for x in x_seq:
        net(x)
    assert len(recorded["1"]) == T
    assert all(len(mem.unique()) <= 3 for mem in recorded["1"])
    recorded.remove_hooks()


@pytest.mark.parametrize("name", ["GradInputMonitor", "GradOutputMonitor"])
def test_gradient_probes(name, x_seq):
    net = nn.Sequential(nn.Linear(K, 3), QLeaky(0.9, init_hidden=True))
    recorded = getattr(probe, name)(net, instance=QLeaky)
    net(x_seq[0]).sum().backward()
    assert recorded["1"][0].shape == (N, 3)
    recorded.remove_hooks()


# --------------------------------------------------------------------------- training helpers


@pytest.mark.parametrize("name", ["BPTT", "TBPTT", "RTRL"])
def test_backprop_helpers(name):
    """They find the neuron by its class: the last layer's two answers, resets between batches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from snntorch import backprop

    def trained(neuron, layer):
        torch.manual_seed(0)
        net = nn.Sequential(layer(K, 3), neuron(0.9, init_hidden=True, output=True))
        before = net[0].weight.detach().clone()
        data = TensorDataset(torch.rand(8, K) * 3, torch.arange(8) % 3)
        options = {"K": 2} if name == "TBPTT" else {}
        loss = getattr(backprop, name)(
            net,
            DataLoader(data, batch_size=4),
            torch.optim.SGD(net.parameters(), lr=0.1),
            SF.ce_rate_loss(),
            num_steps=4,
            time_var=False,
            **options,
        )
        return loss, not torch.equal(before, net[0].weight)

    try:
        trained(snn.Leaky, nn.Linear)
    except Exception as error:
        pytest.skip(f"not with the host's Leaky either: {type(error).__name__}: {error}")
    loss, moved = trained(QLeaky, BinaryLinear)
    assert torch.isfinite(torch.as_tensor(loss))
    assert moved


@pytest.mark.parametrize(
    "encode",
    [
        lambda x: spikegen.rate(x, num_steps=T),
        lambda x: spikegen.latency(x, num_steps=T, normalize=True, linear=True),
        lambda x: spikegen.delta(x.repeat(T, 1, 1) * torch.arange(T).view(-1, 1, 1), threshold=0.1),
    ],
    ids=["rate", "latency", "delta"],
)
def test_spike_encodings_as_input(encode):
    encoded = encode(torch.rand(N, K))
    net = nn.Sequential(BinaryLinear(K, 3), QLeaky(0.9, init_hidden=True, output=True))
    spikes = torch.stack([net(x)[0] for x in encoded])
    assert spikes.shape == (T, N, 3)
    assert set(spikes.unique().tolist()) <= {0.0, 1.0}


# --------------------------------------------------------------------------- tonic


@pytest.mark.parametrize("host", ["spikingjelly", "snntorch"])
def test_tonic_frames_feed_the_networks(host):
    """Events to frames ``[T, P, H, W]`` by tonic, batched time first, through both hosts."""
    pytest.importorskip("tonic")
    pytest.importorskip(host)
    import numpy as np
    from tonic import collation, transforms

    from qsnn_ext import models

    rng = np.random.default_rng(0)
    events = np.zeros(2000, [("x", int), ("y", int), ("t", int), ("p", int)])
    events["x"], events["y"] = rng.integers(16, size=(2, 2000))
    events["t"] = np.sort(rng.integers(100_000, size=2000))
    events["p"] = rng.integers(2, size=2000)
    frames = transforms.ToFrame(sensor_size=(16, 16, 2), n_time_bins=T)(events)
    collate = collation.PadTensors(batch_first=False)
    batch, _ = collate([(frames.astype(np.float32), 0), (frames.astype(np.float32), 1)])
    assert batch.shape == (T, 2, 2, 16, 16)
    net = models.vggsnn(width=0.05, bits="1w-2u", host=host)
    assert net(batch.float()).shape == (T, 2, 10)
