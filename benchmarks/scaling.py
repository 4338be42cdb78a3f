"""Training steps of ResNet19 in one process and in two on this machine, by DDP and by FSDP2.

    python benchmarks/scaling.py                 # one thread a process, gloo

Every process has the same batch, so two processes do twice the work; the efficiency is the time of
a step alone to that of theirs. With synchronised membrane scales the processes meet once per layer
of neurons and time step, and the eager loop runs the neurons.
"""

from __future__ import annotations

import statistics
import tempfile
import time

import common
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as nn_functional
from torch.nn.parallel import DistributedDataParallel

from qsnn_ext import hosts
from qsnn_ext.models import resnet19

VARIANTS = [
    ("alone", 1, False), ("DDP", 1, False), ("DDP", 2, False), ("FSDP2", 2, False),
    ("DDP", 2, True),
]  # fmt: skip


def build(args, way, sync):
    torch.manual_seed(0)
    model = resnet19(bits=args.bits, T=2, width=args.width).train()
    for node in model.modules():
        if hosts.adapter_of(node) is not None and hasattr(node, "membrane"):
            node.membrane.sync_scale = sync
    if way == "FSDP2":
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (*(m for m in model.modules() if hasattr(m, "quantizer")), model):
            fully_shard(part, mesh=mesh)
        return model
    return DistributedDataParallel(model) if way == "DDP" else model


def work(rank, processes, way, sync, args, folder, results):
    torch.set_num_threads(1)
    if way != "alone":
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
        )
    model = build(args, way, sync)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(args.batch, 3, 32, 32), torch.randint(10, (args.batch,))
    times = []
    for _ in range(args.repeats + 1):
        if way != "alone":
            dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        nn_functional.cross_entropy(model(x).mean(0), y).backward()
        optimizer.step()
        if way != "alone":
            dist.barrier()
        times.append(time.perf_counter() - start)
    if rank == 0:
        results[way, processes, sync] = times[1:]
    if way != "alone":
        dist.destroy_process_group()


def main():
    p = common.parser(__doc__.splitlines()[0], repeats=7)
    p.add_argument("--batch", type=int, default=32, help="of every process")
    p.add_argument("--width", type=float, default=0.25)
    p.add_argument("--bits", default="1w-2u")
    args = p.parse_args()
    rows = []
    case = f"ResNet19 step T=2 N={args.batch} a process width={args.width} {args.bits}"
    print(f"scaling: {case}\n  {common.machine('cpu')}")
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        for way, processes, sync in VARIANTS:
            place = tempfile.mkdtemp(dir=folder)
            mp.spawn(work, (processes, way, sync, args, place, results), nprocs=processes)
            times = results[way, processes, sync]
            seconds, best = statistics.median(times), min(times)
            alone = results["alone", 1, False]
            efficiency = statistics.median(alone) / seconds, min(alone) / best
            name = f"{way}, {processes} process" + "es" * (processes > 1)
            name += ", scales synchronised" * sync
            print(
                f"  {name:40s} {processes * args.batch / seconds:8.1f} images a second, "
                f"efficiency {efficiency[0]:.2f} (of the fastest steps {efficiency[1]:.2f})"
            )
            row = [case, "wall", name, "ms", round(1e3 * seconds, 1), round(1e3 * best, 1)]
            rows.append([*row, *(round(1 / e, 4) for e in efficiency), len(times)])
    if not args.no_csv:
        common.append("scaling", rows, common.machine("cpu"))


if __name__ == "__main__":
    main()
