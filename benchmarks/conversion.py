"""What converting the paper's ResNet19 costs: time, extra memory, and nothing left behind.

    python -m benchmarks.conversion

Prints the median of seven conversions of the full-size network, the largest amount of memory that
conversion itself holds beside the size of the largest layer, and the growth of resident memory and
of snnTorch's list of neurons over a hundred conversions.
"""

from __future__ import annotations

import gc
import resource
import statistics
import time
from pathlib import Path

import snntorch as snn
import torch
from torch import nn

from qsnn_ext import quantize_
from qsnn_ext.models import resnet19


def seconds() -> float:
    """Median of seven conversions."""
    times = []
    for _ in range(7):
        model = resnet19()
        start = time.perf_counter()
        quantize_(model, "1w-2u")
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_bytes(model: nn.Module) -> int:
    """The most memory that tensors made during a conversion hold at once."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        quantize_(model, "1w-2u")
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def resident() -> int:
    """Bytes of memory the process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def leaked(model: nn.Module, copies: int = 100) -> tuple[int, int]:
    """Bytes and neurons on snnTorch's list that the copies leave behind."""
    quantize_(model, "1w-2u", inplace=False)
    memory, neurons = resident(), len(snn.SpikingNeuron.instances)
    for _ in range(copies):
        quantize_(model, "1w-2u", inplace=False)
        gc.collect()
    return resident() - memory, len(snn.SpikingNeuron.instances) - neurons


def main() -> None:
    """Print all three."""
    torch.set_num_threads(1)
    print(f"ResNet19, quantize_: {seconds() * 1e3:.0f} ms")
    model = resnet19()
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    print(f"extra memory at most {peak_bytes(model) / 1e6:.3f} MB; the largest layer has "
          f"{largest / 1e6:.1f} MB")  # fmt: skip
    memory, neurons = leaked(resnet19(width=0.5, host="snntorch"))
    print(f"100 copies with snnTorch: {memory / 1e6:+.1f} MB resident, {neurons:+d} neurons listed")


if __name__ == "__main__":
    main()
