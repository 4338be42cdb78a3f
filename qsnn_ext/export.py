"""Models for other tools: stock layers in place of quantized ones, and ONNX files.

An integer program (:mod:`qsnn_ext.deploy`) goes to NIR and C; what is here is the simulation, in
floating point, with the weights that it computes with.
"""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts, kernels
from qsnn_ext.errors import (
    FormatError,
    InputTypeError,
    LoweringError,
    MissingDependencyError,
    StateError,
)
from qsnn_ext.files import write_atomically
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.quantizers import MembraneQuantizer
from qsnn_ext.trace import call, check_model, untouched


def stock_copy(layer: nn.Module) -> nn.Module:
    """A copy of a quantized layer as the stock layer that it stands for.

    Args:
        layer: quantized layer.

    Returns:
        Layer of the stock class without hooks, whose parameters are the values that ``layer``
        computes with.
    """
    assert isinstance(layer, QuantizedWeight)
    kind = layer.float_type()
    plain: nn.Module = kind.__new__(kind)
    nn.Module.__init__(plain)
    fresh = vars(plain).keys()
    own = {"_prepared", "_shadows", "quantizer", *layer.weight_names()}
    for name, value in vars(layer).items():
        if name not in fresh and name not in own:
            vars(plain)[name] = copy.copy(value)
    plain.train(layer.training)
    for name, child in layer.named_children():
        plain.add_module(name, copy.deepcopy(child))
    with torch.no_grad():
        for name in layer._parameters.keys() | set(layer.weight_names()):
            value = layer._parameters.get(name)
            if name in layer.weight_names():
                value = layer.effective_weight if name == "weight" else layer.quantized(name)
            clone = None if value is None else nn.Parameter(value.detach().clone())
            plain.register_parameter(name, clone)
        for name, buffer in layer._buffers.items():
            if name != "output_scale":  # is in the weights
                plain.register_buffer(name, None if buffer is None else buffer.clone())
    return plain


class _Called(nn.Module):
    """A model called by ``forward``, as a module of one tensor; the exporter knows no other."""

    def __init__(self, model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None) -> None:
        super().__init__()
        self.model = model
        self._called = forward

    def forward(self, x: Tensor) -> Any:
        """What the model answers; a list of the answers of single steps as one tensor."""
        answer = call(self.model, x, self._called)
        return torch.stack(answer) if isinstance(answer, list) else answer


def to_onnx(
    model: nn.Module,
    sample: Tensor,
    path: str | os.PathLike[str],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    opset: int = 18,
    verify: bool = True,
) -> float | None:
    """Write the simulation of a quantized model as an ONNX file of plain operators.

    The whole sequence is one graph, unrolled over time, from reset membrane potentials. Weights are
    the values that the layers compute with, in float32; potentials are rounded by ``Round``,
    ``Clip`` and multiplications, step by step, so any runtime gives the simulation's spikes, up to
    the rounding of its sums. The shape of the sample is that of the file. The model runs in
    evaluation mode and is left as it was.

    Args:
        model: model of either host, quantized or not.
        sample: its input.
        path: the file, whole or absent.
        forward: ``forward(model, sample)`` for a model that is called in another way, for example
            once per time step.
        opset: version of ONNX's operators.
        verify: run the file in ONNX Runtime, where that is installed, and compare.

    Returns:
        Largest difference from the simulation on the sample; ``None`` where it was not run.

    Raises:
        MissingDependencyError: the package ``onnx`` is not installed.
        InputTypeError: ``model`` is not a module or ``sample`` not a tensor.
        StateError: a membrane scale is not frozen, and would depend on the batch.
        LoweringError: ONNX Runtime does not answer as the simulation does; no file is left.
        FormatError: the file cannot be written.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            f"to_onnx needs onnx, which could not be imported ({error}); install it with: "
            "pip install 'qsnn_ext[onnx]'."
        ) from error
    from torch.onnx import (  # type: ignore[attr-defined]
        register_custom_op_symbolic,
        unregister_custom_op_symbolic,
    )

    model = check_model(model, "to_onnx")
    if not isinstance(sample, Tensor):
        raise InputTypeError(f"to_onnx needs a tensor as sample, got {type(sample).__name__}.")
    for name, module in model.named_modules():
        if isinstance(module, MembraneQuantizer) and not (
            module.mode == "frozen" and module.calibrated
        ):
            raise StateError(
                f"{name} has no frozen scale, so a sample's answer depends on its batch; call "
                "qsnn_ext.calibrate(model, batches) first."
            )
    with untouched(model), kernels.use_backend("eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about constants that the sample fixes
        model.eval()
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if isinstance(child, QuantizedWeight):
                    assert isinstance(child, nn.Module)
                    parent._modules[name] = stock_copy(child)
        wanted = _Called(model, forward)(sample)
        hosts.reset(model)
        buffer = io.BytesIO()
        register_custom_op_symbolic("aten::nextafter", _next_after, opset)
        try:
            torch.onnx.export(
                _Called(model, forward),
                (sample,),
                buffer,  # type: ignore[arg-type]
                input_names=["input"],
                opset_version=opset,
                dynamo=False,
            )
        finally:
            unregister_custom_op_symbolic("aten::nextafter", opset)
    content = buffer.getvalue()
    onnx.checker.check_model(content)
    difference = _difference(content, sample, wanted) if verify else None
    if difference is not None and not difference < 1e-3:
        raise LoweringError(
            f"ONNX Runtime's answer is off by {difference:.3g} from the simulation's; nothing was "
            "written. A spike that sits on its threshold may have gone the other way: try another "
            "sample, or verify=False."
        )
    write_atomically(Path(path), lambda file: file.write(content), FormatError)
    return difference


def _next_after(graph: Any, x: Any, towards: Any) -> Any:
    """The float32 next to a threshold, ONNX having no operator for it.

    A little more than half a unit in the last place, added, rounds to the next number; a unit is
    between 2**-24 and 2**-23 of any number that is not subnormal.
    """

    def constant(value: float) -> Any:
        return graph.op("Constant", value_t=torch.tensor(value))

    half = graph.op("Mul", graph.op("Abs", x), constant(2.0**-24 * (1 + 2.0**-20)))
    up = graph.op("Greater", towards, x)
    return graph.op("Where", up, graph.op("Add", x, half), graph.op("Sub", x, half))


def _difference(content: bytes, sample: Tensor, wanted: Any) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = session.run(None, {"input": sample.numpy(force=True)})
    tensors = wanted if isinstance(wanted, (tuple, list)) else [wanted]
    return max(
        float(np.abs(a - b.numpy(force=True)).max()) for a, b in zip(found, tensors, strict=True)
    )
