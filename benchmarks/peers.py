"""The integer engine beside other inference engines, on the float network and its 8-bit form.

    python -m benchmarks.peers          # prints a table and writes results/peers.json

Needs ``onnx`` and ``onnxruntime`` (``pip install onnx onnxruntime``), which nothing else here does.
All run the ResNet19 of the paper at T = 2 on one image with one thread:

- PyTorch, eager, in float32;
- ONNX Runtime in float32, all graph optimizations;
- ONNX Runtime with 8-bit weights per channel and 8-bit activations, quantized statically with
  calibration on random images, the neurons in float between quantized convolutions, as its tools
  leave them;
- the integer engine, whose network fires at the rate asked for, the whole call ``net(x)``.

Contenders take turns, medians of CPU time of the thread are compared. Nothing is said of accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.inference import build, deployed, medians, processor
from qsnn_ext import models

RESULTS = Path(__file__).parent / "results" / "peers.json"


class UnrolledLIF(nn.Module):
    """The paper's neuron over ``[T, N, ...]`` in operations that every exchange format has."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        """Currents to spikes."""
        v = torch.zeros_like(x[0])
        spikes = []
        for t in range(self.steps):
            h = v * 0.5 + x[t]
            s = (h >= 1.0).to(x.dtype)
            v = h * (1.0 - s)
            spikes.append(s)
        return torch.stack(spikes)


def float_network(steps: int) -> nn.Module:
    """ResNet19 in float32 with neurons that can be exported; gives the same answers."""
    torch.manual_seed(0)
    net = models.resnet19(T=steps).eval()
    for name, module in list(net.named_modules()):
        if hasattr(module, "v_threshold"):
            parent = net.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], UnrolledLIF(steps))
    return net


def sessions(net: nn.Module, size: int, folder: Path) -> dict[str, Any]:
    """ONNX Runtime's sessions of the network: float, and statically quantized."""
    import onnxruntime as ort
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path, prepared, small = (str(folder / f"{n}.onnx") for n in ("float", "prepared", "int8"))
    x = torch.rand(1, 3, size, size)
    torch.onnx.export(net, (x,), path, opset_version=17, input_names=["x"], dynamo=False)
    quant_pre_process(path, prepared, skip_symbolic_shape=True)

    class Images(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = 8

        def get_next(self) -> dict[str, Any] | None:
            self.left -= 1
            return {"x": np.random.rand(1, 3, size, size).astype(np.float32)} if self.left else None

    q.quantize_static(
        prepared, small, Images(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    return {
        name: ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for name, file in (("ONNX Runtime float", path), ("ONNX Runtime int8", small))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = float_network(args.steps)
    engine, rate = deployed("resnet19", args.steps, args.rate, args.size)
    x = torch.rand(1, 3, args.size, args.size)
    shown = x.numpy()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = sessions(net, args.size, Path(folder))
        expected = net(x).numpy()
        exported = found["ONNX Runtime float"].run(None, {"x": shown})[0]
        assert np.abs(exported - expected).max() < 1e-3, "the export gives another answer"
        contenders: dict[str, Any] = {"PyTorch eager": lambda: net(x)}
        for name, session in found.items():
            contenders[name] = lambda session=session: session.run(None, {"x": shown})
        contenders[f"qsnn_ext ({engine.backend})"] = lambda: engine(x)
        result = medians(contenders, args.rounds, time.thread_time)
    ours = result[f"qsnn_ext ({engine.backend})"]
    for name, ms in result.items():
        print(f"{name:<24} {ms:>9.2f} ms {ms / ours:>7.2f} x")
    commit, digest = build()
    content = {
        "commit": commit, "engine": digest, "processor": processor(), "clock": "cpu",
        "network": "resnet19", "timesteps": args.steps, "batch": 1, "threads": 1,
        "firing_rate": round(rate, 4), "rounds": args.rounds,
        "versions": {name: version(name) for name in ("torch", "onnx", "onnxruntime")},
        "median_ms": {name: round(ms, 3) for name, ms in result.items()},
        "times_slower": {name: round(ms / ours, 2) for name, ms in result.items()},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
