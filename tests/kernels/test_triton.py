"""The kernels of a GPU, generated and compiled for one without one.

PyTorch's compiler generates Triton code from the cores, with a device described to it, and Triton
compiles it down to machine code for that device. What is left untested is running it.
"""

import contextlib
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qsnn_ext.kernels import LIFOptions, Surrogate
from qsnn_ext.kernels.recurrence import backward_core, forward_core
from qsnn_ext.kernels.weights import _backward_core, _forward_core

triton = pytest.importorskip("triton")
from torch._inductor.codecache import PyCodeCache  # noqa: E402
from torch._inductor.debug import DebugContext  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.runtime import triton_helpers  # noqa: E402
from torch._inductor.runtime.hints import DeviceProperties  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch.utils._triton import has_triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: test_devices.py runs"),
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch was built without CUDA"),
]

PROPERTIES = {
    "major": 9, "minor": 0, "multi_processor_count": 132, "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "warp_size": 32,
    "total_memory": 80 << 30, "name": "NVIDIA H100", "shared_memory_per_block": 49152,
}  # fmt: skip


class Driver:
    """Triton's, of a device that is described and not there."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)


@contextlib.contextmanager
def described_gpu():
    device = mock.Mock(**PROPERTIES)
    device.name = PROPERTIES["name"]
    hints = DeviceProperties(
        type="cuda", index=0, multi_processor_count=132, cc=90, major=9,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
        max_threads_per_block=1024, warp_size=32,
    )  # fmt: skip
    before = driver._active
    with contextlib.ExitStack() as stack:
        for name, value in {
            "is_available": True, "get_device_properties": device, "current_device": 0,
            "get_device_capability": (9, 0), "device_count": 1,
        }.items():  # fmt: skip
            answer = mock.Mock(return_value=value)
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", return_value=hints))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu"))
        driver.set_active(Driver())
        has_triton.cache_clear()  # whoever asked before was told that there is no GPU
        try:
            yield
        finally:
            driver._active = before
            has_triton.cache_clear()


def kernels_of(core, shapes):
    """The Triton kernels of a core over float tensors of these shapes, compiled; their names."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        args = [torch.empty(shape, device="cuda", dtype=dtype) for shape, dtype in shapes]
        graph = make_fx(core, decomposition_table=select_decomp_table(), tracing_mode="fake")(*args)
    with described_gpu():
        return _compiled(
            GraphLowering(graph, shape_env=mode.shape_env, example_inputs=args), mode, args
        )


def _compiled(lowered, mode, args):
    with (
        V.set_graph_handler(lowered),
        V.set_fake_mode(mode),
        V.set_debug_handler(DebugContext()),
    ):
        lowered.run(*args)
        wrapper, _ = lowered.codegen()
    compiled = []
    sources = wrapper.value.split("async_compile.triton('")[1:]
    for source in sources:
        name, text = source.split("', '''", 1)
        kernel = getattr(PyCodeCache.load(text.split("''', device_str")[0]), name)
        kernel._precompile_worker()
        assert kernel.compile_results
        for made in kernel.compile_results:
            assert Path(made.kernel.cubin_path).read_bytes()[:4] == b"\x7fELF"
        compiled.append(name)
    return compiled


FLOAT, HALF = torch.float32, torch.bfloat16
OPTIONS = {
    "paper": LIFOptions(Surrogate("triangle", 1.0, 0.0, False), 2),
    "algorithm 1": LIFOptions(
        Surrogate("sigmoid", 4.0, 0.0, False), 4, "absmax", order="quantize_first", reset="soft",
        squash="tanh",
    ),
    "running": LIFOptions(Surrogate("atan", 2.0, 0.0, False), 8, alpha="running"),
    "delayed": LIFOptions(Surrogate("atan", 2.0, 0.0, True), 4, reset="hard", delayed=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_neurons(name):
    o, steps, size = OPTIONS[name], 4, 1 << 16
    dtype = HALF if name == "paper" else FLOAT
    whole, state = ((steps, size), dtype), ((size,), dtype)
    params, scalar = ((5,), FLOAT), ((), FLOAT)

    def forward(x, v, p, alpha):
        return forward_core(o, steps, dtype)(x, v, p, alpha if o.alpha == "running" else None)

    assert len(kernels_of(forward, [whole, state, params, scalar])) >= steps

    def backward(g, g_v, counts, x, v, p, alphas):
        core = backward_core(LIFOptions(**{**vars(o), "save": "input"}), steps, dtype, True, True)
        return core(g, g_v, counts, x, v, p, alphas)

    counts, alphas = ((steps,), FLOAT), ((steps + 1,), FLOAT)
    assert kernels_of(backward, [whole, state, counts, whole, state, params, alphas])


@pytest.mark.parametrize("over", ["layer", "channel", "none"])
def test_weights(over):
    rows, columns = 128, 1152
    groups = rows if over == "channel" else 1
    w = ((rows, columns), FLOAT)
    assert kernels_of(_forward_core(over, "mean"), [w])
    shapes = [w, w, ((groups,), FLOAT), ((groups,), FLOAT), ((rows,), FLOAT), ((), FLOAT)]
    assert kernels_of(_backward_core(over, "annealed"), shapes)
