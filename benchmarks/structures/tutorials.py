"""The ways in which snnTorch's tutorials write a network."""

from __future__ import annotations

from collections.abc import Callable

import snntorch as snn
import torch
from snntorch import surrogate, utils
from torch import Tensor, nn

from benchmarks.structures import Built, structure

batch_size = 4


def _loop(net: nn.Module, x: Tensor) -> Tensor:
    """Reset once, one call a step, what the last neuron gives besides its spikes."""
    utils.reset(net)
    if isinstance(net[0], nn.Sequential):
        # utils.reset looks at direct children only, then resets every neuron there is.
        snn.Leaky.reset_hidden()
        snn.Leaky.detach_hidden()
    return torch.stack([net(step)[1] for step in x])


# --------------------------------------------------------------------------- five habits


class Explicit(nn.Module):
    """A class that carries its membrane potentials by hand."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, hidden)
        self.lif1 = snn.Leaky(beta=0.9, learn_beta=True)
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif2 = snn.Leaky(beta=0.8, reset_mechanism="zero")
        self.fc3 = nn.Linear(hidden, 4)
        self.readout = snn.Leaky(beta=0.95, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 12]`` to ``[T, N, 4]``."""
        mem1 = self.lif1.reset_mem()
        mem2 = self.lif2.reset_mem()
        mem3 = self.readout.reset_mem()
        out = []
        for step in x:
            spk1, mem1 = self.lif1(self.fc1(step), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            _, mem3 = self.readout(self.fc3(spk2), mem3)
            out.append(mem3)
        return torch.stack(out)


class ResetMem(nn.Module):
    """``reset_mem()`` at the start, then calls without a membrane potential."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, hidden)
        self.lif1 = snn.Leaky(beta=0.9)
        self.fc2 = nn.Linear(hidden, 4)
        self.lif2 = snn.Leaky(beta=0.9, learn_threshold=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 12]`` to ``[T, N, 4]``."""
        self.lif1.reset_mem()
        self.lif2.reset_mem()
        out = []
        for step in x:
            spk1, _ = self.lif1(self.fc1(step))
            spk2, _ = self.lif2(self.fc2(spk1))
            out.append(spk2)
        return torch.stack(out)


class UsedTwice(nn.Module):
    """One neuron called with two membrane potentials in a step."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif = snn.Leaky(beta=0.9)
        self.fc3 = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 12]`` to ``[T, N, 4]``."""
        mem1 = mem2 = self.lif.reset_mem()
        out = []
        for step in x:
            spk1, mem1 = self.lif(self.fc1(step), mem1)
            spk2, mem2 = self.lif(self.fc2(spk1), mem2)
            out.append(self.fc3(spk2))
        return torch.stack(out)


def _vectors() -> Tensor:
    return torch.rand(3, 2, 12) * 3


@structure("Sequential with init_hidden", "snnTorch: utils.reset, then one call per step")
def sequential(small: bool = True) -> Built:
    hidden = 16 if small else 100
    model = nn.Sequential(
        nn.Linear(12, hidden),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(hidden, 4),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )
    return Built(model, _vectors(), _loop)


@structure("nested Sequentials", "snnTorch: Sequentials within a Sequential, trained beta")
def nested(small: bool = True) -> Built:
    h = 16 if small else 100
    model = nn.Sequential(
        nn.Sequential(nn.Linear(12, h), snn.Leaky(beta=0.9, init_hidden=True, learn_beta=True)),
        nn.Sequential(nn.Linear(h, h), nn.Sequential(snn.Leaky(beta=0.5, init_hidden=True))),
        nn.Linear(h, 4),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )
    return Built(model, _vectors(), _loop)


def _habit(kind: Callable[[int], nn.Module], small: bool) -> Built:
    return Built(kind(16 if small else 100), _vectors())


@structure("explicit mem, read-out", "snnTorch: membrane potentials by hand, trained beta")
def explicit(small: bool = True) -> Built:
    return _habit(Explicit, small)


@structure("reset_mem, calls without mem", "snnTorch: the neuron keeps its potential")
def reset_mem(small: bool = True) -> Built:
    return _habit(ResetMem, small)


@structure("one neuron used twice", "snnTorch: two membrane potentials, one neuron")
def used_twice(small: bool = True) -> Built:
    return _habit(UsedTwice, small)


# --------------------------------------------------------------------------- tutorials


class FeedForward(nn.Module):
    """Tutorials 3 and 5: the same image at every step, spikes and potentials recorded."""

    def __init__(self, inputs: int, hidden: int, outputs: int, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.fc1 = nn.Linear(inputs, hidden)
        self.lif1 = snn.Leaky(beta=0.95)
        self.fc2 = nn.Linear(hidden, outputs)
        self.lif2 = snn.Leaky(beta=0.95)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, inputs]`` to spikes and potentials ``[T, N, outputs]``."""
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec = []
        mem2_rec = []
        for _ in range(self.num_steps):
            cur1 = self.fc1(x)
            spk1, mem1 = self.lif1(cur1, mem1)
            cur2 = self.fc2(spk1)
            spk2, mem2 = self.lif2(cur2, mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec, dim=0), torch.stack(mem2_rec, dim=0)


class SpikeTrains(FeedForward):
    """Tutorial 3: the input is a spike train."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, N, inputs]`` to spikes and potentials ``[T, N, outputs]``."""
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        spk2_rec, mem2_rec = [], []
        for step in range(self.num_steps):
            spk1, mem1 = self.lif1(self.fc1(x[step]), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            spk2_rec.append(spk2)
            mem2_rec.append(mem2)
        return torch.stack(spk2_rec), torch.stack(mem2_rec)


@structure("tutorial 3", "snnTorch tutorial 3: feed-forward on spike trains")
def tutorial_3(small: bool = True) -> Built:
    hidden = 32 if small else 1000
    return Built(SpikeTrains(64, hidden, 10, 4), (torch.rand(4, 2, 64) < 0.4).float())


@structure("tutorial 5", "snnTorch tutorial 5: a static image at every step")
def tutorial_5(small: bool = True) -> Built:
    return Built(FeedForward(64, 32 if small else 1000, 10, 4), torch.rand(2, 64))


class ConvNet(nn.Module):
    """Tutorial 6: pooling of currents, ``view(batch_size, -1)``, one call per step."""

    def __init__(self, width: int) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid(slope=25)
        self.conv1 = nn.Conv2d(1, width, 5)
        self.lif1 = snn.Leaky(beta=0.5, spike_grad=grad)
        self.conv2 = nn.Conv2d(width, 2 * width, 5)
        self.lif2 = snn.Leaky(beta=0.5, spike_grad=grad)
        self.fc1 = nn.Linear(2 * width * 16, 10)
        self.lif3 = snn.Leaky(beta=0.5, spike_grad=grad)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 1, 28, 28]`` to spikes and potential ``[N, 10]``."""
        mem1 = self.lif1.init_leaky()
        mem2 = self.lif2.init_leaky()
        mem3 = self.lif3.init_leaky()
        cur1 = nn.functional.max_pool2d(self.conv1(x), 2)
        spk1, mem1 = self.lif1(cur1, mem1)
        cur2 = nn.functional.max_pool2d(self.conv2(spk1), 2)
        spk2, mem2 = self.lif2(cur2, mem2)
        cur3 = self.fc1(spk2.view(batch_size, -1))
        spk3, mem3 = self.lif3(cur3, mem3)
        return spk3, mem3


@structure("tutorial 6, class", "snnTorch tutorial 6: view(batch_size, -1)")
def tutorial_6_class(small: bool = True) -> Built:
    return Built(ConvNet(4 if small else 12), torch.rand(batch_size, 1, 28, 28))


def _forward_pass(net: nn.Module, data: Tensor) -> Tensor:
    """Tutorial 7: events step by step, spikes of the last layer."""
    spk_rec = []
    utils.reset(net)
    for step in range(data.size(0)):
        spk_out, _ = net(data[step])
        spk_rec.append(spk_out)
    return torch.stack(spk_rec)


def _convolutional(inputs: int, width: int, features: int) -> nn.Sequential:
    grad = surrogate.atan()
    return nn.Sequential(
        nn.Conv2d(inputs, width, 5),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.5, spike_grad=grad, init_hidden=True),
        nn.Conv2d(width, 2 * width, 5),
        nn.MaxPool2d(2),
        snn.Leaky(beta=0.5, spike_grad=grad, init_hidden=True),
        nn.Flatten(),
        nn.Linear(2 * width * features, 10),
        snn.Leaky(beta=0.5, spike_grad=grad, init_hidden=True, output=True),
    )


@structure("tutorial 6, Sequential", "snnTorch tutorial 6: the same image at every step")
def tutorial_6_sequential(small: bool = True) -> Built:
    x = torch.rand(1, 2, 1, 28, 28).expand(3, -1, -1, -1, -1)
    return Built(_convolutional(1, 4 if small else 12, 16), x.contiguous(), _forward_pass)


@structure("tutorial 7", "snnTorch tutorial 7: event frames, one call per step")
def tutorial_7(small: bool = True) -> Built:
    x = (torch.rand(4, 2, 2, 34, 34) < 0.3).float()
    return Built(_convolutional(2, 4 if small else 12, 25), x, _forward_pass)


class Population(nn.Module):
    """Population coding: fifty output neurons for each class."""

    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid()
        self.net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, hidden),
            snn.Leaky(beta=0.9, spike_grad=grad, init_hidden=True),
            nn.Linear(hidden, outputs),
            snn.Leaky(beta=0.9, spike_grad=grad, init_hidden=True, output=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 8, 8]`` to spikes ``[T, N, outputs]``."""
        utils.reset(self.net)
        return torch.stack([self.net(x)[0] for _ in range(3)])


@structure("population coding", "snnTorch: many output neurons per class")
def population(small: bool = True) -> Built:
    model = Population(16 if small else 128, 50 if small else 500)
    return Built(model, torch.rand(2, 1, 8, 8))


class Regression(nn.Module):
    """Regression tutorials: a memory of random thresholds, the potential is the answer."""

    def __init__(self, hidden: int, timesteps: int = 5) -> None:
        super().__init__()
        self.timesteps = timesteps
        self.fc1 = nn.Linear(1, hidden)
        self.lif1 = snn.Leaky(
            beta=torch.rand(hidden), threshold=torch.rand(hidden), learn_beta=True
        )
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif2 = snn.Leaky(
            beta=torch.rand(hidden), threshold=torch.rand(hidden), learn_beta=True
        )
        self.fc_out = nn.Linear(hidden, 1)
        self.li_out = snn.Leaky(
            beta=torch.rand(1), threshold=1.0, learn_beta=True, reset_mechanism="none"
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 1]`` to potentials ``[T, N, 1]``."""
        mem_1 = self.lif1.init_leaky()
        mem_2 = self.lif2.init_leaky()
        mem_3 = self.li_out.init_leaky()
        mem_3_rec = []
        for step in range(self.timesteps):
            cur_1 = self.fc1(x[step, :, :])
            spk_1, mem_1 = self.lif1(cur_1, mem_1)
            spk_2, mem_2 = self.lif2(self.fc2(spk_1), mem_2)
            _, mem_3 = self.li_out(self.fc_out(spk_2), mem_3)
            mem_3_rec.append(mem_3)
        return torch.stack(mem_3_rec)


@structure("regression", "snnTorch regression tutorials: random decays and thresholds")
def regression(small: bool = True) -> Built:
    return Built(Regression(16 if small else 128), torch.rand(5, 2, 1) * 4)


class RecurrentRegression(nn.Module):
    """Regression tutorial II: recurrent leaky neurons over a long sequence."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        grad = surrogate.fast_sigmoid()
        self.fc1 = nn.Linear(8, hidden)
        self.rlif1 = snn.RLeaky(
            beta=0.9, linear_features=hidden, spike_grad=grad, learn_beta=True, learn_threshold=True
        )
        self.fc2 = nn.Linear(hidden, hidden)
        self.rsyn = snn.RSynaptic(alpha=0.9, beta=0.8, linear_features=hidden, spike_grad=grad)
        self.fc3 = nn.Linear(hidden, 1)
        self.out = snn.Alpha(alpha=0.9, beta=0.8, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 8]`` to ``[N, 1]``."""
        spk1, mem1 = self.rlif1.init_rleaky()
        spk2, syn2, mem2 = self.rsyn.init_rsynaptic()
        exc, inh, mem3 = self.out.reset_mem()
        for x_t in x:
            spk1, mem1 = self.rlif1(self.fc1(x_t), spk1, mem1)
            spk2, syn2, mem2 = self.rsyn(self.fc2(spk1), spk2, syn2, mem2)
            _, exc, inh, mem3 = self.out(self.fc3(spk2), exc, inh, mem3)
        return mem3


@structure("regression, recurrent", "snnTorch regression tutorial II: RLeaky, RSynaptic, Alpha")
def regression_recurrent(small: bool = True) -> Built:
    return Built(RecurrentRegression(16 if small else 128), torch.rand(5, 2, 8) * 4)
