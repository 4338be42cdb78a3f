"""Agents: an actor and a critic, values of actions."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from benchmarks.structures import Built, structure


class NonSpikingLIF(neuron.SimpleLIFNode):
    """A neuron of the host that only charges: its potential is the answer."""

    def single_step_forward(self, x: Tensor) -> Tensor:
        """``[N, ...]``."""
        self.neuronal_charge(x)
        return self.v


class ActorCritic(nn.Module):
    """One body, two heads, each read from a neuron that does not fire."""

    def __init__(self, observations: int, actions: int, hidden: int, T: int = 4) -> None:
        super().__init__()
        self.T = T
        self.body = nn.Sequential(
            nn.Linear(observations, hidden),
            neuron.IFNode(),
            nn.Linear(hidden, hidden),
            neuron.IFNode(),
        )
        self.actor = nn.Sequential(
            nn.Linear(hidden, actions), NonSpikingLIF(tau=2.0, decay_input=True)
        )
        self.critic = nn.Sequential(nn.Linear(hidden, 1), NonSpikingLIF(tau=2.0, decay_input=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, observations]`` to probabilities of actions and values."""
        for _ in range(self.T):
            h = self.body(x)
            self.actor(h)
            self.critic(h)
        return torch.softmax(self.actor[-1].v, dim=1), self.critic[-1].v


@structure("actor-critic", "SpikingJelly's actor-critic: two heads read through .v")
def actor_critic(small: bool = True) -> Built:
    return Built(ActorCritic(4, 2, 32 if small else 256), torch.randn(2, 4))


class TwoTower(nn.Module):
    """Frames and a state vector enter by two stems; policy and value leave by two heads."""

    def __init__(self, width: int, actions: int) -> None:
        super().__init__()
        self.vision = nn.Sequential(
            layer.Conv2d(2, width, 3, stride=2, padding=1),
            neuron.LIFNode(detach_reset=True),
            layer.Conv2d(width, width, 3, stride=2, padding=1),
            neuron.LIFNode(detach_reset=True),
            layer.Flatten(),
        )
        self.state = nn.Sequential(layer.Linear(6, width), neuron.LIFNode(detach_reset=True))
        self.fuse = nn.Sequential(
            layer.Linear(width * 17, 4 * width), neuron.LIFNode(detach_reset=True)
        )
        self.pi, self.value = layer.Linear(4 * width, actions), layer.Linear(4 * width, 1)
        functional.set_step_mode(self, "m")

    def forward(self, frames: Tensor, state: Tensor) -> dict[str, Tensor]:
        """``[T, N, 2, 16, 16]`` and ``[T, N, 6]`` to logits and values."""
        h = self.fuse(torch.cat([self.vision(frames), self.state(state)], dim=-1))
        return {"logits": self.pi(h).mean(0), "value": self.value(h).mean(0).squeeze(-1)}


@structure("policy with two inputs", "multi-modal agents: two stems, two heads, dict")
def two_tower(small: bool = True) -> Built:
    frames = (torch.rand(3, 2, 2, 16, 16) < 0.3).float()
    return Built(TwoTower(8 if small else 64, 5), (frames, torch.randn(3, 2, 6)))


class DQN(nn.Module):
    """Values of actions, decoded from the potentials of a read-out of the host."""

    def __init__(self, width: int, actions: int, T: int = 4) -> None:
        super().__init__()
        self.network = nn.Sequential(
            layer.Conv2d(4, width, kernel_size=4, stride=2),
            neuron.LIFNode(detach_reset=True),
            layer.Conv2d(width, 2 * width, kernel_size=3, stride=1),
            neuron.LIFNode(detach_reset=True),
            layer.Flatten(),
            layer.Linear(2 * width * 25, 8 * width),
            neuron.LIFNode(detach_reset=True),
            layer.Linear(8 * width, actions),
            neuron.NonSpikingLIFNode(decode="max-mem"),
        )
        self.T = T
        functional.set_step_mode(self.network, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 4, 16, 16]`` to ``[N, actions]``."""
        x_seq = x.unsqueeze(0).expand(self.T, -1, -1, -1, -1)
        return self.network(x_seq)


@structure("DQN", "deep spiking Q-learning: potentials decoded by the host's read-out")
def dqn(small: bool = True) -> Built:
    return Built(DQN(8 if small else 32, 4), torch.rand(2, 4, 16, 16))
