"""What every layer with quantized weights has: a quantizer, and the weights it makes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.errors import InputTypeError
from qsnn_ext.kernels.weights import PreparedWeight
from qsnn_ext.quantizers import MembraneQuantizer, Quantizer, weight_quantizer


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

    default_bits: ClassVar[int] = 8
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
        fits = isinstance(quantizer, Quantizer) and not isinstance(quantizer, MembraneQuantizer)
        if not fits or (quantizer.bits == 1) != (cls.default_bits == 1):
            kind = "1-bit quantizer (BinaryWeight)" if cls.default_bits == 1 else "IntWeight"
            raise InputTypeError(
                f"{cls.__name__} takes a {kind} as its quantizer, got {type(quantizer).__name__}."
            )
        for host in hosts.adapters():
            host.weighted()

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

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The stock layer's children: tools that look for layers find a leaf, as it was before.

        The quantizer goes along wherever a layer moves (below), and ``modules()`` has it.
        """
        if "neurobench" in sys.modules:  # whose metrics overwrite a copy's weights and run it
            importlib.import_module("qsnn_ext.neurobench")
        for name, child in super().named_children():  # type: ignore[misc]
            if not isinstance(child, Quantizer):
                yield name, child

    def train(self, mode: bool = True) -> Self:
        """The layer and its quantizer in training or evaluation mode."""
        self.quantizer.train(mode)
        return super().train(mode)  # type: ignore[misc,no-any-return]

    def apply(self, fn: Callable[[nn.Module], None]) -> Self:
        """``fn`` of the quantizer, then of the layer."""
        self.quantizer.apply(fn)
        return super().apply(fn)  # type: ignore[misc,no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if recurse:
            self.quantizer._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[misc,no-any-return]

    @classmethod
    def float_type(cls) -> type[nn.Module]:
        """The stock class this layer extends."""
        stock = [c for c in cls.__mro__ if not issubclass(c, QuantizedWeight)]
        return next(c for c in stock if issubclass(c, nn.Module))

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return self.quantizer.bits

    def weight_names(self) -> tuple[str, ...]:
        """Names of the latent weights that the quantizer quantizes."""
        return ("weight",)

    def latent(self, name: str = "weight") -> Tensor:
        """A latent weight: the parameter, or what a reparametrization has put in its place."""
        own: Any = self
        value: Tensor = own._parameters[name] if name in own._parameters else own.__dict__[name]
        return value

    def rows(self, weight: Tensor) -> Tensor:
        """``weight`` with its output channels in front: what the quantizer is given."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        return rows

    def quantized(self, name: str = "weight") -> Tensor:
        """The quantized value of one latent weight, like it; differentiable."""
        table: dict[str, PreparedWeight] = self.__dict__.get("_prepared", {})
        prepared = table.get(name)
        if prepared is None:
            prepared = PreparedWeight()
            if not torch.compiler.is_compiling():  # a traced graph holds no Python object
                self.__dict__["_prepared"] = {**table, name: prepared}
        return self.from_rows(prepared.get(self.rows(self.latent(name)), self.quantizer))

    @property
    def quantized_weight(self) -> Tensor:
        """The weights the layer computes with, like ``weight``; differentiable.

        How often they are prepared is told in :class:`~qsnn_ext.kernels.weights.PreparedWeight`.
        """
        return self.quantized()

    @property
    def effective_weight(self) -> Tensor:
        """``quantized_weight`` times the layer's output scale, if it has one.

        The scale, a buffer ``output_scale`` ``[C_out]``, multiplies the scale of the codes and
        leaves the codes as they are. Batch norm folding and
        :func:`~qsnn_ext.calibrate_scales` leave one.
        """
        value = self.quantized_weight
        scale = self._buffers.get("output_scale")  # type: ignore[attr-defined]
        if scale is None:
            return value
        rows = self.rows(value)
        return self.from_rows(rows * scale.view(-1, *[1] * (rows.dim() - 1)))

    def codes(self, name: str = "weight") -> tuple[Tensor, Tensor]:
        """Integer codes (int8, like the weight) and their scale, broadcastable to them.

        ``codes * scale`` equals the quantized weight; the output scale is not in it.
        """
        codes, scale = self.quantizer.codes(self.rows(self.latent(name)))
        if scale.dim():
            scale = self.from_rows(scale.expand(codes.shape))
        return self.from_rows(codes), scale


class BinaryLayer(QuantizedWeight):
    """Mixin: a layer with 1-bit weights."""

    default_bits = 1
