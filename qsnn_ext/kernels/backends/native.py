"""The kernels in C on the CPU: every option and dtype, nothing compiled at run time."""

from __future__ import annotations

from typing import Any

from qsnn_ext.kernels import _native
from qsnn_ext.kernels.backends import Call


def covers(call: Call) -> bool:
    """All there is on the CPU, where the package was built with a C compiler."""
    known = call.device.type == "cpu" and call.dtype in _native.DTYPES
    return known and _native.library() is not None


def missing() -> str | None:
    """Why there are none, if there are none."""
    if _native.library() is not None:
        return None
    return (
        f"the native kernels are not there ({_native.PATH.name}): the package was built without a "
        "C compiler. Install one and install the package again, or run python hatch_build.py in "
        "its source tree."
    )


def run(call: Call, *args: Any) -> Any:
    """What the core of this call returns."""
    library = _native.library()
    assert library is not None
    if call.kind == "forward":
        *results, charges = _native.lif_forward(library, call.options, *args)
        return (*results, charges) if call.options.save == "charge" else tuple(results)
    needs = (call.need_v, call.need_params)
    g_x, g_v0, g_params = _native.lif_backward(library, call.options, *(*args, *needs))
    return (g_x, *[g_v0] * call.need_v, *[g_params] * call.need_params)
