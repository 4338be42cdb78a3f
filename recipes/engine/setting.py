"""Number format, memory format and loading processes: what is fastest on the machine at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext.errors import ConfigError
from recipes import data as datasets
from recipes.config import Config
from recipes.engine import networks

#: Fields that ``auto`` leaves to the machine.
CHOSEN = ("precision", "memory_format")


def resolve(config: Config, noted: dict[str, Any] | None) -> Config:
    """The configuration with every ``auto`` replaced.

    Args:
        config: The run.
        noted: What was written when the run began, for one that goes on: it keeps what it began
            with, whatever this machine would choose.

    """
    safe = config.memory_format != "contiguous" and channels_last_is_safe(config)
    if config.memory_format == "channels_last" and not safe:
        raise ConfigError(
            "--memory-format channels_last would corrupt memory: oneDNN's backward of strided 1x1 "
            "convolutions writes past its buffers where channels are no multiple of 8. Take "
            "contiguous, or another --width."
        )
    format_ = "channels_last" if safe else "contiguous"
    choice = {"precision": _precision(config), "memory_format": format_}
    choice |= {k: v for k, v in (noted or {}).items() if k in CHOSEN}
    return config.but(**{k: choice[k] for k in CHOSEN if getattr(config, k) == "auto"})


def channels_last_is_safe(config: Config) -> bool:
    """Whether the network has none of the convolutions that oneDNN gets wrong on CPUs.

    Seen with oneDNN of torch 2.11 on AVX2: the backward of a strided 1x1 convolution over
    channels-last memory damages the heap where its input channels are no multiple of 8.
    """
    if on_gpu(config):
        return True
    # Not on the meta device: snnTorch's neurons look at the values of their buffers.
    with torch.random.fork_rng(devices=[]):
        model = networks.build(config, datasets.spec(config.data))
    return not any(
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.in_channels % 8
        for m in model.modules()
    )


def on_gpu(config: Config) -> bool:
    """Whether the run will be on a GPU."""
    return config.accelerator != "cpu" and torch.cuda.is_available()


def records(config: Config) -> bool:
    """Whether a training step is recorded as a CUDA graph: on one GPU, where a step is a batch.

    Raises:
        ConfigError: It is asked for and the run cannot have it.

    """
    devices = config.devices or torch.cuda.device_count()  # as the Trainer takes them
    wants = {
        "needs a GPU": not on_gpu(config),
        "goes with one process": devices > 1 or config.nodes > 1,
        "goes without --accumulate": config.accumulate > 1,
        "goes without --clip": config.clip is not None,
        "goes without --compile": config.compile,
    }
    hindrances = [text for text, hinders in wants.items() if hinders]
    if config.cuda_graph == "on" and hindrances:
        raise ConfigError(f"--cuda-graph on {hindrances[0]}.")
    return config.cuda_graph != "off" and not hindrances


def _precision(config: Config) -> str:
    """bfloat16 only where it is multiplied natively: emulated, it is far slower."""
    if on_gpu(config):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        asks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
        native = any(getattr(torch.cpu, ask, lambda: False)() for ask in asks)
    return "bf16-mixed" if native else "32-true"


def workers(config: Config, batched: bool) -> int:
    """Loading processes of a run.

    Args:
        config: The run.
        batched: Whether the data set makes whole batches, which takes a few milliseconds each.

    """
    if config.workers is not None:
        return config.workers
    return 0 if batched and not on_gpu(config) else 4


def arrange(module: nn.Module, memory_format: str) -> nn.Module:
    """Let the weights of convolutions lie as their activations do."""
    if memory_format == "channels_last":
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
    return module


def arranged(x: Tensor, memory_format: str) -> Tensor:
    """Images [N, C, H, W] or frames [T, N, C, H, W] in a memory format, copied where needed."""
    wanted = torch.contiguous_format
    if memory_format == "channels_last":
        wanted = torch.channels_last
    if x.dim() == 4:
        return x.contiguous(memory_format=wanted)
    return x.flatten(0, 1).contiguous(memory_format=wanted).view(x.shape)
