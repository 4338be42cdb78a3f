"""A whole ResNet19 training step: 1w-2u against the float network on SpikingJelly's LIFNode.

Also what binarising the weights alone takes, forward and backward, fused and in plain autograd.

python benchmarks/train_step.py              # T = 2, N = 16
"""

from __future__ import annotations

import common
import torch
from torch.nn import functional as nn_functional

from qsnn_ext import kernels
from qsnn_ext.kernels.weights import PreparedWeight
from qsnn_ext.models import resnet19
from qsnn_ext.quantizers import BinaryWeight
from qsnn_ext.regularizers import WSDRRegularizer
from qsnn_ext.spikingjelly import restart


def step(model, x, y, args, backend="auto", regularizer=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def call():
        with kernels.use_backend(backend):
            restart(model)
            optimizer.zero_grad()
            loss = nn_functional.cross_entropy(model(x).mean(0), y)
            if regularizer is not None:
                loss = loss + regularizer()
            loss.backward()
            optimizer.step()

    return call


def compile_neurons(model):
    from spikingjelly.activation_based import neuron

    for node in model.modules():
        if isinstance(node, neuron.LIFNode):
            node.forward = torch.compile(node.forward)
    return model


def binarize(model, backend):
    """All binary weights of a step, prepared once, and their backward."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "quantizer", None), BinaryWeight)]
    grads = [torch.randn_like(layer.weight) for layer in layers]

    def call():
        with kernels.use_backend(backend):
            for layer, grad in zip(layers, grads, strict=True):
                value = PreparedWeight().get(layer.weight, layer.quantizer)
                torch.autograd.grad(value, layer.weight, grad)

    return call


def build(bits, args):
    torch.manual_seed(0)
    return resnet19(bits=bits, T=args.T, width=args.width).to(args.device).train()


def main():
    p = common.parser(__doc__.splitlines()[0])
    p.set_defaults(repeats=9)
    p.add_argument("--T", type=int, default=2)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--width", type=float, default=1.0)
    p.add_argument("--bits", nargs="+", default=["1w-2u"])
    p.add_argument("--uncompiled", action="store_true", help="also the two fallbacks")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    y = torch.randint(10, (args.batch,), device=args.device)
    variants = {
        "float": step(build("32w-32u", args), x, y, args),
        "float, compiled LIFNode": step(compile_neurons(build("32w-32u", args)), x, y, args),
    }
    for bits in args.bits:
        model = build(bits, args)
        variants[bits] = step(model, x, y, args)
        watched = build(bits, args)
        variants[f"{bits}, WS-DR"] = step(watched, x, y, args, regularizer=WSDRRegularizer(watched))
        variants[f"{bits}, binarising alone"] = binarize(model, "auto")
        variants[f"{bits}, binarising alone, plain"] = binarize(model, "eager")
        if args.uncompiled:
            for backend in ("function", "eager"):
                variants[f"{bits}, {backend}"] = step(model, x, y, args, backend)
    times = common.interleaved(variants, args)
    case = f"ResNet19 step T={args.T} N={args.batch} width={args.width}"
    ratios = common.report("train_step", case, times, "float", args)
    for bits in args.bits:
        ratio = ratios[bits] / ratios["float, compiled LIFNode"]
        print(f"    {bits} / float with compiled LIFNode = {ratio:.3f}")
        fused, plain = (ratios[f"{bits}, binarising alone{how}"] for how in ("", ", plain"))
        print(
            f"    binarising the weights: {100 * fused / ratios[bits]:.1f} % of the step; "
            f"plain autograd would take {100 * plain / ratios[bits]:.1f} %"
        )


if __name__ == "__main__":
    main()
