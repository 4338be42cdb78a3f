"""What the processes of one run agree on: membrane scales, batch statistics, sums."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor, nn


def sync_scales(model: nn.Module) -> None:
    """Let every membrane quantizer take its scale over all processes."""
    for module in model.modules():
        if hasattr(module, "sync_scale"):
            module.sync_scale = True


def sync_batchnorm(model: nn.Module, device: torch.device) -> nn.Module:
    """Let batch norm take its statistics over all processes.

    torch's own class works on accelerators only; on CPUs :class:`CPUSyncBatchNorm2d` does it.
    """
    if device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = CPUSyncBatchNorm2d
    return model


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose backward is the same sum over the gradients of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the batches of all processes, for gloo on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [N, C, H, W]; processes may hold batches of different size."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(x)
        n = x.new_tensor([x.numel() / x.shape[1]])
        total = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), n]))
        count, mean = total[-1], total[:-1] / total[-1]
        centred = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            unbiased = variance * count / (count - 1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(unbiased, self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return centred * scale[:, None, None] + self.bias[:, None, None]


def summing(trainer: Trainer) -> Any:
    """A function that sums a tensor over the run's processes."""
    if trainer.world_size == 1:
        return lambda tensor: tensor

    def everyone(tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    return everyone
