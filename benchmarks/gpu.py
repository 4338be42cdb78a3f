"""Everything that is to be known of one GPU, in one command and under nine minutes.

    python -m benchmarks.gpu                  # on the GPU; writes results/gpu-<device>.csv and .txt
    python -m benchmarks.gpu --rehearse       # the same on the CPU with tiny sizes; writes nothing

In this order, each in a process of its own with a limit of its own, so that what fails or takes
too long costs nothing but itself:

1. first call: what compiling takes on first use, from an empty cache;
2. one layer, forward and backward, against SpikingJelly's CUDA and Triton implementations and
   `torch.compile`, and the passes of the layer-wide maximum against given scales;
3. a training step of ResNet19 at full width, channels-last, float32 and bfloat16, launched kernel
   by kernel and as one CUDA graph, and its memory;
4. correctness: `pytest -m gpu`, every operation on CUDA against the float64 oracle.

The machine needs torch with CUDA, Triton, NumPy, pytest, a C compiler for Triton's launcher, and
these wheels, which `pip download` fetches where there is an index (all pure Python but h5py,
matplotlib and scipy, which SpikingJelly imports); `pip install --no-index --no-deps --find-links
wheels` puts them in place:

    spikingjelly==2.0.0 snntorch==1.0.0 hypothesis sortedcontainers h5py loguru matplotlib
    SciencePlots scipy tensorboard torchvision tqdm requests packaging

This package needs no installation: the command runs in its source tree.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import common  # noqa: E402

#: Seconds of each section at most, and of all of them.
LIMITS = {"first call": 90, "tests": 150, "neuron": 60, "train step": 130}
IN_ALL = 525
#: Where the tests of a GPU are: to look for them in all files takes longer than to run them.
TESTS = ("kernels", "recipes/test_engine_training.py", "test_convert.py", "conformance")
#: How SpikingJelly 2 is told, before it is imported, what shall compute a LIFNode; what each is.
HOST_VARIABLE = "SJ_LIF_CUDA_IMPLEMENTATION"
HOST_IMPLEMENTATIONS = ("auto", "triton")
STEPS = 4


def sections(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each section."""
    again = [sys.executable, "-m", "benchmarks.gpu", "--device", args.device]
    again += ["--rehearse"] * args.rehearse
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *(f"tests/{t}" for t in TESTS)]
    if importlib.util.find_spec("xdist"):  # compiling is what takes time
        tests += ["-n", str(min(12, os.cpu_count() or 1))]
    if args.rehearse:
        tests = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_devices.py"]
        tests += ["-k", "weights and cpu and layer-mean"]
    found = {
        "first call": [*again, "--section", "first call"],
        **{
            f"neuron, {host}": [*again, "--section", "neuron", "--host", host]
            for host in HOST_IMPLEMENTATIONS
        },
        "train step": [*again, "--section", "train step"],
        "tests": tests,
    }
    return {n: c for n, c in found.items() if not args.only or n.partition(", ")[0] in args.only}


def run_all(args: argparse.Namespace) -> int:
    """Run the sections; returns how many failed."""
    started, failed, log = time.monotonic(), 0, []
    patience = 10 if args.rehearse else 1  # what is slow there is the machine
    with tempfile.TemporaryDirectory() as cache:
        # From an empty compiler cache, which all sections share.
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        for name, command in sections(args).items():
            left = patience * IN_ALL - (time.monotonic() - started)
            kind, _, host = name.partition(", ")
            env[HOST_VARIABLE] = host or "auto"
            said, ended = _run(command, env, max(1, min(patience * LIMITS[kind], left)))
            failed += ended != "ended well"
            log.append(f"== {name}: {ended}\n{said}")
            print(log[-1], flush=True)
    print(f"in all {time.monotonic() - started:.0f} s, {failed} of {len(log)} sections failed")
    if not args.rehearse:
        path = common.RESULTS / f"gpu-{device_name(args.device)}.txt"
        path.write_text("\n".join(log))
    return failed


def _run(command: list[str], env: dict[str, str], limit: float) -> tuple[str, str]:
    with tempfile.TemporaryFile("w+") as out:
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, timeout=limit
            )
            ended = "ended well" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        out.seek(0)
        return out.read()[-20_000:], ended


def device_name(device: str) -> str:
    """What the device calls itself, as part of a file's name."""
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return re.sub(r"\W+", "-", name).strip("-").lower()


def report(case: str, times: dict[str, list[float]], baseline: str, args) -> None:
    """Print, and append to the device's CSV."""
    common.report(f"gpu-{device_name(args.device)}", case, times, baseline, args)


# --------------------------------------------------------------------------- sections


def first_call(args: argparse.Namespace) -> None:
    """Seconds of the first forward and backward of a layer and of a network."""
    from qsnn_ext.models import resnet19

    shape = (STEPS, 2, 64) if args.rehearse else (STEPS, 32, 128, 32, 32)
    x = torch.randn(shape, device=args.device, requires_grad=True)
    rows: list[list[object]] = []
    width, batch = (0.0625, 2) if args.rehearse else (1.0, 16)
    model = resnet19(width=width, T=2, bits="1w-2u").to(args.device)
    images = torch.randn(batch, 3, 32, 32, device=args.device)
    calls = {
        "a layer at 2 bits": lambda: quantized(2, args)(x).sum().backward(),
        "the same again": lambda: quantized(2, args)(x).sum().backward(),
        "ResNet19": lambda: model(images).sum().backward(),
        "ResNet19 again": lambda: model(images).sum().backward(),
    }
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        synchronize(args)
        seconds = time.perf_counter() - start
        print(f"  first call: {name:24s} {seconds:8.3f} s")
        rows.append(["first call", "wall", name, "s", round(seconds, 4), "", "", "", 1])
    if not args.no_csv:
        common.append(f"gpu-{device_name(args.device)}", rows, common.machine(args.device))


def synchronize(args: argparse.Namespace) -> None:
    """Wait for the device."""
    if args.device == "cuda":
        torch.cuda.synchronize()


def quantized(bits: int, args: argparse.Namespace):
    """A quantized layer with the host's defaults."""
    from qsnn_ext.spikingjelly import QuantLIFNode

    return QuantLIFNode(tau=2.0, decay_input=False, step_mode="m", bits=bits).to(args.device)


def neuron_layer(args: argparse.Namespace) -> None:
    """One layer against an implementation of the host's."""
    import neuron as neuron_benchmark
    from spikingjelly.activation_based import neuron

    from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step

    shapes = [(STEPS, 32, 128, 32, 32), (STEPS, 16, 128, 32, 32), (STEPS, 16384 // STEPS)]
    for shape in [(STEPS, 64)] if args.rehearse else shapes:
        # The host's Triton kernels refuse bfloat16 where they alone are asked for.
        for dtype in (torch.float32, *[torch.bfloat16] * (args.host == "auto")):
            x = torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True)
            g = torch.randn(shape, device=args.device, dtype=dtype)
            variants = {}
            node = neuron.LIFNode(tau=2.0, decay_input=False, step_mode="m").to(args.device)
            variants[f"LIFNode, {args.host}"] = neuron_benchmark.layer(node, x, g)
            if args.host == "auto" and not args.rehearse:
                node = neuron.LIFNode(tau=2.0, decay_input=False, step_mode="m").to(args.device)
                variants["torch.compile(LIFNode)"] = neuron_benchmark.layer(
                    torch.compile(node), x, g
                )
            for bits in (2, 4, 8):
                variants[f"{bits} bit"] = neuron_benchmark.layer(quantized(bits, args), x, g)
            name = str(dtype).removeprefix("torch.")
            case = f"neuron fwd+bwd {list(shape)} {name}"
            report(case, common.interleaved(variants, args), next(iter(variants)), args)
    x = torch.randn((STEPS, 64) if args.rehearse else shapes[0], device=args.device)
    alpha = torch.tensor(0.9, device=args.device)

    def forward(mode):
        options = LIFOptions(Surrogate("triangle", 1.0, 0.0, False), 4, alpha=mode)
        given = None if mode == "dynamic" else alpha
        return lambda: lif_multi_step(x, None, options, decay=0.5, alpha=given)

    times = common.interleaved({mode: forward(mode) for mode in ("given", "dynamic")}, args)
    report(f"forward {list(x.shape)}, scale", times, "given", args)


def train_steps(args: argparse.Namespace) -> None:
    """ResNet19 at full width; and what a step holds at its peak."""
    import train_step

    settings = argparse.Namespace(**vars(args))
    settings.T, settings.batch, settings.width = 2, 128, 1.0
    if args.rehearse:
        settings.batch, settings.width = 2, 0.0625  # channels in eights: recipes.engine.setting
    settings.memory_format = "channels_last"
    for precision in ("bf16", "fp32"):
        settings.precision = precision
        x = torch.randn(settings.batch, 3, 32, 32, device=args.device)
        x = x.contiguous(memory_format=torch.channels_last)
        y = torch.randint(10, (settings.batch,), device=args.device)
        variants = {}
        for bits in ("32w-32u", "1w-2u"):
            model = train_step.build(bits, settings, "spikingjelly")
            variants[bits] = train_step.step(model, x, y, settings)
        compiled = train_step.build("32w-32u", settings, "spikingjelly")
        if not args.rehearse:
            train_step.compile_neurons(compiled)
        variants["32w-32u, compiled neurons"] = train_step.step(compiled, x, y, settings)
        if args.device == "cuda":
            for bits in ("32w-32u", "1w-2u"):
                model = train_step.build(bits, settings, "spikingjelly")
                variants[f"{bits}, graph"] = train_step.recorded(model, x, y, settings)
        case = f"ResNet19 step T=2 N={settings.batch} width={settings.width} {precision}"
        times = common.interleaved(variants, settings)
        report(case, times, "32w-32u", args)
        rows: list[list[object]] = []
        for name, call in variants.items():
            if args.device == "cuda" and "graph" not in name:  # which allocates when it is recorded
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                call()
                peak = (torch.cuda.max_memory_allocated() - before) / 1e6
                print(f"  peak of a step, {name:32s} {peak:10.1f} MB")
                rows.append([f"{case}, peak", "", name, "MB", round(peak, 1), "", "", "", 1])
        if rows and not args.no_csv:
            common.append(f"gpu-{device_name(args.device)}", rows, common.machine(args.device))


SECTIONS = {"first call": first_call, "neuron": neuron_layer, "train step": train_steps}


def main() -> int:
    """All sections, or one."""
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU too")
    p.add_argument("--section", choices=SECTIONS)
    p.add_argument("--only", nargs="+", choices=LIMITS, help="some of the sections")
    p.add_argument("--host", choices=HOST_IMPLEMENTATIONS, default="auto")
    args = p.parse_args()
    if args.rehearse:
        args.device, args.repeats, args.no_csv = "cpu", 2, True
    elif args.device != "cuda" or not torch.cuda.is_available():
        p.error("there is no CUDA device; --rehearse runs everything small on the CPU.")
    if not args.section:
        return run_all(args)
    torch.manual_seed(0)
    SECTIONS[args.section](args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
