"""The backends of the kernels against each other and the host's neuron, over sizes of a layer.

python benchmarks/backends.py                # forward and backward, 10^3 to 2*10^7 values
python benchmarks/backends.py --host snntorch
python benchmarks/backends.py --passes       # what a pass over the neurons costs
python benchmarks/backends.py --weights      # binary weights
python benchmarks/backends.py --first-step   # from `import` to the end of the first step
python benchmarks/backends.py --lines        # what each backend takes to maintain
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import common
import neuron as neuron_benchmark
import snntorch as snn
import torch
from spikingjelly.activation_based import neuron

from qsnn_ext import kernels
from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step
from qsnn_ext.kernels.weights import binary_weight
from qsnn_ext.quantizers import BinaryWeight
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.spikingjelly import QuantLIFNode

STEPS = 4
NEURONS = (256, 2048, 16384, 131072, 1048576, 5242880)
OPTIONS = {"tau": 2.0, "decay_input": False, "step_mode": "m"}

FIRST_STEP = """
import time
start = time.perf_counter()
import torch
from spikingjelly.activation_based import neuron
from qsnn_ext import kernels
from qsnn_ext.models import resnet19
import qsnn_ext.spikingjelly
torch.manual_seed(0)
model = resnet19(T=2, bits={bits!r})
x = torch.randn(4, 3, 32, 32)
with kernels.use_backend({backend!r}):
    model(x).square().mean().backward()
print(time.perf_counter() - start)
"""


def sizes(args):
    """One layer: who is fastest where."""
    for neurons in args.neurons:
        x = torch.randn(STEPS, neurons, requires_grad=True)
        g = torch.randn(STEPS, neurons)
        if args.host == "snntorch":
            base = "Leaky"
            variants = {base: neuron_benchmark.loop(snn.Leaky(0.9), x, g)}
        else:
            base = "torch.compile(LIFNode)"
            variants = {
                "LIFNode": neuron_benchmark.layer(neuron.LIFNode(**OPTIONS), x, g),
                base: neuron_benchmark.layer(torch.compile(neuron.LIFNode(**OPTIONS)), x, g),
            }
        for bits in args.bits:
            for backend in args.backends:
                name = f"{bits} bit, {backend}"
                if args.host == "snntorch":
                    call = neuron_benchmark.loop(QLeaky(0.9, bits=bits), x, g)
                    variants[name] = with_backend(call, backend)
                else:
                    node = QuantLIFNode(**OPTIONS, bits=bits)
                    variants[name] = neuron_benchmark.layer(node, x, g, backend)
        times = common.interleaved(variants, args)
        case = f"{args.host} fwd+bwd [{STEPS}, {neurons}]"
        common.report("backends", case, times, base, args)


def with_backend(call, backend):
    def run():
        with kernels.use_backend(backend):
            call()

    return run


def passes(args):
    """The forward alone: T + 1 passes with a dynamic scale, one with a given one."""
    surrogate = Surrogate("triangle", 1.0, 0.0, False)
    for neurons in NEURONS:
        x = torch.randn(STEPS, neurons)
        alpha = torch.tensor(0.9)

        def forward(mode, x=x, alpha=alpha):
            options = LIFOptions(surrogate, 4, alpha=mode)
            given = None if mode == "dynamic" else alpha
            return lambda: lif_multi_step(
                x, None, options, decay=0.5, alpha=given, backend="native"
            )

        times = common.interleaved({m: forward(m) for m in ("dynamic", "given")}, args)
        common.report("backends", f"forward [{STEPS}, {neurons}], scale", times, "dynamic", args)


def weights(args):
    """Binary weights, forward and backward."""
    for shape in ((64, 27), (128, 1152), (512, 4608)):
        w, g = torch.randn(shape, requires_grad=True), torch.randn(shape)
        quantizer = BinaryWeight()

        def step(backend, w=w, g=g, quantizer=quantizer):
            def call():
                w.grad = None
                with kernels.use_backend(backend):
                    binary_weight(w, quantizer).backward(g)

            return call

        def eager(w=w, g=g, quantizer=quantizer):
            w.grad = None
            quantizer(w).backward(g)

        variants = {"eager": eager, "native": step("native"), "compiled": step("compiled")}
        times = common.interleaved(variants, args)
        common.report("backends", f"binary weights {list(shape)}", times, "eager", args)


def first_step(args):
    """Seconds in a process of its own, the compiler's cache as it is found."""
    rows = []
    for bits, backend in (("32w-32u", "auto"), ("1w-2u", "native"), ("1w-2u", "compiled")):
        program = FIRST_STEP.format(bits=bits, backend=backend)
        seconds = float(
            subprocess.run(
                [sys.executable, "-c", program], check=True, capture_output=True, text=True
            ).stdout
        )
        name = f"ResNet19 {bits}, {backend}"
        print(f"  {name:44s} {seconds:8.2f} s")
        rows.append(["first step", "wall", name, "s", round(seconds, 2), "", "", "", 1])
    if not args.no_csv:
        common.append("backends", rows, common.machine(args.device))


LINES = {
    "native": "_native.py backends/native.py buffers.py native/*",
    "compiled": "backend.py backends/compiled.py",
    "function": "backends/function.py recurrence.py grid.py",
    "eager": "backends/eager.py",
}


def lines(args):
    """Lines of the files that hold a backend, with comments and documentation."""
    folder = Path(kernels.__file__).parent
    for backend, patterns in LINES.items():
        files = [file for pattern in patterns.split() for file in folder.glob(pattern)]
        count = sum(len(file.read_text().splitlines()) for file in files)
        print(f"  {backend:10s} {count:5d} lines in {len(files)} files")


def main():
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--passes", action="store_true")
    p.add_argument("--weights", action="store_true")
    p.add_argument("--first-step", action="store_true")
    p.add_argument("--lines", action="store_true")
    p.add_argument("--host", choices=["spikingjelly", "snntorch"], default="spikingjelly")
    p.add_argument("--bits", type=int, nargs="+", default=[2, 4, 8])
    p.add_argument("--neurons", type=int, nargs="+", default=NEURONS)
    p.add_argument("--backends", nargs="+", default=["native", "compiled", "function"])
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.passes:
        passes(args)
    elif args.lines:
        lines(args)
    elif args.weights:
        weights(args)
    elif args.first_step:
        first_step(args)
    else:
        sizes(args)


if __name__ == "__main__":
    main()
