"""The engine's two ways to count in layers of single bits, over the density of their input.

``python -m benchmarks.counting`` prints, for every path of the engine and several layers, how many
times faster AND and popcount is than listing active inputs: above 1 it pays. ``DENSE_COST`` in
``qsnn_ext/deploy/runtime/qsnn_dense.h`` was chosen from this table.
"""

from __future__ import annotations

import time

import numpy as np

from qsnn_ext.deploy import backends
from qsnn_ext.deploy.engine import EngineSession
from qsnn_ext.deploy.image import build_image
from qsnn_ext.deploy.program import Conv, Neuron, Op, Program, Value, words

LAYERS = (  # input channels, side, output channels, kernel
    (512, 1, 10, 1), (512, 4, 64, 1), (128, 16, 32, 3), (64, 32, 64, 3),
    (128, 32, 128, 3), (256, 16, 256, 3), (512, 8, 512, 3),
)  # fmt: skip
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
COPIES = 8  # of a layer in a program, so that the rest of it counts little


def neuron(name: str, source: int, target: int, threshold: int) -> Neuron:
    return Neuron(
        name, source, target, 2, np.zeros((1, 4), np.int32), np.array([threshold], np.int32),
        np.array([-5, 5], np.int32), "hard", np.array([0], np.int32),
    )  # fmt: skip


def program(cin: int, side: int, cout: int, kernel: int, copies: int) -> Program:
    """Spikes that are the input, and ``copies`` layers that all read them."""
    rng = np.random.default_rng(0)
    values = [Value("input", (cin, side, side), 0), Value("spikes", (cin, side, side), 1)]
    ops: list[Op] = [neuron("first", 0, 1, 1)]
    for i in range(copies):
        bits = np.zeros((1, kernel * kernel * cin, words(cout) * 32), np.uint8)
        bits[:, :, :cout] = rng.integers(0, 2, (1, bits.shape[1], cout))
        weight = np.packbits(bits, axis=-1, bitorder="little").view("<u4")
        values.append(Value(f"current{i}", (cout, side, side), 0))
        values.append(Value(f"spikes{i}", (cout, side, side), 1))
        at, edge = len(values), kernel // 2
        ops.append(
            Conv(
                f"layer{i}", 1, at - 2, weight, (kernel, kernel), (1, 1), (edge,) * 4, (1, 1), 1,
                np.full(cout, 1000, np.int32), np.full(cout, 8, np.uint8), np.zeros(cout, np.int32),
            )
        )  # fmt: skip
        ops.append(neuron(f"neuron{i}", at - 2, at - 1, 100))
    return Program(values, ops, (len(values) - 1,), input_range=(0, 1))


def fastest(session: EngineSession, x: np.ndarray, rounds: int = 9) -> float:
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        session.run(x, 4, static=True)
        times.append(time.thread_time() - start)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(1)
    print("layer                       " + "".join(f"{100 * d:6.0f} %" for d in DENSITIES))
    for backend in backends()[:-1]:
        for cin, side, cout, kernel in LAYERS:
            shape = (cin, side, cout, kernel)
            whole, rest = program(*shape, COPIES), program(*shape, 0)
            events, dense = (
                EngineSession(whole, backend=backend, image=build_image(whole, method))
                for method in ("events", "dense")
            )
            empty = EngineSession(rest, backend=backend)
            ratios = []
            for density in DENSITIES:
                x = (rng.random((1, cin, side, side)) < density).astype(np.int32)
                base = fastest(empty, x)
                ratios.append((fastest(events, x) - base) / (fastest(dense, x) - base))
            name = f"{backend} {kernel}x{kernel} {cin}@{side}x{side} to {cout}"
            print(f"{name:28}" + "".join(f"{r:8.2f}" for r in ratios), flush=True)


if __name__ == "__main__":
    main()
