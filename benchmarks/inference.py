"""Speed of the integer engine against float32 PyTorch, over firing rates, batches and threads.

``python -m benchmarks.inference`` prints a table, appends it to ``results/inference.csv`` and draws
``results/inference.svg``. All contenders run in turn in every round, and medians are compared, so
that a change of clock speed or a noisy neighbour hits all of them. With one thread the clock is the
CPU time of the thread, which does not count the time another process had the core.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.firing import freeze_scales, set_firing_rate
from qsnn_ext import models
from qsnn_ext.deploy import DeployedModel, backends, export_c, load, lower, save_program

RESULTS = Path(__file__).with_name("results")
FIELDS = (
    "date", "processor", "torch", "network", "timesteps", "batch", "threads", "contender",
    "firing_rate", "median_ms", "rounds", "clock", "ratio",
)  # fmt: skip


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        clean = {k.strip(): v.strip() for k, v in info.items()}
        name, family, model = (clean.get(k, "") for k in ("model name", "cpu family", "model"))
        return f"{name} (family {family} model {model})"
    except OSError:
        return platform.processor() or platform.machine()


def medians(
    contenders: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median milliseconds of every contender; all take turns."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            start = clock()
            call()
            samples[name].append(1e3 * (clock() - start))
    return {name: statistics.median(s) for name, s in samples.items()}


def deployed(network: str, steps: int, rate: float, size: int) -> tuple[DeployedModel, float]:
    """A 1w-2u network whose neurons fire at ``rate``, and the rate measured."""
    torch.manual_seed(0)
    model = getattr(models, network)(bits="1w-2u", in_channels=3, T=steps)
    x = torch.rand(2, 3, size, size)
    rates = set_firing_rate(model, x, rate)
    freeze_scales(model, x)
    return DeployedModel(lower(model, x)), statistics.mean(rates)


def speed(args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    nets = {rate: deployed(args.network, args.steps, rate, args.size) for rate in args.rates}
    torch.manual_seed(0)
    float_net = getattr(models, args.network)(in_channels=3, T=args.steps).eval()
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for batch in args.batches:
            x = torch.rand(batch, 3, args.size, args.size)
            contenders: dict[str, Callable[[], object]] = {"eager": lambda x=x: float_net(x)}
            if args.compile:
                torch._dynamo.reset()
                compiled = torch.compile(float_net)
                contenders["compile"] = lambda x=x, f=compiled: f(x)
            found: dict[str, float | None] = dict.fromkeys(contenders)
            for rate, (net, measured) in nets.items():
                for backend in backends()[:-1]:
                    codes = net.codes(x)
                    session = DeployedModel(net.program, backend, threads).session(batch)  # type: ignore[arg-type]
                    name = f"{backend}@{rate:g}"
                    contenders[name] = lambda s=session, c=codes: s.run(c, args.steps, True)
                    found[name] = measured
            with torch.inference_mode():
                result = medians(contenders, args.rounds, clock)
            for name, ms in result.items():
                rows.append({
                    "date": datetime.date.today().isoformat(), "processor": processor(),
                    "torch": torch.__version__, "network": args.network, "timesteps": args.steps,
                    "batch": batch, "threads": threads, "contender": name.split("@")[0],
                    "firing_rate": "" if found[name] is None else round(found[name] or 0, 4),
                    "median_ms": round(ms, 3), "rounds": args.rounds,
                    "clock": "cpu" if threads == 1 else "wall",
                    "ratio": round(result["eager"] / ms, 2),
                })  # fmt: skip
                print("{contender:>9} rate {firing_rate!s:>6} batch {batch:>2} threads {threads} "
                      "{median_ms:>9.2f} ms  {ratio:>6.2f} x eager".format(**rows[-1]))  # fmt: skip
    return rows


def sizes(folder: Path) -> None:
    """File sizes, time from file to first answer, and peak memory of the exported C program."""
    for network, limit in (("resnet19", 1.65), ("vgg16", 1.92), ("vggsnn", 1.21)):
        model = getattr(models, network)(bits="1w-2u", in_channels=3)
        x = torch.rand(2, 3, 32, 32)
        freeze_scales(model, x)
        program = lower(model, x)
        path = folder / f"{network}.qsnn"
        size = save_program(program, path)
        code = (
            "import time, sys, numpy as np; from qsnn_ext.deploy import load, backends; backends();"
            "x = np.zeros((1, 3, 32, 32), np.float32); t = time.perf_counter();"
            "load(sys.argv[1])(x); print(time.perf_counter() - t)"
        )
        command = [sys.executable, "-c", code, str(path)]
        times = [float(subprocess.check_output(command)) for _ in range(5)]
        print(f"{network}: {size / 1e6:.4f} MB (target {limit}), "
              f"file to first answer {1e3 * statistics.median(times):.1f} ms")  # fmt: skip
        if network == "resnet19":
            resident(load(path), folder, x)


def resident(net: DeployedModel, folder: Path, x: torch.Tensor) -> None:
    """Peak resident set of the exported program after two time steps."""
    export_c(net.program, folder / "c")
    sources = [str(p) for p in (folder / "c").glob("*.c")]
    binary = str(folder / "net")
    subprocess.run(["cc", "-std=c99", "-O2", *sources, "-o", binary], check=True)
    codes = net.codes(x[:1]).tobytes()
    lines = 2 * net.program.values[net.program.outputs[0]].elements
    with subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(codes * 2)
        process.stdin.flush()
        for _ in range(lines):
            process.stdout.readline()
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        process.stdin.close()
    print(f"peak resident set of the exported C program: {peak.split(':')[1].strip()}")


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    lines: dict[tuple[object, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if row["firing_rate"] != "":
            key = (row["contender"], row["batch"], row["threads"])
            point = (100 * float(str(row["firing_rate"])), float(str(row["ratio"])))
            lines.setdefault(key, []).append(point)
    for (contender, batch, threads), points in sorted(lines.items(), key=str):
        label = f"{contender}, batch {batch}, {threads} thread" + "s" * (threads != 1)
        axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
    axis.set_xlabel("firing rate (%)")
    axis.set_ylabel("speed-up over eager float32")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    axis.set_title(f"{rows[0]['network']}, T = {rows[0]['timesteps']}, {rows[0]['processor']}",
                   fontsize=9)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet19")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--sizes", action="store_true", help="file sizes and memory instead")
    args = parser.parse_args()
    print(processor(), "torch", torch.__version__)
    if args.sizes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            sizes(Path(folder))
        return
    rows = speed(args)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / "inference.csv"
    fresh = not target.exists()
    with target.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    plot(rows, RESULTS / "inference.svg")


if __name__ == "__main__":
    main()
