"""Two versions of the package side by side, call by call: what became faster, slower or larger.

    git worktree add ../before 0.2.0
    python -m benchmarks.versions ../before

The other benchmarks compare with other libraries; this one makes their calls with the version in
another checkout instead. For every case each version has a process of its own with its checkout in
front of the path. Both make the same call in turn, and which goes first changes from round to
round. Printed and written to ``results/versions.json`` are both medians, and the median and the
quartiles of the ratios of the rounds: a change smaller than the quartiles' distance is not one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")
HERE = Path(__file__).resolve().parents[1]

#: A call returns what it measured: milliseconds, or megabytes.
Call = Callable[[], float]


def timed(call: Callable[[], object]) -> Call:
    """The wall time of a call, ms."""

    def measure() -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    return measure


def layer(bits: int) -> Call:
    """One layer of SpikingJelly's LIF neurons, forward and backward."""
    import torch
    from spikingjelly.activation_based import functional

    from qsnn_ext.spikingjelly import QuantLIFNode

    node = QuantLIFNode(tau=2.0, decay_input=False, step_mode="m", bits=bits)
    x = torch.randn(4, 32, 128, 32, 32, requires_grad=True)
    g = torch.randn_like(x)

    def call() -> None:
        functional.reset_net(node)
        x.grad = None
        node(x).backward(g)

    return timed(call)


def loop(bits: int, *shape: int) -> Call:
    """A loop over four steps of snnTorch's Leaky, forward and backward."""
    import torch

    from qsnn_ext.snntorch import QLeaky

    node = QLeaky(0.9, bits=bits)
    x = torch.randn(4, *shape, requires_grad=True)
    g = torch.randn_like(x)

    def call() -> None:
        x.grad = None
        mem = torch.zeros_like(x[0])
        spikes = []
        for step in x:
            spk, mem = node(step, mem)
            spikes.append(spk)
        torch.autograd.backward(spikes, list(g))

    return timed(call)


def training_step(
    bits: str = "1w-2u", host: str = "spikingjelly", regularized: bool = False
) -> Callable[[], None]:
    """A step of ResNet19 at half its width: T = 2, 16 images."""
    import torch

    from qsnn_ext.models import resnet19
    from qsnn_ext.regularizers import WSDRRegularizer

    torch.manual_seed(0)
    model = resnet19(bits=bits, T=2, width=0.5, host=host)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    term = WSDRRegularizer(model) if regularized else None
    x, y = torch.randn(16, 3, 32, 32), torch.randint(10, (16,))

    def call() -> None:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x).mean(0), y)
        if term is not None:
            loss = loss + term()
        loss.backward()
        optimizer.step()

    return call


def peak(call: Callable[[], object]) -> Call:
    """The highest resident memory during a call, MB (Linux)."""

    def measure() -> float:
        Path("/proc/self/clear_refs").write_text("5")  # resets the highest value
        call()
        lines = Path("/proc/self/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(status["VmHWM"].split()[0]) * 1024 / 1e6

    return measure


def conversion() -> Call:
    """``quantize_`` of SpikingJelly's ResNet18."""
    from spikingjelly.activation_based import neuron, surrogate
    from spikingjelly.activation_based.model import spiking_resnet

    from qsnn_ext import quantize_

    def call() -> float:
        model = spiking_resnet.spiking_resnet18(
            spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True
        )
        return timed(lambda: quantize_(model, "1w-2u"))()

    return call


def lowering() -> Call:
    """``deploy.lower`` of ResNet19 with two time steps."""
    from qsnn_ext.deploy import lower

    model, x = _deployable(1)
    return timed(lambda: lower(model, x))


def engine(batch: int) -> Call:
    """ResNet19's integer program on the fastest path, one thread, neurons at a rate of 0.1."""
    from qsnn_ext.deploy import DeployedModel, lower

    model, x = _deployable(batch)
    program = DeployedModel(lower(model, x[:2]))
    return timed(lambda: program(x))


def _deployable(batch: int) -> tuple[Any, Any]:
    import torch

    from benchmarks.firing import freeze_scales, set_firing_rate
    from qsnn_ext.models import resnet19

    torch.manual_seed(0)
    model = resnet19(bits="1w-2u", in_channels=3, T=2)
    x = torch.rand(max(2, batch), 3, 32, 32)
    set_firing_rate(model, x[:2], 0.1)
    freeze_scales(model, x[:2])
    return model, x[:batch]


CASES: dict[str, tuple[str, Callable[[], Call]]] = {
    **{f"LIF layer, {k} bits": ("ms", lambda k=k: layer(k)) for k in (2, 4, 8)},
    **{f"Leaky loop, {k} bits, small": ("ms", lambda k=k: loop(k, 128, 1000)) for k in (2, 8)},
    **{f"Leaky loop, {k} bits, large": ("ms", lambda k=k: loop(k, 32, 64, 16, 16)) for k in (2, 8)},
    "training step": ("ms", lambda: timed(training_step())),
    "training step, WS-DR": ("ms", lambda: timed(training_step(regularized=True))),
    "training step, 8 bits": ("ms", lambda: timed(training_step("1w-8u"))),
    "training step, snnTorch": ("ms", lambda: timed(training_step(host="snntorch"))),
    "peak memory of a step": ("MB", lambda: peak(training_step())),
    "quantize_": ("ms", conversion),
    "deploy.lower": ("ms", lowering),
    "engine, 1 image": ("ms", lambda: engine(1)),
    "engine, 16 images": ("ms", lambda: engine(16)),
}


def work(case: str) -> None:
    """Answer every line of the standard input with one measurement."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    import qsnn_ext

    call = CASES[case][1]()
    call()
    call()
    print(torch.__version__, Path(qsnn_ext.__file__).parents[1], flush=True)
    for _ in sys.stdin:
        print(call(), flush=True)


class Version:
    """A process that makes one case's calls with the package in ``checkout``."""

    def __init__(self, checkout: Path, case: str, threads: int) -> None:
        # A program given by its path would put its own folder first, and its package with it.
        start = (
            "import runpy, sys; sys.path.insert(0, sys.argv[1]); "
            "runpy.run_path(sys.argv[2], run_name='versions')['work'](sys.argv[3])"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", start, checkout, __file__, case],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": ""},
        )
        self.torch, where = self._answer().split(" ", 1)
        if Path(where) != checkout:
            raise SystemExit(f"the package came from {where}, not from {checkout}")

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process ended with {self.process.wait()}; see its message above")
        return line.strip()

    def measure(self) -> float:
        """One measurement."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def commit(checkout: Path) -> str:
    """The last commit to a checkout's package, with ``+`` where it was changed since."""
    git = ["git", "-C", str(checkout)]
    last = [*git, "log", "-1", "--format=%h", "--", "qsnn_ext"]
    short = subprocess.check_output(last, text=True).strip()
    return short + "+" * bool(subprocess.check_output([*git, "status", "--porcelain", "qsnn_ext"]))


def compare(before: Path, case: str, rounds: int, threads: int) -> dict[str, Any]:
    """A line of the table."""
    versions = [Version(checkout, case, threads) for checkout in (before, HERE)]
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            taken[which].append(versions[which].measure())
    for version in versions:
        version.close()
    ratios = [b / a for a, b in zip(*taken, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "case": case,
        "unit": CASES[case][0],
        "before": round(statistics.median(taken[0]), 3),
        "after": round(statistics.median(taken[1]), 3),
        **{"ratio": round(middle, 3), "ratio_q1": round(low, 3), "ratio_q3": round(high, 3)},
        "rounds": rounds,
        "torch": versions[1].torch,
    }


def main() -> None:
    """Compare, print and write."""
    from benchmarks.inference import processor

    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("before", type=Path, help="checkout of the other version")
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    p.add_argument("--rounds", type=int, default=15)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--no-json", action="store_true", help="print only")
    args = p.parse_args()
    before = args.before.resolve()
    content: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commits": [commit(before), commit(HERE)],
        "threads": args.threads,
        "processor": processor(),
    }
    path = RESULTS / "versions.json"
    rows: dict[str, dict[str, Any]] = {}
    if path.exists():
        known = json.loads(path.read_text())
        if {**known, **content} == known:  # what is not measured again stays
            rows = {row["case"]: row for row in known["rows"]}
    print(f"{' and '.join(content['commits'])}, {content['processor']}")
    for checkout in (before, HERE):  # what is written in C, without which other paths would run
        subprocess.check_call([sys.executable, "hatch_build.py"], cwd=checkout)
    for case in args.cases:
        row = compare(before, case, args.rounds, args.threads)
        rows[case] = row
        line = "{case:34} {before:10.2f} {after:10.2f} {unit}  ratio {ratio:.3f}"
        print((line + " ({ratio_q1:.3f} to {ratio_q3:.3f})").format(**row), flush=True)
    if not args.no_json:
        content["rows"] = [rows[case] for case in CASES if case in rows]
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
