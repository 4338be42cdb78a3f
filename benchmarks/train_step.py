"""A whole ResNet19 training step: 1w-2u against the float network on the host's own neuron.

Also what binarising the weights alone takes, forward and backward, fused and in plain autograd.

python benchmarks/train_step.py              # T = 2, N = 16, float32, contiguous
python benchmarks/train_step.py --best       # as a user would train: channels-last, width 1/4,
                                             # N = 128, and bfloat16 where the device has it
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import common
import torch
from torch.nn import functional as nn_functional

from qsnn_ext import hosts, kernels
from qsnn_ext.kernels.weights import PreparedWeight
from qsnn_ext.models import resnet19
from qsnn_ext.quantizers import BinaryWeight
from qsnn_ext.regularizers import WSDRRegularizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from recipes.engine.graphs import StepGraph


def loss_of(model, x, y, args, cached=True):
    lowered = args.precision == "bf16"
    with torch.autocast(args.device, torch.bfloat16, enabled=lowered, cache_enabled=cached):
        logits = model(x)
    return nn_functional.cross_entropy(logits.float().mean(0), y)


def step(model, x, y, args, backend="auto", regularizer=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def call():
        with kernels.use_backend(backend):
            optimizer.zero_grad()
            loss = loss_of(model, x, y, args)
            if regularizer is not None:
                loss = loss + regularizer()
            loss.backward()
            optimizer.step()

    return call


def recorded(model, x, y, args):
    """The same step as one CUDA graph, but for the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    graph = StepGraph(lambda x, y: (loss_of(model, x, y, args, cached=False),), model)

    def call():
        graph(x, y)
        optimizer.step()

    return call


def compile_neurons(model):
    for node in model.modules():
        if hosts.adapter_of(node) is not None:
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


def build(bits, args, host):
    torch.manual_seed(0)
    model = resnet19(bits=bits, T=args.T, width=args.width, host=host)
    return model.to(args.device, memory_format=memory_format(args)).train()


def memory_format(args):
    last = args.memory_format == "channels_last"
    return torch.channels_last if last else torch.contiguous_format


def main():
    p = common.parser(__doc__.splitlines()[0], repeats=None)
    p.add_argument("--T", type=int, default=2)
    p.add_argument("--batch", type=int)
    p.add_argument("--width", type=float)
    p.add_argument("--bits", nargs="+", default=["1w-2u"])
    p.add_argument("--uncompiled", action="store_true", help="also the two fallbacks")
    p.add_argument("--hosts", nargs="+", default=["spikingjelly"], help="or snntorch, or both")
    p.add_argument("--memory-format", choices=["contiguous", "channels_last"])
    p.add_argument("--precision", choices=["fp32", "bf16"])
    p.add_argument("--best", action="store_true", help="the device's best setting, less often")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    choose(args)
    for host in args.hosts:
        measure(args, host)


def choose(args):
    """Fill in what was not given."""
    native = args.device == "cuda" or any(
        getattr(torch.cpu, ask, lambda: False)()
        for ask in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    args.batch = args.batch or (128 if args.best else 16)
    args.width = args.width or (0.25 if args.best else 1.0)
    args.repeats = args.repeats or (5 if args.best else 9)
    args.memory_format = args.memory_format or ("channels_last" if args.best else "contiguous")
    args.precision = args.precision or ("bf16" if args.best and native else "fp32")


def measure(args, host):
    x = torch.randn(args.batch, 3, 32, 32, device=args.device)
    x = x.contiguous(memory_format=memory_format(args))
    y = torch.randint(10, (args.batch,), device=args.device)
    variants = {
        "float": step(build("32w-32u", args, host), x, y, args),
        "float, compiled neurons": step(compile_neurons(build("32w-32u", args, host)), x, y, args),
    }
    for bits in args.bits:
        model = build(bits, args, host)
        variants[bits] = step(model, x, y, args)
        if not args.best:  # whose rounds take minutes as it is
            watched = build(bits, args, host)
            term = WSDRRegularizer(watched)
            variants[f"{bits}, WS-DR"] = step(watched, x, y, args, regularizer=term)
            variants[f"{bits}, binarising alone"] = binarize(model, "auto")
            variants[f"{bits}, binarising alone, plain"] = binarize(model, "eager")
        if args.uncompiled:
            for backend in ("function", "eager"):
                variants[f"{bits}, {backend}"] = step(model, x, y, args, backend)
    times = common.interleaved(variants, args)
    case = f"ResNet19 step T={args.T} N={args.batch} width={args.width}"
    if (host, args.memory_format, args.precision) != ("spikingjelly", "contiguous", "fp32"):
        case += f" {host} {args.memory_format} {args.precision}"
    ratios = common.report("train_step", case, times, "float", args)
    for name, values in times.items():
        if name in ratios and "alone" not in name:
            print(f"    {name}: {args.batch / statistics.median(values):.1f} images a second")
    for bits in args.bits:
        ratio = ratios[bits] / ratios["float, compiled neurons"]
        print(f"    {bits} / float with compiled neurons = {ratio:.3f}")
        if args.best:
            continue
        fused, plain = (ratios[f"{bits}, binarising alone{how}"] for how in ("", ", plain"))
        print(
            f"    binarising the weights: {100 * fused / ratios[bits]:.1f} % of the step; "
            f"plain autograd would take {100 * plain / ratios[bits]:.1f} %"
        )


if __name__ == "__main__":
    main()
