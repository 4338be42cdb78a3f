"""One neuron layer, forward and backward: ours against SpikingJelly's LIFNode and snnTorch's Leaky.

python benchmarks/neuron.py                  # [4, 32, 128, 32, 32], k = 2, 4, 8
python benchmarks/neuron.py --sweep          # over T, batch and width, with a plot
python benchmarks/neuron.py --host snntorch  # a loop with explicit membrane, T = 4
"""

from __future__ import annotations

import common
import snntorch as snn
import torch
from spikingjelly.activation_based import functional, neuron

from qsnn_ext import kernels
from qsnn_ext.snntorch import QLeaky
from qsnn_ext.spikingjelly import QuantLIFNode

OPTIONS = {"tau": 2.0, "decay_input": False, "step_mode": "m"}


def layer(node, x, g, backend="auto"):
    def call():
        functional.reset_net(node)
        x.grad = None
        with kernels.use_backend(backend):
            node(x).backward(g)

    return call


def loop(node, x, g):
    def call():
        x.grad = None
        mem = torch.zeros_like(x[0])
        spikes = []
        for step in x:
            spk, mem = node(step, mem)
            spikes.append(spk)
        torch.autograd.backward(spikes, list(g))

    return call


def compare(shape, bits, args, uncompiled=False):
    x = torch.randn(shape, device=args.device, requires_grad=True)
    g = torch.randn(shape, device=args.device)
    variants = {
        "LIFNode": layer(neuron.LIFNode(**OPTIONS).to(args.device), x, g),
        "torch.compile(LIFNode)": layer(
            torch.compile(neuron.LIFNode(**OPTIONS).to(args.device)), x, g
        ),
    }
    for k in bits:
        node = QuantLIFNode(**OPTIONS, bits=k).to(args.device)
        variants[f"QuantLIFNode {k} bit"] = layer(node, x, g)
        if uncompiled:
            for backend in ("function", "eager"):
                variants[f"QuantLIFNode {k} bit, {backend}"] = layer(node, x, g, backend)
    times = common.interleaved(variants, args)
    ratios = common.report("neuron", f"fwd+bwd {list(shape)}", times, "LIFNode", args)
    compiled = ratios["torch.compile(LIFNode)"]
    for name, ratio in ratios.items():
        if name.startswith("Quant"):
            print(f"    {name} / torch.compile(LIFNode) = {ratio / compiled:.3f}")
    return ratios


def compare_leaky(shape, args):
    x = torch.randn(shape, device=args.device, requires_grad=True)
    g = torch.randn(shape, device=args.device)
    variants = {"Leaky": loop(snn.Leaky(0.9).to(args.device), x, g)}
    for k in (2, 4, 8):
        variants[f"QLeaky {k} bit"] = loop(QLeaky(0.9, bits=k).to(args.device), x, g)
    times = common.interleaved(variants, args)
    return common.report("neuron", f"explicit membrane loop {list(shape)}", times, "Leaky", args)


def sweep(args):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text as text, and the same bytes for the same data.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "neuron_sweep"})
    axes = {
        "T, at [T, 8, 64, 16, 16]": {t: (t, 8, 64, 16, 16) for t in (1, 2, 4, 8)},
        "batch, at [4, N, 64, 16, 16]": {n: (4, n, 64, 16, 16) for n in (1, 4, 16, 64)},
        "channels, at [4, 8, C, 16, 16]": {c: (4, 8, c, 16, 16) for c in (16, 64, 256)},
    }
    figure, panels = plt.subplots(1, len(axes), figsize=(12, 3.8), sharey=True)
    for panel, (label, shapes) in zip(panels, axes.items(), strict=True):
        points = [compare(shape, (2, 4), args) for shape in shapes.values()]
        for variant in points[0]:
            panel.plot(list(shapes), [p[variant] for p in points], marker="o", label=variant)
        panel.set(xlabel=label, xscale="log", yscale="log")
        panel.set_xticks(list(shapes), [str(size) for size in shapes])
        panel.minorticks_off()
        panel.set_yticks([0.1, 0.2, 0.5, 1.0, 2.0], ["0.1", "0.2", "0.5", "1", "2"])
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("time, as a multiple of LIFNode's")
    panels[0].legend(fontsize=8)
    figure.suptitle(f"Forward and backward of one layer\n{common.machine(args.device)}", fontsize=8)
    figure.tight_layout()
    path = common.RESULTS / f"neuron_sweep_{args.device}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(f"plot: {path}")


def main():
    p = common.parser(__doc__.splitlines()[0])
    p.add_argument("--host", choices=["spikingjelly", "snntorch"], default="spikingjelly")
    p.add_argument("--sweep", action="store_true")
    p.add_argument("--uncompiled", action="store_true", help="also the two fallbacks")
    p.add_argument("--shape", type=int, nargs="+")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.sweep:
        sweep(args)
    elif args.host == "snntorch":
        for shape in [args.shape] if args.shape else [(4, 128, 1000), (4, 32, 64, 16, 16)]:
            compare_leaky(shape, args)
    else:
        compare(args.shape or (4, 32, 128, 32, 32), (2, 4, 8), args, args.uncompiled)


if __name__ == "__main__":
    main()
