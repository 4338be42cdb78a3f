"""The native kernels against the compiled cores and the host's neuron, over sizes of a layer.

python benchmarks/native.py                  # forward and backward, 10^3 to 2*10^7 values
python benchmarks/native.py --passes         # what a pass over the neurons costs
python benchmarks/native.py --weights        # binary weights
python benchmarks/native.py --first-step     # from `import` to the end of the first step
"""

from __future__ import annotations

import subprocess
import sys

import common
import torch
from spikingjelly.activation_based import functional, neuron

from qsnn_ext import kernels
from qsnn_ext.kernels import LIFOptions, Surrogate, lif_multi_step
from qsnn_ext.kernels.weights import binary_weight
from qsnn_ext.quantizers import BinaryWeight
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
x = torch.randn(2, 4, 3, 32, 32)
with kernels.use_backend({backend!r}):
    model(x).square().mean().backward()
print(time.perf_counter() - start)
"""


def layer(node, x, g, backend="auto"):
    def call():
        functional.reset_net(node)
        x.grad = None
        with kernels.use_backend(backend):
            node(x).backward(g)

    return call


def sizes(args):
    """One layer: who is fastest where."""
    for neurons in NEURONS:
        x = torch.randn(STEPS, neurons, requires_grad=True)
        g = torch.randn(STEPS, neurons)
        variants = {
            "LIFNode": layer(neuron.LIFNode(**OPTIONS), x, g),
            "torch.compile(LIFNode)": layer(torch.compile(neuron.LIFNode(**OPTIONS)), x, g),
        }
        for bits in (2, 4, 8):
            node = QuantLIFNode(**OPTIONS, bits=bits)
            for backend in ("native", "compiled"):
                variants[f"QuantLIFNode {bits} bit, {backend}"] = layer(node, x, g, backend)
        times = common.interleaved(variants, args)
        ratios = common.report("native", f"fwd+bwd [{STEPS}, {neurons}]", times, "LIFNode", args)
        compiled = ratios["torch.compile(LIFNode)"]
        for name, ratio in ratios.items():
            if name.startswith("Quant"):
                print(f"    {name} / torch.compile(LIFNode) = {ratio / compiled:.3f}")


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
        common.report("native", f"forward [{STEPS}, {neurons}], scale", times, "dynamic", args)


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
        common.report("native", f"binary weights {list(shape)}", times, "eager", args)


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
        common.append("native", rows, common.machine(args.device))


def main():
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--passes", action="store_true")
    p.add_argument("--weights", action="store_true")
    p.add_argument("--first-step", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.passes:
        passes(args)
    elif args.weights:
        weights(args)
    elif args.first_step:
        first_step(args)
    else:
        sizes(args)


if __name__ == "__main__":
    main()
