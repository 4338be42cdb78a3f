"""Speed of the integer engine against float32 PyTorch, over firing rates, batches and threads.

``python -m benchmarks.inference`` prints a table, writes it to ``results/inference.csv`` and draws
``results/inference.svg``. Contenders are the float32 network in eager PyTorch, under
``torch.compile``, under ``torch.compile`` with frozen weights, and every path of the engine at
every firing rate. All take turns in every round, and medians are compared, so that a change of
clock speed or a noisy neighbour hits all of them. With one thread the clock is the CPU time of the
thread, which does not count the time another process had the core.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.firing import freeze_scales, set_firing_rate
from qsnn_ext import models
from qsnn_ext.deploy import DeployedModel, backends, engine, export_c, load, lower, save_program
from qsnn_ext.deploy.boards import fits_bytes

RESULTS = Path(__file__).with_name("results")
FIELDS = (
    "date", "commit", "engine", "processor", "torch", "network", "timesteps", "batch", "threads",
    "contender", "firing_rate", "median_ms", "rounds", "clock", "over_eager", "over_compile",
    "over_freezing",
)  # fmt: skip
FLOAT = ("eager", "compile", "freezing")


def build() -> tuple[str, str]:
    """Commit of the sources ("+": changed since), and a digest of the compiled engine."""
    root = Path(__file__).parents[1]

    def git(*command: str) -> str:
        try:
            return subprocess.check_output(
                ["git", *command], cwd=root, text=True, stderr=subprocess.DEVNULL
            ).strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    changed = git("status", "--porcelain", "--", "qsnn_ext/deploy", "hatch_build.py")
    library = engine.library()
    digest = "none"
    if library is not None:
        digest = hashlib.sha256(Path(library._name).read_bytes()).hexdigest()[:8]
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed), digest


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
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float],
    pause: float = 0.0,
) -> dict[str, float]:
    """Median milliseconds of every contender; all take turns, ``pause`` seconds apart."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        call()
    for _ in range(rounds):
        for name, call in contenders.items():
            time.sleep(pause)
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


def compiled(model: nn.Module, x: Tensor, freezing: bool) -> Callable[[Tensor], object]:
    """The model under ``torch.compile``, warmed up; ``freezing`` makes its weights constants."""
    with torch._inductor.config.patch(freezing=freezing), torch.no_grad():
        function = torch.compile(model)
        for _ in range(2):
            function(x)
    return function


def speed(args: argparse.Namespace) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    nets = {rate: deployed(args.network, args.steps, rate, args.size) for rate in args.rates}
    commit, engine_build = build()
    for threads in args.threads:
        torch.set_num_threads(threads)
        clock = time.thread_time if threads == 1 else time.perf_counter
        for batch in args.batches:
            torch.manual_seed(0)
            x = torch.rand(batch, 3, args.size, args.size)
            # One network for each: compiling with frozen weights discards those of its own.
            float_nets = {
                name: getattr(models, args.network)(in_channels=3, T=args.steps).eval()
                for name in FLOAT
            }
            contenders: dict[str, Callable[[], object]] = {
                "eager": lambda x=x, f=float_nets["eager"]: f(x)
            }
            torch._dynamo.reset()
            for name in FLOAT[1:] if args.compile else ():
                function = compiled(float_nets[name], x, freezing=name == "freezing")
                contenders[name] = lambda x=x, f=function: f(x)
            found: dict[str, float | None] = dict.fromkeys(contenders)
            for rate, (net, measured) in nets.items():
                for backend in backends()[:-1]:
                    codes = net.codes(x)
                    session = DeployedModel(net.program, backend, threads).session(batch)  # type: ignore[arg-type]
                    name = f"{backend}@{rate:g}"
                    contenders[name] = lambda s=session, c=codes: s.run(c, args.steps, True)
                    found[name] = measured
            with torch.no_grad():
                result = medians(contenders, args.rounds, clock)
            for name, ms in result.items():
                over = {f: round(result[f] / ms, 2) if f in result else "" for f in FLOAT}
                rows.append({
                    "date": datetime.date.today().isoformat(), "commit": commit,
                    "engine": engine_build, "processor": processor(),
                    "torch": torch.__version__, "network": args.network, "timesteps": args.steps,
                    "batch": batch, "threads": threads, "contender": name.split("@")[0],
                    "firing_rate": "" if found[name] is None else round(found[name] or 0, 4),
                    "median_ms": round(ms, 3), "rounds": args.rounds,
                    "clock": "cpu" if threads == 1 else "wall",
                    **{f"over_{f}": value for f, value in over.items()},
                })  # fmt: skip
                line = "{contender:>9} rate {firing_rate!s:>6} batch {batch:>2} threads {threads} "
                line += (
                    "{median_ms:>9.2f} ms {over_eager!s:>6} x eager {over_compile!s:>6} x compile"
                )
                print((line + " {over_freezing!s:>6} x freezing").format(**rows[-1]), flush=True)
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
    export_c(net.program, folder / "c", "stdio")
    sources = [str(p) for p in (folder / "c").glob("*.c")]
    binary = str(folder / "net")
    subprocess.run(["cc", "-std=c99", "-O2", *sources, "-o", binary], check=True)
    kind = "u1" if fits_bytes(*net.program.input_range) else "i2"
    codes = net.codes(x[:1]).astype(kind).tobytes()
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
    """Speed-up over firing rates (left); time per sample over batches and threads (right)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5))
    settings = sorted({(int(str(r["batch"])), int(str(r["threads"]))) for r in rows})
    names = list(dict.fromkeys(str(r["contender"]) for r in rows))
    rates = sorted({float(str(r["firing_rate"])) for r in rows if r["firing_rate"] != ""})
    shown = min(rates, key=lambda rate: abs(rate - 0.2))

    def chosen(name: str, batch: int, threads: int) -> list[tuple[float, float, float]]:
        return sorted(
            (float(str(r["firing_rate"] or 0)), float(str(r["median_ms"])),
             float(str(r["over_eager"])))
            for r in rows
            if (r["contender"], r["batch"], r["threads"]) == (name, batch, threads)
        )  # fmt: skip

    for k, name in enumerate(names):
        points = chosen(name, *settings[0])
        if name in FLOAT:
            left.axhline(points[0][2], color=f"C{k}", ls="--", label=name)
        else:
            left.plot(
                [100 * p[0] for p in points],
                [p[2] for p in points],
                f"C{k}",
                marker="o",
                label=name,
            )
        bars = []
        for setting in settings:
            at = [p for p in chosen(name, *setting) if name in FLOAT or abs(p[0] - shown) < 1e-9]
            bars.append(at[0][1] / setting[0])
        width = 0.8 / len(names)
        right.bar([i + (k + 0.5) * width - 0.4 for i in range(len(bars))], bars, width, label=name)
    batch, threads = settings[0]
    left.set(
        xlabel="firing rate (%)", ylabel="speed-up over eager float32", ylim=(0, None),
        title=f"batch {batch}, threads {threads}",
    )  # fmt: skip
    right.set_xticks(range(len(settings)), [f"batch {b}\nthreads {t}" for b, t in settings])
    right.set(yscale="log", ylabel="ms per sample", title=f"firing rate {100 * shown:.0f} %")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"{rows[0]['network']}, T = {rows[0]['timesteps']}, {rows[0]['processor']}, "
                    f"commit {rows[0]['commit']}", fontsize=9)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet19")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.05, 0.1, 0.2, 0.3, 0.5])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of table and plot")
    parser.add_argument("--sizes", action="store_true", help="file sizes and memory instead")
    args = parser.parse_args()
    print(processor(), "torch", torch.__version__)
    if args.sizes:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            sizes(Path(folder))
        return
    rows = speed(args)
    args.out.mkdir(exist_ok=True, parents=True)
    with (args.out / "inference.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.out / "inference.svg")


if __name__ == "__main__":
    main()
