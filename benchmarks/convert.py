"""Converting a model: seconds of ``quantize_`` beside building the float model.

python benchmarks/convert.py
"""

from __future__ import annotations

import common
import torch
from spikingjelly.activation_based import neuron, surrogate
from spikingjelly.activation_based.model import spiking_resnet

from qsnn_ext import quantize_


def main():
    p = common.parser(__doc__.splitlines()[0])
    args = p.parse_args()
    torch.set_num_threads(args.threads)

    def build():
        return spiking_resnet.spiking_resnet18(
            spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan(), detach_reset=True
        )

    def build_and_convert():
        return quantize_(build(), "1w-2u")

    variants = {"build float": build, "build float, quantize_": build_and_convert}
    times = common.interleaved(variants, args)
    common.report("convert", "spiking_resnet18", times, "build float", args)


if __name__ == "__main__":
    main()
