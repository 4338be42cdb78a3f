"""How much memory a network takes for inference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from qsnn_ext import hosts, text
from qsnn_ext.errors import ConfigError, InputError, QSNNError
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.membranes import Membrane
from qsnn_ext.quantizers import MembraneQuantizer, Quantizer
from qsnn_ext.trace import call, check_model, untouched, watching

Accounting = Literal["paper", "resident"]
Execution = Literal["step", "layer"]

WORD_BITS = 32  # of a packed word


def words(bits: int) -> int:
    """Number of 32-bit words that hold ``bits`` bits."""
    return -(-bits // WORD_BITS)


@dataclass(frozen=True)
class LayerFootprint:
    """Bytes of one layer.

    Attributes:
        name: module name.
        kind: class name.
        weight_bits: bits of one weight; ``None`` for a layer without weights.
        membrane_bits: bits of one membrane potential; ``None`` for a layer without.
        weights: bytes of the weights.
        scales: bytes of the scale factors of weights and membrane potentials.
        others: bytes of biases, batch norm and further parameters.
        membrane_elements: membrane potentials of one sample.
        membrane: bytes of the membrane potentials of one sample.
    """

    name: str
    kind: str
    weight_bits: int | None
    membrane_bits: int | None
    weights: float
    scales: float
    others: float
    membrane_elements: int
    membrane: float


@dataclass(frozen=True)
class Footprint:
    """Memory for inference. ``dataclasses.replace(f, batch=64)`` gives that of another batch.

    Attributes:
        layers: one row per layer with parameters or membrane potentials, in definition order; all
            numbers are per sample.
        batch: number of samples held at once.
        accounting: ``"paper"`` or ``"resident"``.
        execution: ``"step"`` or ``"layer"``: which membrane potentials live at the same time.
    """

    layers: tuple[LayerFootprint, ...]
    batch: int
    accounting: Accounting
    execution: Execution

    @property
    def parts(self) -> dict[str, float]:
        """Bytes by what they hold: ``weights``, ``scales``, ``others``, ``membrane``."""
        membranes = [layer.membrane for layer in self.layers]
        held = max(membranes, default=0.0) if self.execution == "layer" else sum(membranes)
        return {
            "weights": sum(layer.weights for layer in self.layers),
            "scales": sum(layer.scales for layer in self.layers),
            "others": sum(layer.others for layer in self.layers),
            "membrane": self.batch * held,
        }

    @property
    def bytes(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def megabytes(self) -> float:
        """All parts together, in units of 10^6 bytes."""
        return self.bytes / 1e6

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {
            "accounting": self.accounting,
            "execution": self.execution,
            "batch": self.batch,
            "megabytes": self.megabytes,
            "parts": self.parts,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        """A table: bytes per layer, parts and total."""
        head = ("layer", "kind", "w bits", "u bits", "weights", "scales", "others", "membrane")
        rows = [
            (
                layer.name,
                layer.kind,
                _cell(layer.weight_bits),
                _cell(layer.membrane_bits),
                *(f"{n:,.0f}" for n in (layer.weights, layer.scales, layer.others)),
                f"{self.batch * layer.membrane:,.0f}",
            )
            for layer in self.layers
        ]
        parts = ", ".join(f"{part} {n / 1e6:.3f}" for part, n in self.parts.items())
        which = "the largest membrane" if self.execution == "layer" else "every membrane"
        return (
            f"{text.columns(head, rows)}\n"
            f"bytes, batch {self.batch}, {self.accounting} accounting, {which} held\n"
            f"total {self.megabytes:.3f} MB ({parts})"
        )


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


# --------------------------------------------------------------------------- one layer


def rows_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that get a row: neurons, and owners of parameters or buffers.

    What a quantizer holds belongs to its layer.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Quantizer):
            continue
        tensors = (*module._parameters.values(), *module._buffers.values())
        if any(tensor is not None for tensor in tensors) or hosts.adapter_of(module) is not None:
            found[name] = module
    return found


def membrane_quantizer_of(module: nn.Module) -> MembraneQuantizer | None:
    """The quantizer of a neuron's membrane potential; ``None`` for a float one."""
    quantizer = getattr(module, "membrane", None)
    return quantizer if isinstance(quantizer, MembraneQuantizer) else None


class LayerBytes:
    """Counts bytes, layer by layer; a tensor that several layers share is counted once."""

    def __init__(self) -> None:
        self._counted: set[int] = set()

    def _new(self, tensor: torch.Tensor | None) -> bool:
        if tensor is None or id(tensor) in self._counted:
            return False
        self._counted.add(id(tensor))
        return True

    def parameters(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that ``module`` itself owns and no layer before it did."""
        own = module._parameters.items()
        return {name: p for name, p in own if p is not None and self._new(p)}

    def buffers(self, module: nn.Module, persistent: bool = False) -> list[torch.Tensor]:
        """Buffers of ``module`` and its quantizers, membrane potentials left out.

        Args:
            module: whose buffers.
            persistent: only those that a checkpoint keeps, and of ``module`` itself.
        """
        spiking = hosts.adapter_of(module) is not None
        transient = module._non_persistent_buffers_set
        own = [
            buffer
            for name, buffer in module._buffers.items()
            if name not in transient or not (spiking or persistent)
        ]
        if not persistent:
            for child in module._modules.values():  # layers show no quantizer among children()
                if isinstance(child, Quantizer):
                    own += child.buffers()
        return [buffer for buffer in own if buffer is not None and self._new(buffer)]


def weight_bits(module: nn.Module) -> int | None:
    """Bits of one weight; 8 times the element size in floating point, ``None`` without weights."""
    if isinstance(module, QuantizedWeight):
        return module.bits
    weight = module._parameters.get("weight")
    return None if weight is None else 8 * weight.element_size()


def packed_weight(module: nn.Module, weight: torch.Tensor) -> int:
    """Bytes of a quantized layer's packed weights.

    A row holds what one input position gives to every output channel of its group, and is padded to
    whole words: bits for 1-bit weights, else a byte per code.

    Args:
        module: layer with quantized weights.
        weight: its latent weights.
    """
    assert isinstance(module, QuantizedWeight)
    groups = int(getattr(module, "groups", 1))
    by_output = module.rows(weight)
    width = by_output.shape[0] // groups
    rows = groups * by_output[0].numel()
    return rows * words(width * (1 if module.bits == 1 else 8)) * WORD_BITS // 8


def packed_membrane(shape: Sequence[int], bits: int) -> int:
    """Bytes of packed membrane codes: per position, ``bits`` bit planes over the channels.

    Args:
        shape: ``[N, C, ...]``; each plane of C bits is padded to whole words.
        bits: of one code.
    """
    channels = shape[1] if len(shape) > 1 else 1
    positions = math.prod(shape) // max(1, channels)
    return positions * bits * words(channels) * WORD_BITS // 8


def layer_footprint(
    name: str,
    module: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    constants: int,
    membrane: Membrane | None,
    accounting: Accounting,
    bits: int | None = None,
) -> LayerFootprint:
    """Bytes of one layer in one accounting.

    Args:
        name: for the row.
        module: the layer.
        parameters: those of its parameters that are counted here.
        constants: bytes of the buffers that inference needs.
        membrane: what a pass has seen of its membrane potential.
        accounting: see :func:`footprint`.
        bits: counts the weights at this width instead of their own.
    """
    resident = accounting == "resident"
    width = bits if bits is not None else weight_bits(module)
    weights = scales = others = 0.0
    for key, parameter in parameters.items():
        if key == "weight" and (isinstance(module, QuantizedWeight) or bits is not None):
            assert width is not None
            weights += parameter.numel() * width / 8
            if resident and isinstance(module, QuantizedWeight) and bits is None:
                weights = packed_weight(module, parameter)
                scales += module.quantizer.scale_count(parameter) * parameter.element_size()
        elif key == "weight" and parameter.dim() > 1:
            weights += parameter.numel() * parameter.element_size()
        else:
            others += parameter.numel() * parameter.element_size()
    if resident and isinstance(module, _NormBase):
        # Statistics, scale and shift fold into one factor and one summand per channel.
        if module.running_mean is not None:
            others = 2 * module.num_features * module.running_mean.element_size()
    elif resident:
        others += constants

    elements, held, quantizer = 0, 0.0, None
    if membrane is not None:
        quantizer = membrane_quantizer_of(module)
        elements = membrane.elements
        held = elements * (membrane.itemsize if quantizer is None else quantizer.bits / 8)
        if resident and quantizer is not None:
            held = membrane.states * packed_membrane(membrane.shape, quantizer.bits)
            scales += 4
    return LayerFootprint(
        name=name or "(model)",
        kind=type(module).__name__,
        weight_bits=width if "weight" in module._parameters else None,
        membrane_bits=None
        if membrane is None
        else (8 * membrane.itemsize if quantizer is None else quantizer.bits),
        weights=weights,
        scales=scales,
        others=others,
        membrane_elements=elements,
        membrane=held,
    )


# --------------------------------------------------------------------------- a network


def footprint(
    model: nn.Module,
    batch: int = 1,
    input_shape: Sequence[int] = (3, 32, 32),
    accounting: Accounting = "paper",
    *,
    execution: Execution | None = None,
    time_steps: int | None = None,
    weight_bits: Mapping[str, int] | None = None,
    sample: Any = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Footprint:
    """Memory that ``model`` takes for inference.

    The sizes of the membrane potentials are those of a forward pass on zeros, or on a sample. The
    model is left as it was.

    ``"paper"`` counts as Table 2 of the paper does: weights at their bits, all other parameters at
    their own precision, and the potentials of the single largest layer; no scale factors, no
    statistics, no padding. ``"resident"`` counts what inference holds: packed words with their
    padding, scale factors, batch norm folded to a factor and a summand per channel, constants of
    the neurons, and potentials as ``execution`` says. The buffers in which spikes travel between
    layers, and code, are in neither.

    Args:
        model: SpikingJelly or snnTorch network, quantized or not.
        batch: number of samples held at once.
        input_shape: shape of one sample, without batch and time.
        accounting: ``"paper"`` or ``"resident"``.
        execution: ``"step"`` when all layers do one time step after the other, so that every
            membrane potential is held; ``"layer"`` when each layer does all its time steps at
            once, so that only the largest is. The default is ``"layer"`` for the paper's
            accounting and ``"step"`` for the resident one.
        time_steps: for a model whose input is ``[T, N, ...]``: T of the pass. Without it the input
            is ``[N, ...]``.
        weight_bits: layers, by name, whose weights are counted at another width than their own.
            The paper's quantized VGG16 rows come out with ``{"head": 32}``.
        sample: an input of one sample, as :func:`~qsnn_ext.summarize` takes it, for the pass, in
            place of zeros of ``input_shape`` and ``time_steps``.
        forward: ``forward(model, sample)`` for models that are called in another way.

    Raises:
        InputTypeError: ``model`` is not a module.
        ConfigError: an unknown accounting, execution or layer name, or a size below 1.
        InputError: the model cannot process the sample, or zeros of the shape asked for.
    """
    model = check_model(model, "footprint")
    if accounting not in ("paper", "resident"):
        raise ConfigError(f"accounting={accounting!r} is unknown; choose 'paper' or 'resident'.")
    if execution is None:
        execution = "layer" if accounting == "paper" else "step"
    if execution not in ("step", "layer"):
        raise ConfigError(f"execution={execution!r} is unknown; choose 'step' or 'layer'.")
    shape = tuple(input_shape)
    sizes = (batch, *shape, *([] if time_steps is None else [time_steps]))
    if not all(type(size) is int and size >= 1 for size in sizes):
        raise ConfigError(
            f"batch={batch!r}, input_shape={shape!r} and time_steps={time_steps!r} must be whole "
            "numbers of at least 1."
        )
    widths = dict(weight_bits or {})
    modules = rows_of(model)
    for name, width in widths.items():
        if name not in modules or "weight" not in modules[name]._parameters:
            raise ConfigError(f"weight_bits names {name!r}, which is no layer with weights.")
        if type(width) is not int or not 1 <= width <= 64:
            raise ConfigError(f"weight_bits of {name!r} is {width!r}; choose 1 to 64.")

    what = f"a {type(sample).__name__} as its sample"
    if sample is None:
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        leading = (1,) if time_steps is None else (time_steps, 1)
        sample = torch.zeros(*leading, *shape, dtype=like.dtype, device=like.device)
        what = f"zeros of shape {tuple(sample.shape)}"
    membranes = _membranes(model, sample, what, forward)
    counter = LayerBytes()
    layers = tuple(
        layer_footprint(
            name,
            module,
            counter.parameters(module),
            sum(b.numel() * b.element_size() for b in counter.buffers(module, persistent=True)),
            membranes.get(name),
            accounting,
            widths.get(name),
        )
        for name, module in modules.items()
    )
    return Footprint(layers, batch, accounting, execution)


def _membranes(
    model: nn.Module,
    sample: Any,
    what: str,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, Membrane]:
    """Membrane potentials of one sample, by name of the neuron."""
    seen: dict[str, Membrane] = {}

    def watch(name: str, module: nn.Module) -> Any:
        if hosts.adapter_of(module) is None:
            return None
        return lambda module, args, kwargs, output: seen.setdefault(name, Membrane()).observe(
            module, args, kwargs, output
        )

    with untouched(model):
        for module in model.modules():
            # Batch norm cannot normalise a single sample; frozen scales that have never been
            # calibrated can only be used in training mode.
            module.training = isinstance(module, MembraneQuantizer)
        try:
            with watching(model, watch):
                call(model, sample, forward)
        except QSNNError:
            raise
        except Exception as error:
            raise InputError(
                f"{type(model).__name__} cannot process {what} ({error}); give input_shape for "
                "one sample, time_steps=T if the input is [T, N, ...], or sample=, and forward= if "
                "the model is called in another way."
            ) from error
    return seen
