"""Torch's layers that hold several matrices: recurrent ones and attention."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from qsnn_ext.layers.computing import Shadow, ShadowedLayer, current_shadows
from qsnn_ext.layers.counterparts import counterpart_of


class QuantizedCell(ShadowedLayer):
    """Mixin over a recurrent cell: ``weight_ih`` and ``weight_hh`` are quantized."""

    weight_ih = Shadow()
    weight_hh = Shadow()

    def weight_names(self) -> tuple[str, ...]:
        """Input and recurrent weights, ``[gates * hidden, ...]``."""
        return ("weight_ih", "weight_hh")


class QuantizedRecurrence(ShadowedLayer):
    """Mixin over ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``: all weight matrices are quantized."""

    def weight_names(self) -> tuple[str, ...]:
        """The matrices of all layers and directions."""
        names: list[str] = self._flat_weights_names  # type: ignore[attr-defined]
        return tuple(name for name in names if name.startswith("weight"))

    @property
    def _flat_weights(self) -> list[Any]:
        """What the stock forward hands to the fused recurrence."""
        shadows = current_shadows(self)
        if shadows is None:
            flat: list[Any] = self.__dict__["_flat_weights"]
            return flat
        shadows.were_read = True
        own: Any = self
        return [shadows.values.get(n, own._parameters.get(n)) for n in own._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Any]) -> None:
        self.__dict__["_flat_weights"] = value


class QuantizedAttention(ShadowedLayer):
    """Mixin over ``nn.MultiheadAttention``: its projections are quantized."""

    in_proj_weight = Shadow()
    q_proj_weight = Shadow()
    k_proj_weight = Shadow()
    v_proj_weight = Shadow()

    def weight_names(self) -> tuple[str, ...]:
        """The packed projection, or three of them where keys and values have other widths."""
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return tuple(n for n in names if self._parameters.get(n) is not None)  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own: it reads the weights of its output layer and does not call it."""
        output: Any = self.out_proj  # type: ignore[attr-defined]
        with output.computing() if isinstance(output, ShadowedLayer) else nullcontext():
            return super().forward(*args, **kwargs)


@counterpart_of(NonDynamicallyQuantizableLinear)
class QuantOutProjection(ShadowedLayer, NonDynamicallyQuantizableLinear):
    """The output layer inside ``nn.MultiheadAttention`` with quantized weights."""


@counterpart_of(nn.RNNCell)
class QuantRNNCell(QuantizedCell, nn.RNNCell):
    """``nn.RNNCell`` with quantized weights."""


@counterpart_of(nn.GRUCell)
class QuantGRUCell(QuantizedCell, nn.GRUCell):
    """``nn.GRUCell`` with quantized weights."""


@counterpart_of(nn.LSTMCell)
class QuantLSTMCell(QuantizedCell, nn.LSTMCell):
    """``nn.LSTMCell`` with quantized weights."""


@counterpart_of(nn.RNN)
class QuantRNN(QuantizedRecurrence, nn.RNN):
    """``nn.RNN`` with quantized weights."""


@counterpart_of(nn.GRU)
class QuantGRU(QuantizedRecurrence, nn.GRU):
    """``nn.GRU`` with quantized weights."""


@counterpart_of(nn.LSTM)
class QuantLSTM(QuantizedRecurrence, nn.LSTM):
    """``nn.LSTM`` with quantized weights."""


@counterpart_of(nn.MultiheadAttention)
class QuantMultiheadAttention(QuantizedAttention, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with quantized projections; its output layer is one of its own."""
