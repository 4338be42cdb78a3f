"""What the benchmarks share: interleaved timing, the machine's description, the CSV of results."""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def parser(description: str, repeats: int | None = 11) -> argparse.ArgumentParser:
    """Options every benchmark has."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    p.add_argument("--repeats", type=int, default=repeats, help="interleaved rounds")
    p.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time of this process, for a machine that is busy; use --threads 1",
    )
    p.add_argument("--no-csv", action="store_true", help="print only")
    return p


def machine(device: str) -> str:
    """Processor, threads, software, and how busy the machine was."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as lines:
            name = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    if device == "cuda":
        name = torch.cuda.get_device_name()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    return (
        f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, load average {load:.1f}"
    )


def interleaved(
    variants: dict[str, Callable[[], object]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of each variant's calls, taken in turn so that all meet the same weather.

    The first call of each (compilation, warm caches) is made before and returned under
    ``"<name>, first call"``.
    """
    times: dict[str, list[float]] = {}
    clock = time.process_time if args.clock == "cpu" else time.perf_counter

    def once(call: Callable[[], object], clock: Callable[[], float]) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        call()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for name, call in variants.items():
        # Always the wall clock: the compiler works in other processes.
        times[f"{name}, first call"] = [once(call, time.perf_counter)]
        once(call, clock)
    for name in variants:
        times[name] = []
    # In another order every round: what runs before a variant decides what is left for it in the
    # caches and in the allocator, which is worth up to a third of a short call.
    shuffle = random.Random(0).sample
    for _ in range(args.repeats):
        for name in shuffle(list(variants), len(variants)):
            times[name].append(once(variants[name], clock))
    return times


def report(
    benchmark: str,
    case: str,
    times: dict[str, list[float]],
    baseline: str,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Print medians, fastest times and ratios to the baseline; append them to the CSV.

    Ratios of medians suffer from other work on the machine, ratios of the fastest rounds less.
    """
    where = machine(args.device)
    print(f"{benchmark}: {case}, {args.clock} time\n  {where}")
    rows, ratios = [], {}
    for name, values in times.items():
        median, fastest = statistics.median(values), min(values)
        row = [case, args.clock, name, "ms", round(1e3 * median, 3), round(1e3 * fastest, 3)]
        if name.endswith(", first call"):
            # Made once: the wall time of compilation, no ratio.
            print(f"  {name:44s} {1e3 * median:10.2f} ms")
            rows.append([*row, "", "", len(values)])
            continue
        ratios[name] = median / statistics.median(times[baseline])
        ratio_fastest = fastest / min(times[baseline])
        print(
            f"  {name:44s} {1e3 * median:10.2f} ms  (min {1e3 * fastest:9.2f})"
            f"  ratio {ratios[name]:6.3f}  fastest {ratio_fastest:6.3f}"
        )
        rows.append([*row, round(ratios[name], 4), round(ratio_fastest, 4), len(values)])
    if not args.no_csv:
        append(benchmark, rows, where)
    return ratios


COLUMNS = [
    "date", "machine", "case", "clock", "variant", "unit", "median", "min", "ratio",
    "ratio_of_minima", "rounds",
]  # fmt: skip


def append(benchmark: str, rows: list[list[object]], where: str) -> None:
    """Append rows, which hold :data:`COLUMNS` from ``case`` on, to ``results/<benchmark>.csv``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.csv"
    fresh = not path.exists()
    today = datetime.date.today().isoformat()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(COLUMNS)
        writer.writerows([[today, where, *row] for row in rows])
