"""The integer engine beside other inference engines, on the float network and its 8-bit forms.

    python -m benchmarks.peers          # prints tables and writes results/peers.json

Needs the dependency group ``peers`` (``onnxruntime``, ``openvino`` and ``nncf``), which nothing
else here does. All run the ResNet19 of the paper at T = 2 on one image, with one thread and two:

- PyTorch in float32, eager and compiled with frozen weights;
- ONNX Runtime and OpenVINO in float32, with all optimizations of the graph;
- OpenVINO in bfloat16, where it says that the processor has it;
- either with 8-bit weights per channel and 8-bit activations, quantized statically on random
  images by its own tools: ONNX Runtime's leave the neurons in float between quantized
  convolutions, NNCF quantizes for OpenVINO what gains by it;
- the integer engine, whose network fires at the rate asked for, the whole call ``net(x)``.

Contenders take turns and medians are compared: CPU time of the process with one thread, wall time
with two. Nothing is said of accuracy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.inference import build, compiled, deployed, medians, processor
from qsnn_ext import models
from qsnn_ext.deploy import DeployedModel

RESULTS = Path(__file__).parent / "results" / "peers.json"
CALIBRATION = 8
"""Random images that 8-bit forms are calibrated on; only times are compared."""
PAUSE = 0.02
"""Seconds before each call: threads that wait for more work do so in a loop at first."""

Contenders = dict[str, Callable[[], Any]]


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


def images(size: int) -> list[np.ndarray]:
    """What 8-bit forms are calibrated on."""
    generator = np.random.default_rng(0)
    return [generator.random((1, 3, size, size), np.float32) for _ in range(CALIBRATION)]


def onnx_runtime(path: str, x: np.ndarray, threads: int) -> Contenders:
    """ONNX Runtime on the network in the file ``path``: float, and statically quantized."""
    import onnxruntime as ort
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(q.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(images(x.shape[-1]))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"x": image}

    prepared, small = path + ".prepared", path + ".int8"
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    q.quantize_static(
        prepared, small, Images(), quant_format=q.QuantFormat.QDQ, per_channel=True,
        activation_type=q.QuantType.QUInt8, weight_type=q.QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )  # fmt: skip
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    found: Contenders = {}
    for name, file in (("ONNX Runtime float", path), ("ONNX Runtime int8", small)):
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        found[name] = lambda session=session: session.run(None, {"x": x})[0]
    return found


def openvino(path: str, x: np.ndarray, threads: int) -> Contenders:
    """OpenVINO on the same file: float, bfloat16 where there is any, quantized by NNCF."""
    import nncf
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    small = nncf.quantize(core.read_model(path), nncf.Dataset(images(x.shape[-1])))
    forms = {"float": (model, "f32"), "int8": (small, "f32")}
    if "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        forms["bf16"] = (model, "bf16")
    found: Contenders = {}
    for name, (network, precision) in forms.items():
        request = core.compile_model(network, "CPU", {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
        }).create_infer_request()  # fmt: skip
        found[f"OpenVINO {name}"] = lambda request=request: request.infer({"x": x})[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    net = float_network(args.steps)
    integer, rate = deployed("resnet19", args.steps, args.rate, args.size)
    x = torch.rand(1, 3, args.size, args.size)
    shown = x.numpy()
    runs = []
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder) / "float.onnx")
        torch.onnx.export(net, (x,), path, opset_version=17, input_names=["x"], dynamo=False)
        expected = net(x).numpy()
        for threads in args.threads:
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            engine = DeployedModel(integer.program, threads=threads)
            ours = f"qsnn_ext ({engine.backend})"
            frozen = compiled(float_network(args.steps), x, freezing=True)
            contenders: Contenders = {
                "PyTorch eager": lambda: net(x),
                "PyTorch compiled": lambda frozen=frozen: frozen(x),
                **onnx_runtime(path, shown, threads),
                **openvino(path, shown, threads),
                ours: lambda engine=engine: engine(x),
            }
            for name, call in contenders.items():
                if not name.startswith("qsnn_ext") and "int8" not in name and "bf16" not in name:
                    assert np.abs(np.asarray(call()) - expected).max() < 1e-3, f"{name} is wrong"
            clock = time.process_time if threads == 1 else time.perf_counter
            result = medians(contenders, args.rounds, clock, PAUSE)
            print(f"\n{threads} thread(s)")
            for name, ms in result.items():
                print(f"{name:<24} {ms:>9.2f} ms {ms / result[ours]:>7.2f} x")
            runs.append({
                "threads": threads, "clock": "cpu" if threads == 1 else "wall",
                "median_ms": {name: round(ms, 3) for name, ms in result.items()},
                "times_slower": {name: round(ms / result[ours], 2) for name, ms in result.items()},
            })  # fmt: skip
    commit, digest = build()
    packages = ("torch", "onnx", "onnxruntime", "openvino", "nncf")
    content = {
        "commit": commit, "engine": digest, "processor": processor(),
        "network": "resnet19", "timesteps": args.steps, "batch": 1,
        "firing_rate": round(rate, 4), "rounds": args.rounds,
        "versions": {name: version(name) for name in packages}, "runs": runs,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
