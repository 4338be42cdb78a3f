"""How layers compute with quantized weights: handed in, or found in the parameter's place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as nn_functional

from qsnn_ext.errors import InputError, StateError
from qsnn_ext.functional import check_floating
from qsnn_ext.layers.base import QuantizedWeight


class QuantizedConv(QuantizedWeight):
    """Mixin over a convolution: quantized weights inside the stock ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        check_floating(input, type(self).__name__)
        out: Tensor = super()._conv_forward(input, self.effective_weight, bias)  # type: ignore[misc]
        return out


class QuantizedMatmul(QuantizedWeight):
    """Mixin over a linear layer: quantized weights inside the stock product."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``."""
        check_floating(input, type(self).__name__)
        return nn_functional.linear(input, self.effective_weight, self.bias)  # type: ignore[attr-defined]


class Shadow:
    """Descriptor of a weight: the quantized value while the layer computes, else the latent one.

    The layer's own forward, whatever it does with ``self.weight``, so computes with quantized
    weights, while optimizers, checkpoints and everybody else find the parameter.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        if layer is None:
            return self
        shadows = current_shadows(layer)
        if shadows is not None and self.name in shadows.values:
            shadows.were_read = True
            return shadows.values[self.name]
        if self.name in layer.__dict__:
            return layer.__dict__[self.name]
        return nn.Module.__getattr__(layer, self.name)

    def __set__(self, layer: Any, value: Any) -> None:
        layer.__dict__[self.name] = value  # parameters never come here: the module takes them

    def __delete__(self, layer: Any) -> None:
        del layer.__dict__[self.name]


class Shadows:
    """Quantized values that stand for latent weights during one call of a layer."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.were_read = False


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


def current_shadows(layer: Any) -> Shadows | None:
    """Those of the call that this thread is making."""
    table: dict[int, Shadows] = layer.__dict__.get("_shadows", {})
    return table.get(_thread())


class ShadowedLayer(QuantizedWeight):
    """Mixin over a layer whose forward reads ``self.weight``: it reads the quantized value."""

    weight = Shadow()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within, this thread reads quantized weights from the layer.

        Raises:
            StateError: it has read none.
        """
        shadows = Shadows(
            {
                name: self.effective_weight if name == "weight" else self.quantized(name)
                for name in self.weight_names()
            }
        )
        if "_shadows" not in self.__dict__:
            self._shadows: dict[int, Shadows] = {}
        table = self._shadows
        before = table.get(_thread())
        table[_thread()] = shadows
        try:
            yield
        finally:
            if before is None:
                del table[_thread()]
            else:
                table[_thread()] = before
        if not shadows.were_read:
            raise StateError(
                f"the forward of {type(self).float_type().__name__} never read its "
                f"{', '.join(shadows.values)}, so what it computed with is not quantized; keep the "
                "layer in floating point with a rule (Rule.keep)."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own, with quantized weights."""
        with self.computing():
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class MultiStep:
    """Rank tells the step mode: one dimension more than a batch is time."""

    spatial_dims: ClassVar[int]

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[N, C, ...]`` or ``[T, N, C, ...]`` to the same with the output's channels."""
        rank = input.dim() - self.spatial_dims
        if rank == 3:
            out: Tensor = super().forward(input.flatten(0, 1), *args, **kwargs)  # type: ignore[misc]
            return out.view(*input.shape[:2], *out.shape[1:])
        if rank not in (1, 2):
            axes = ["L", "H, W", "D, H, W"][self.spatial_dims - 1]
            raise InputError(
                f"{type(self).__name__} expects [N, C, {axes}] or [T, N, C, {axes}], "
                f"got {tuple(input.shape)}."
            )
        out = super().forward(input, *args, **kwargs)  # type: ignore[misc]
        return out


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """``[C_in, C_out / groups, ...]`` to ``[C_out, C_in / groups, ...]`` and, likewise, back."""
    by_group = weight.reshape(groups, -1, *weight.shape[1:])
    return by_group.transpose(1, 2).flatten(0, 1)


class QuantizedTransposedConv(ShadowedLayer):
    """Mixin over a transposed convolution, whose weights are ``[C_in, C_out / groups, ...]``."""

    groups: int

    def rows(self, weight: Tensor) -> Tensor:
        """``[C_out, C_in / groups, ...]``."""
        return swap_channels(weight, self.groups)

    def from_rows(self, rows: Tensor) -> Tensor:
        """``[C_in, C_out / groups, ...]``."""
        return swap_channels(rows, self.groups)
