"""Layers with quantized weights: the stock layer, a quantizer, and one property.

The latent float weight stays the parameter, with the stock layer's name and shape, so a checkpoint
of the float model loads strictly and an optimizer notices nothing. ``quantized_weight`` is what the
layer computes with.

Inputs are single-step ``[N, C, ...]`` or multi-step ``[T, N, C, ...]``; the rank tells which. For
layers whose step mode is set by SpikingJelly see :mod:`qsnn_ext.spikingjelly`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as nn_functional
from torch.nn.modules.conv import _ConvNd

from qsnn_ext import hosts
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from qsnn_ext.functional import check_floating
from qsnn_ext.kernels.weights import PreparedWeight
from qsnn_ext.quantizers import BinaryWeight, IntWeight, Quantizer, weight_quantizer


class QuantizedWeight:
    """Mixin: a layer that computes with ``quantizer(weight)``.

    Put it before the stock layer in the bases. Constructors take the stock layer's arguments, then

    Args:
        quantizer: the weight quantizer; the preset's when not given.
        preset: ``"paper"`` or ``"official"``, see :data:`qsnn_ext.quantizers.PRESETS`.

    Raises:
        ConfigError: unknown preset.
        InputTypeError: ``quantizer`` is not of the kind the layer takes.
    """

    default_bits: ClassVar[int]
    quantizer_type: ClassVar[type[Quantizer]]
    quantizer: Quantizer

    def __init__(
        self, *args: Any, quantizer: Quantizer | None = None, preset: str = "paper", **kwargs: Any
    ) -> None:
        if quantizer is None:
            quantizer = weight_quantizer(self.default_bits, preset)
        self._check_quantizer(quantizer)
        super().__init__(*args, **kwargs)
        assert quantizer is not None
        self.quantizer = quantizer

    @classmethod
    def _check_quantizer(cls, quantizer: Any) -> None:
        if not isinstance(quantizer, cls.quantizer_type):
            raise InputTypeError(
                f"{cls.__name__} takes a {cls.quantizer_type.__name__} as its quantizer, "
                f"got {type(quantizer).__name__}."
            )

    @classmethod
    def from_float(cls, layer: nn.Module, quantizer: Quantizer) -> Self:
        """Turn a stock layer into this one, in place, and return it.

        The object stays the same and only its class changes, so parameters, hooks, buffers,
        training mode and every reference to the layer stay valid.

        Raises:
            InputTypeError: ``layer`` is not exactly of the stock class, or the wrong quantizer.
        """
        if type(layer) is not cls.float_type():
            raise InputTypeError(
                f"{cls.__name__} replaces a {cls.float_type().__name__}, "
                f"got {type(layer).__name__}."
            )
        cls._check_quantizer(quantizer)
        reference = next(layer.parameters())
        quantizer.to(reference.device).train(layer.training)
        layer.__class__ = cls  # type: ignore[assignment]
        assert isinstance(layer, cls)
        layer.quantizer = quantizer
        return layer

    @classmethod
    def float_type(cls) -> type[nn.Module]:
        """The stock class this layer extends."""
        for base in cls.__mro__:
            if issubclass(base, nn.Module) and not issubclass(base, QuantizedWeight):
                return base
        raise AssertionError(f"{cls.__name__} extends no layer")  # pragma: no cover

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return self.quantizer.bits

    @property
    def quantized_weight(self) -> Tensor:
        """The weights the layer computes with, like ``weight``; differentiable.

        Prepared once for all time steps and micro-batches between two changes of ``weight``.
        """
        prepared = self.__dict__.get("_prepared")
        if prepared is None:
            prepared = PreparedWeight()
            if not torch.compiler.is_compiling():  # a traced graph holds no Python object
                self.__dict__["_prepared"] = prepared
        value: Tensor = prepared.get(self.weight, self.quantizer)  # type: ignore[attr-defined]
        return value

    @property
    def effective_weight(self) -> Tensor:
        """``quantized_weight`` times the output scale that batch norm folding may have left.

        The scale, a buffer ``output_scale`` ``[C_out]``, multiplies the scale of the codes and
        leaves the codes as they are. Without folding there is none.
        """
        value = self.quantized_weight
        scale = self._buffers.get("output_scale")  # type: ignore[attr-defined]
        return value if scale is None else value * scale.view(-1, *[1] * (value.dim() - 1))


class BinaryLayer(QuantizedWeight):
    """Mixin: a layer with 1-bit weights."""

    default_bits = 1
    quantizer_type = BinaryWeight


class IntegerLayer(QuantizedWeight):
    """Mixin: a layer with weights of 2 to 8 bits; 8 unless its quantizer says otherwise."""

    default_bits = 8
    quantizer_type = IntWeight


class QuantizedConv:
    """Mixin over a convolution: quantized weights inside the stock ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check_floating(input, type(self).__name__)
        value = self.effective_weight  # type: ignore[attr-defined]
        out: Tensor = super()._conv_forward(input, value, bias)  # type: ignore[misc]
        return out


class QuantizedMatmul:
    """Mixin over a linear layer: quantized weights inside the stock product."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        check_floating(input, type(self).__name__)
        value = self.effective_weight  # type: ignore[attr-defined]
        return nn_functional.linear(input, value, self.bias)  # type: ignore[attr-defined]


class _MultiStepConv(QuantizedConv):
    """Rank tells the step mode: one dimension more than a batch is time."""

    spatial_dims: ClassVar[int]

    def forward(self, input: Tensor) -> Tensor:
        """``[N, C, ...]`` or ``[T, N, C, ...]`` to the same with the output's channels."""
        rank = input.dim() - self.spatial_dims
        if rank == 3:
            out: Tensor = super().forward(input.flatten(0, 1))  # type: ignore[misc]
            return out.view(*input.shape[:2], *out.shape[1:])
        if rank not in (1, 2):
            axes = ["L", "H, W", "D, H, W"][self.spatial_dims - 1]
            raise InputError(
                f"{type(self).__name__} expects [N, C, {axes}] or [T, N, C, {axes}], "
                f"got {tuple(input.shape)}."
            )
        out = super().forward(input)  # type: ignore[misc]
        return out


class BinaryConv1d(BinaryLayer, _MultiStepConv, nn.Conv1d):
    """``nn.Conv1d`` with 1-bit weights (Eq. 6, 16); input ``[N, C, L]`` or ``[T, N, C, L]``."""

    spatial_dims = 1


class BinaryConv2d(BinaryLayer, _MultiStepConv, nn.Conv2d):
    """``nn.Conv2d`` with 1-bit weights (Eq. 6, 16); input ``[(T,) N, C, H, W]``."""

    spatial_dims = 2


class BinaryConv3d(BinaryLayer, _MultiStepConv, nn.Conv3d):
    """``nn.Conv3d`` with 1-bit weights (Eq. 6, 16); input ``[(T,) N, C, D, H, W]``."""

    spatial_dims = 3


class BinaryLinear(BinaryLayer, QuantizedMatmul, nn.Linear):
    """``nn.Linear`` with 1-bit weights (Eq. 6, 16); input ``[..., in_features]``."""


class QuantConv1d(IntegerLayer, _MultiStepConv, nn.Conv1d):
    """``nn.Conv1d`` with 8-bit weights; input ``[N, C, L]`` or ``[T, N, C, L]``."""

    spatial_dims = 1


class QuantConv2d(IntegerLayer, _MultiStepConv, nn.Conv2d):
    """``nn.Conv2d`` with 8-bit weights; input ``[N, C, H, W]`` or ``[T, N, C, H, W]``."""

    spatial_dims = 2


class QuantConv3d(IntegerLayer, _MultiStepConv, nn.Conv3d):
    """``nn.Conv3d`` with 8-bit weights; input ``[(T,) N, C, D, H, W]``."""

    spatial_dims = 3


class QuantLinear(IntegerLayer, QuantizedMatmul, nn.Linear):
    """``nn.Linear`` with 8-bit weights; input ``[..., in_features]``."""


#: Which class takes a stock torch layer's place, by kind of quantizer.
SISTERS: dict[type[nn.Module], dict[type[Quantizer], type[QuantizedWeight]]] = {
    nn.Conv1d: {BinaryWeight: BinaryConv1d, IntWeight: QuantConv1d},
    nn.Conv2d: {BinaryWeight: BinaryConv2d, IntWeight: QuantConv2d},
    nn.Conv3d: {BinaryWeight: BinaryConv3d, IntWeight: QuantConv3d},
    nn.Linear: {BinaryWeight: BinaryLinear, IntWeight: QuantLinear},
}

_BUILDERS: dict[str, type[nn.Module]] = {
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "linear": nn.Linear,
}


def build_layer(
    kind: str, *args: Any, bits: int | None, preset: str = "paper", **kwargs: Any
) -> nn.Module:
    """A ``"conv2d"``, ``"linear"``, ... of the given weight bits: stock, binary or integer.

    Args:
        kind: ``"conv1d"``, ``"conv2d"``, ``"conv3d"`` or ``"linear"``.
        args: the stock layer's positional arguments.
        bits: 1, 2 to 8, or ``None``/32 for the stock layer.
        preset: options of the binary quantizer.
        kwargs: the stock layer's keyword arguments.

    Raises:
        ConfigError: unknown kind, bits or preset.
    """
    if kind not in _BUILDERS:
        raise ConfigError(f"layer {kind!r} is unknown; choose one of {', '.join(_BUILDERS)}.")
    stock = _BUILDERS[kind]
    quantizer = weight_quantizer(bits, preset)
    if quantizer is None:
        return stock(*args, **kwargs)
    layer: Any = SISTERS[stock][type(quantizer)]
    built: nn.Module = layer(*args, quantizer=quantizer, **kwargs)
    return built


def is_synaptic(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer of any kind, quantized or not."""
    return isinstance(module, (_ConvNd, nn.Linear))


def sister_tables() -> list[dict[type[nn.Module], Any]]:
    """:data:`SISTERS`, and those of the hosts that have been imported."""
    return [SISTERS, *(host.SISTERS for host in hosts.adapters())]


def normalization_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, both ``[C]`` float64, that a batch norm in evaluation mode amounts to."""
    n: Any = norm
    scale = (n.running_var.double() + n.eps).rsqrt()
    if n.weight is not None:
        scale = scale * n.weight.detach().double()
    shift = -n.running_mean.double() * scale
    if n.bias is not None:
        shift = shift + n.bias.detach().double()
    return scale, shift


@torch.no_grad()
def fold_(layer: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Make a layer compute ``scale * layer(x) + shift``, per output channel, in place.

    A quantized layer gets an ``output_scale``, its latent weights and codes stay; a stock layer's
    weights are scaled. Both get a bias if they had none, and the attribute ``folded``.

    Args:
        layer: a stock layer or its quantized sister.
        scale: ``[C_out]``.
        shift: ``[C_out]``.
    """
    target: Any = layer
    weight = target.weight
    if target.bias is None:
        target.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=weight.requires_grad)
    else:
        target.bias.copy_(target.bias.double() * scale + shift)
    if isinstance(layer, QuantizedWeight):
        before = layer._buffers.get("output_scale")
        scale = scale if before is None else scale * before.double()
        target.register_buffer("output_scale", scale.to(weight.dtype))
    else:
        weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.dim() - 1)))
    target.folded = True
