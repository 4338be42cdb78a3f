"""An int8 convolutional network on the same boards: CMSIS-NN beside this runtime.

    uv pip install --group peers && python -m benchmarks.devices_int8

The network has the layers of ``recipes/results/devices/digits.qsnn`` with ReLU in place of spiking
neurons and one pass in place of time steps. It is trained on the same digits, quantized to int8
after training and compiled to C by BakeNN, which brings the sources of CMSIS-NN 4.0 (and plain C
for cores without its instructions). Start-up code, linker script, main and the way to count are
those of ``benchmarks.devices``. The test digits run through plain C on this machine, whose integers
are the boards'. Writes ``results/devices_int8.json``; ``python docs/generate.py`` puts it into
``docs/devices.md``.
"""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks.devices import built_and_run, samples
from qsnn_ext.deploy.boards import BOARDS, TARGETS, samples_header, write_board
from qsnn_ext.deploy.program import Conv, Pool, Program
from recipes.data.digits import load_images

RESULTS = Path(__file__).with_name("results") / "devices_int8.json"
EPOCHS = 20
#: Board -> BakeNN's target, and whether CMSIS-NN is for it.
RUNS = [
    ("mps2-an386", "cortex-m4", True),
    ("mps2-an386", "cortex-m4", False),
    ("riscv32-virt", "rv32imc", False),
]
HEADER = """\
/* The interface of an exported model over that of the int8 library, for the same main.c. */
#include <stdint.h>
#include "bknn_net.h"

#define MODEL_OUTPUT_SIZE 10
typedef int8_t model_code;
typedef struct { _Alignas(16) uint8_t arena[BKNN_NET_ARENA_SIZE]; } model_memory;

static inline int model_sum(model_memory *memory, const model_code *input, int32_t stride,
                            int64_t sums[MODEL_OUTPUT_SIZE]) {
    int8_t output[MODEL_OUTPUT_SIZE];
    (void)stride;
    bknn_net_infer(memory->arena, input, output);
    for (int i = 0; i < MODEL_OUTPUT_SIZE; i++) sums[i] = output[i];
    return 0;
}

static inline int32_t model_largest(const int64_t sums[MODEL_OUTPUT_SIZE]) {
    int32_t best = 0;
    for (int32_t i = 1; i < MODEL_OUTPUT_SIZE; i++)
        if (sums[i] > sums[best]) best = i;
    return best;
}
"""


def network(program: Program) -> nn.Sequential:
    """The layers of a program as an ordinary convolutional network."""
    layers: list[nn.Module] = []
    for op in program.ops:
        if isinstance(op, Pool):
            layers.append(nn.AvgPool2d(op.kernel))
        elif isinstance(op, Conv):
            channels = program.values[op.source].shape[0], program.values[op.target].shape[0]
            if op.kernel == (1, 1):
                layers += [nn.Flatten(), nn.Linear(*channels)]
            else:
                layers += [nn.Conv2d(*channels, op.kernel, padding=op.padding[0]), nn.ReLU()]
    return nn.Sequential(*layers)


def train(net: nn.Sequential) -> None:
    """On the training digits, augmented as for the spiking network; seconds."""
    for layer in net:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    train_set, _ = load_images(16, augment=True)
    loader = DataLoader(train_set, batch_size=16, shuffle=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * len(loader))
    net.train()
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            schedule.step()
    net.eval()


def quantized(net: nn.Sequential) -> Any:
    """BakeNN's integer graph; two images of each class say how far activations reach (minutes)."""
    import bakenn

    train_set, _ = load_images(16, augment=False)
    labels = np.array(train_set.labels)
    chosen = [i for digit in range(10) for i in np.flatnonzero(labels == digit)[:2]]
    images = [train_set[i][0][None] for i in chosen]
    with tempfile.TemporaryDirectory() as folder:
        return bakenn.compile_torch_ptq(net, images[0], images, folder, name="net").graph


def compiled(graph: Any, folder: Path, target: str, cmsis: bool) -> Any:
    """Write the network as C; returns BakeNN's plan of it."""
    import bakenn

    policy = bakenn.KernelPolicy.STATIC_PRIORITY if cmsis else bakenn.KernelPolicy.PORTABLE
    options = bakenn.CBackendOptions(kernel_policy=policy, enable_cmsis_nn=cmsis)
    return bakenn.compile(
        graph, folder, model_name="net", backend_options=options, target=target
    ).plan


def answers_here(graph: Any, images: Any) -> Any:
    """Integer answers of plain C on this machine: [N, 10]."""
    import bakenn

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = compiled(graph, folder, "portable32", False)
        sources = [str(p) for p in sorted(folder.rglob("*.c"))]
        library = str(folder / "net.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", *sources, "-o", library], check=True)
        infer = ctypes.CDLL(library).bknn_net_infer
        arena, output = ctypes.create_string_buffer(1 << 20), (ctypes.c_int8 * 10)()
        at = ctypes.addressof(arena)
        found = []
        for x in images.permute(0, 2, 3, 1).numpy():
            codes = bakenn.quantize_input(plan, x[None]).tobytes()
            infer(ctypes.c_void_p(at + -at % 64), codes, output)
            found.append(list(output))
    return np.array(found)


def run(
    graph: Any, board: str, target: str, cmsis: bool, images: Any, expected: Any
) -> dict[str, Any]:
    """Compile for a board and run ten samples; what that took.

    Args:
        graph: The quantized network.
        board, target, cmsis: One of ``RUNS``.
        images: Ten, [10, 1, 16, 16].
        expected: Their integer answers.
    """
    import bakenn

    spec = BOARDS[board]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = compiled(graph, folder, target, cmsis)
        nhwc = images.permute(0, 2, 3, 1).numpy()
        codes = np.concatenate([bakenn.quantize_input(plan, x[None]) for x in nhwc])
        sources = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*.c"))]
        for path, text in write_board(board, TARGETS / "bare", sources).items():
            (folder / path).write_text(text)
        (folder / "model.h").write_text(HEADER)
        header = samples_header(codes.astype(np.int32).reshape(10, 1, 16, 16), static=True)
        (folder / "samples.h").write_text(header)
        include = "-I. -Ithird_party/cmsis_nn/Include -Ithird_party/cmsis_core/Include"
        flags = f"{spec.flags} -std=c11 {include} -DBAKENN_CMSIS_NN_BUILTIN_MEMORY"
        variables = ("OPTIMIZE=-O2", f"FLAGS={flags}", "WARNINGS=-w")
        taken = built_and_run(spec, folder, expected, *variables)
    return {
        "board": board, "core": spec.core, "runtime": "CMSIS-NN" if cmsis else "plain C",
        "instructions": taken["instructions"],
        "firmware_flash": taken["flash"] - codes.size, "firmware_ram": taken["ram"],
        "stack": taken["stack"],
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    program, _, _ = samples("digits")
    net = network(program)
    train(net)
    _, test_set = load_images(16, augment=False)
    images, labels = torch.stack([x for x, _ in test_set]), [y for _, y in test_set]  # type: ignore[misc]
    with torch.no_grad():
        floating = (net(images).argmax(1) == torch.tensor(labels)).float().mean().item()
    print(f"trained: {100 * floating:.2f} % in float32", flush=True)
    graph = quantized(net)
    answers = answers_here(graph, images)
    right = int((answers.argmax(1) == np.array(labels)).sum())
    ten = [labels.index(digit) for digit in range(10)]
    rows = []
    for board, target, cmsis in RUNS:
        rows.append(run(graph, board, target, cmsis, images[ten], answers[ten]))
        print(rows[-1], flush=True)
    content = {
        "date": datetime.date.today().isoformat(), "bakenn": importlib.metadata.version("bakenn"),
        "weights": sum(p.numel() for p in net.parameters() if p.ndim > 1),
        "accuracy_float": round(100 * floating, 2),
        "accuracy": round(100 * right / len(labels), 2), "test_samples": len(labels), "rows": rows,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
