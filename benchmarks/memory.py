"""Peak memory of a training step, and what a neuron saves for backward.

    python benchmarks/memory.py

On the CPU each variant runs in a process of its own, which reports by how much its resident set
peaked above what it was before the step (Linux); on CUDA the allocator is asked.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

import common
import torch
import train_step

from qsnn_ext.spikingjelly import QuantLIFNode


def peak(bits: str, args) -> float:
    """MB by which the second training step peaks above the memory held before it."""
    model = train_step.build(bits, args, "spikingjelly")
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.randint(10, (args.batch,), device=args.device)
    call = train_step.step(model, x, y, args, args.backend)
    call()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak of the resident set
    call()
    with open("/proc/self/status") as file:
        status = dict(line.split(":", 1) for line in file)
    return int(status["VmHWM"].split()[0]) * 1024 / 1e6


def saved(bits: int | None, backend: str, args) -> float:
    """What one neuron keeps for backward, as a multiple of its input."""
    from qsnn_ext import kernels

    x = torch.randn(4, 16, 64, 16, 16, device=args.device, requires_grad=True)
    node = QuantLIFNode(tau=2.0, decay_input=False, step_mode="m", bits=bits).to(args.device)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        kernels.use_backend(backend),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
    ):
        node(x)
    return sum(kept.values()) / (x.numel() * x.element_size())


def main():
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--T", type=int, default=2)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--width", type=float, default=1.0)
    p.add_argument("--memory-format", choices=["contiguous", "channels_last"], default="contiguous")
    p.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--only", help=argparse.SUPPRESS)
    p.add_argument("--backend", default="auto")
    p.add_argument("--rounds", type=int, default=1, help="processes per variant")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(peak(args.only, args)))
        return
    rows: list[list[object]] = []
    print(f"memory: {common.machine(args.device)}")
    case, base = f"ResNet19 step T={args.T} N={args.batch} width={args.width}, peak", None
    for bits in ("32w-32u", "1w-2u", "1w-8u"):
        command = [sys.executable, __file__, "--only", bits, *sys.argv[1:]]
        sizes = []
        for _ in range(args.rounds):
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            sizes.append(float(out.splitlines()[-1]))
        median, least = statistics.median(sizes), min(sizes)
        base = base or (median, least)
        ratios = round(median / base[0], 4), round(least / base[1], 4)
        print(f"  peak of a step {bits:20s} {median:9.1f} MB  ratio {ratios[0]:.3f}")
        rows.append([case, "", bits, "MB", round(median, 1), round(least, 1), *ratios, len(sizes)])
    for label, bits, backend in [
        ("LIFNode", None, "eager"), ("2 bit, plain autograd", 2, "eager"),
        ("2 bit, function", 2, "function"), ("2 bit", 2, "auto"),
    ]:  # fmt: skip
        multiple = round(saved(bits, backend, args), 3)
        print(f"  saved for backward {label:24s} {multiple:.2f} x input")
        rows.append(
            ["a neuron, saved for backward", "", label, "x input", multiple, multiple, "", "", 1]
        )
    if not args.no_csv:
        common.append("memory", rows, common.machine(args.device))


if __name__ == "__main__":
    main()
