"""Cells that carry more than a membrane potential, of both hosts."""

from __future__ import annotations

import snntorch as snn
import torch
from snntorch import surrogate as snn_surrogate
from snntorch import utils
from spikingjelly.activation_based import functional, layer, neuron, rnn, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure


class ConvLSTMNet(nn.Module):
    """Convolutional spiking LSTM cells between pooling, a leaky classifier."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        grad = snn_surrogate.straight_through_estimator()
        self.conv = nn.Conv2d(2, width, 3, padding=1)
        self.lif0 = snn.Leaky(beta=0.5)
        self.sclstm1 = snn.SConv2dLSTM(width, width, 3, max_pool=2, spike_grad=grad)
        self.sclstm2 = snn.SConv2dLSTM(width, width, 3, avg_pool=2, spike_grad=grad)
        self.fc1 = nn.Linear(width * 9, classes)
        self.lif1 = snn.Leaky(beta=0.5, spike_grad=snn_surrogate.fast_sigmoid(slope=5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[T, N, 2, 12, 12]`` to spikes and membrane potentials ``[T, N, classes]``."""
        mem0 = self.lif0.init_leaky()
        syn1, mem1 = self.sclstm1.init_sconv2dlstm()
        syn2, mem2 = self.sclstm2.init_sconv2dlstm()
        mem3 = self.lif1.init_leaky()
        spk3_rec, mem3_rec = [], []
        for step in range(x.size(0)):
            spk0, mem0 = self.lif0(self.conv(x[step]), mem0)
            spk1, syn1, mem1 = self.sclstm1(spk0, syn1, mem1)
            spk2, syn2, mem2 = self.sclstm2(spk1, syn2, mem2)
            spk3, mem3 = self.lif1(self.fc1(spk2.flatten(1)), mem3)
            spk3_rec.append(spk3)
            mem3_rec.append(mem3)
        return torch.stack(spk3_rec), torch.stack(mem3_rec)


@structure("conv and SConv2dLSTM", "snnTorch's convolutional spiking LSTM on event frames")
def conv_lstm(small: bool = True) -> Built:
    return Built(ConvLSTMNet(8 if small else 32, 10), (torch.rand(3, 2, 2, 12, 12) < 0.3).float())


class ConvSLSTM(nn.Module):
    """A convolutional front end, then a spiking LSTM over its features."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, width, 3, stride=2, padding=1), nn.BatchNorm2d(width)
        self.lif1 = snn.Leaky(beta=0.9, init_hidden=True)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.lif2 = snn.Leaky(beta=0.9, init_hidden=True)
        self.slstm = snn.SLSTM(2 * width * 9, hidden)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, 12, 12]`` to ``[N, classes]``."""
        utils.reset(self)
        syn, mem = self.slstm.init_slstm()
        out = []
        for x_t in x:
            s = self.lif1(self.bn1(self.conv1(x_t)))
            s = self.lif2(self.conv2(s))
            s, syn, mem = self.slstm(s.flatten(1), syn, mem)
            out.append(self.fc(s))
        return torch.stack(out).mean(0)


@structure("conv and SLSTM", "convolutions followed by snnTorch's spiking LSTM")
def conv_slstm(small: bool = True) -> Built:
    width, hidden = (8, 32) if small else (32, 128)
    return Built(ConvSLSTM(width, hidden, 10), (torch.rand(3, 2, 2, 12, 12) < 0.3).float())


class RowByRow(nn.Module):
    """An image read row by row by a recurrent network of SpikingJelly."""

    def __init__(self, cell: type[nn.Module], hidden: int, layers: int, classes: int) -> None:
        super().__init__()
        self.rnn = cell(16, hidden, layers)
        self.fc = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 16, 16]`` to ``[N, classes]``."""
        x = x.squeeze(1).permute(1, 0, 2)
        out, _ = self.rnn(x)
        return self.fc(out[-1])


@structure("SpikingLSTM", "SpikingJelly's spiking LSTM on sequential MNIST")
def spiking_lstm(small: bool = True) -> Built:
    return Built(RowByRow(rnn.SpikingLSTM, 32 if small else 128, 2, 10), torch.rand(2, 1, 16, 16))


@structure("SpikingVanillaRNN", "SpikingJelly's spiking RNN on sequential MNIST")
def spiking_rnn(small: bool = True) -> Built:
    model = RowByRow(rnn.SpikingVanillaRNN, 32 if small else 128, 1, 10)
    return Built(model, torch.rand(2, 1, 16, 16))


@structure("SpikingGRU", "SpikingJelly's spiking GRU on sequential MNIST")
def spiking_gru(small: bool = True) -> Built:
    return Built(RowByRow(rnn.SpikingGRU, 32 if small else 128, 1, 10), torch.rand(2, 1, 16, 16))


class RecurrentContainers(nn.Module):
    """A hidden layer with feedback, a synapse filter, and a non-spiking read-out."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc1 = layer.Linear(inputs, hidden)
        self.recurrent = layer.LinearRecurrentContainer(
            neuron.LIFNode(surrogate_function=surrogate.ATan(), detach_reset=True),
            in_features=hidden,
            out_features=hidden,
            bias=True,
        )
        self.filter = layer.SynapseFilter(tau=4.0, learnable=True)
        self.fc2 = layer.Linear(2 * hidden, classes)
        self.widen = layer.Linear(hidden, 2 * hidden, bias=False)
        self.lif = neuron.LIFNode(detach_reset=True)
        self.readout = neuron.NonSpikingLIFNode(tau=2.0, decode="last_mem")
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, inputs]`` to ``[N, classes]``."""
        s = self.filter(self.recurrent(self.fc1(x)))
        s = self.lif(self.widen(s))
        return self.readout(self.fc2(s))


@structure("recurrent containers", "SpikingJelly: LinearRecurrentContainer, SynapseFilter")
def recurrent_containers(small: bool = True) -> Built:
    inputs, hidden = (40, 32) if small else (700, 256)
    return Built(RecurrentContainers(inputs, hidden, 20), (torch.rand(4, 2, inputs) < 0.3).float())
