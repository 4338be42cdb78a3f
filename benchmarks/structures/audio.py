"""Spoken words: trains of 700 channels, spectrograms, convolutions over time."""

from __future__ import annotations

import snntorch as snn
import torch
from snntorch import surrogate as snn_surrogate
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from benchmarks.structures import Built, structure


class SHDSynaptic(nn.Module):
    """Two hidden layers of second-order neurons with trained decays; the read-out integrates."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        grad = snn_surrogate.fast_sigmoid(slope=25)
        self.fc1 = nn.Linear(inputs, hidden)
        self.lif1 = snn.Synaptic(
            alpha=0.9, beta=0.8, learn_alpha=True, learn_beta=True, spike_grad=grad
        )
        self.fc2 = nn.Linear(hidden, hidden)
        self.lif2 = snn.Synaptic(
            alpha=0.9, beta=0.8, learn_alpha=True, learn_beta=True, spike_grad=grad
        )
        self.fc3 = nn.Linear(hidden, classes)
        self.lif3 = snn.Synaptic(alpha=0.9, beta=0.95, reset_mechanism="none", spike_grad=grad)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, T, inputs]`` to spikes and membrane potentials ``[T, N, classes]``."""
        syn1, mem1 = self.lif1.reset_mem()
        syn2, mem2 = self.lif2.reset_mem()
        syn3, mem3 = self.lif3.reset_mem()
        spk_rec, mem_rec = [], []
        for step in range(x.size(1)):
            spk1, syn1, mem1 = self.lif1(self.fc1(x[:, step]), syn1, mem1)
            spk2, syn2, mem2 = self.lif2(self.fc2(spk1), syn2, mem2)
            spk3, syn3, mem3 = self.lif3(self.fc3(spk2), syn3, mem3)
            spk_rec.append(spk3)
            mem_rec.append(mem3)
        return torch.stack(spk_rec), torch.stack(mem_rec)


@structure("SHD, Synaptic", "SHD baselines: second-order neurons, trained decays, batch-first")
def shd_synaptic(small: bool = True) -> Built:
    inputs, hidden = (70, 32) if small else (700, 256)
    return Built(SHDSynaptic(inputs, hidden, 20), (torch.rand(2, 6, inputs) < 0.2).float())


class SHDRecurrent(nn.Module):
    """A hidden layer that hears itself, then a leaky read-out."""

    def __init__(self, inputs: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.rlif1 = snn.RLeaky(beta=0.9, linear_features=hidden, learn_beta=True)
        self.fc2 = nn.Linear(hidden, classes)
        self.lif2 = snn.Leaky(beta=0.95, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, inputs]`` to the sum of membrane potentials ``[N, classes]``."""
        spk1, mem1 = self.rlif1.reset_mem()
        mem2 = self.lif2.reset_mem()
        out = 0
        for x_t in x:
            spk1, mem1 = self.rlif1(self.fc1(x_t), spk1, mem1)
            _, mem2 = self.lif2(self.fc2(spk1), mem2)
            out = out + mem2
        return out


@structure("SHD, RLeaky", "SHD baselines: recurrent spiking layer, leaky read-out")
def shd_rleaky(small: bool = True) -> Built:
    inputs, hidden = (70, 32) if small else (700, 256)
    return Built(SHDRecurrent(inputs, hidden, 20), (torch.rand(6, 2, inputs) < 0.2).float())


class SpeechConv1d(nn.Module):
    """A spectrogram's bands are channels, its frames the length; neurons then run over frames."""

    def __init__(self, bands: int, width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(bands, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm1d(width)
        self.lif1 = self._lif()
        self.conv2 = nn.Conv1d(width, width, 3, padding=2, dilation=2, bias=False)
        self.bn2 = nn.BatchNorm1d(width)
        self.lif2 = self._lif()
        self.conv3 = nn.Conv1d(width, width, 3, padding=4, dilation=4, groups=4, bias=False)
        self.bn3 = nn.BatchNorm1d(width)
        self.lif3 = self._lif()
        self.fc = nn.Linear(width, classes)

    @staticmethod
    def _lif() -> neuron.LIFNode:
        return neuron.LIFNode(
            tau=4.0 / 3, surrogate_function=surrogate.Sigmoid(), detach_reset=True, step_mode="m"
        )

    @staticmethod
    def _over_frames(fire: nn.Module, x: Tensor) -> Tensor:
        return fire(x.permute(2, 0, 1)).permute(1, 2, 0)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, bands, frames]`` to ``[N, classes]``."""
        x = self._over_frames(self.lif1, self.bn1(self.conv1(x)))
        x = self._over_frames(self.lif2, self.bn2(self.conv2(x)))
        x = self._over_frames(self.lif3, self.bn3(self.conv3(x)))
        return self.fc(x.mean(-1))


@structure("speech, Conv1d", "speech commands: dilated convolutions along the frames")
def speech_conv1d(small: bool = True) -> Built:
    width = 16 if small else 128
    return Built(SpeechConv1d(20, width, 12), torch.randn(2, 20, 12))


class SpeechSpectrogram(nn.Module):
    """Convolutions over time and frequency of the whole utterance, as multi-step layers."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            layer.Conv1d(1, width, 5, stride=2, padding=2, bias=False),
            layer.BatchNorm1d(width),
            neuron.ParametricLIFNode(detach_reset=True),
            layer.Conv1d(width, width, 5, stride=2, padding=2, bias=False),
            layer.BatchNorm1d(width),
            neuron.ParametricLIFNode(detach_reset=True),
            layer.Flatten(),
        )
        self.fc = layer.Linear(width * 5, classes)
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 1, bands]`` to ``[N, classes]``."""
        return self.fc(self.conv(x)).mean(0)


@structure("speech, frames as time", "speech commands: one frame per step, Conv1d over bands")
def speech_frames(small: bool = True) -> Built:
    return Built(SpeechSpectrogram(8 if small else 64, 12), torch.randn(4, 2, 1, 20))
