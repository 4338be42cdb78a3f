"""Which class a layer becomes when its weights are quantized.

One class is registered for each stock layer. A subclass of a stock layer, written by whoever, gets
a class made for it that extends it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from qsnn_ext.layers.base import BinaryLayer, QuantizedWeight
from qsnn_ext.layers.computing import ShadowedLayer

_Layer = TypeVar("_Layer", bound=type[QuantizedWeight])

#: The class of a stock layer with quantized weights: with 1 bit (``True``) and with more.
_COUNTERPARTS: dict[tuple[type[nn.Module], bool], type[QuantizedWeight]] = {}

#: Classes made for want of a registered one, likewise.
_MADE: dict[tuple[type[nn.Module], bool], type[QuantizedWeight]] = {}


def counterpart_of(stock: type[nn.Module]) -> Callable[[_Layer], _Layer]:
    """Register the decorated class as what a stock layer becomes.

    One class does: its 1-bit form is made from it (:func:`binary`), unless another registered
    class, with ``default_bits = 1``, is that.

    Args:
        stock: the layer that the decorated class extends.
    """

    def register(layer: _Layer) -> _Layer:
        _COUNTERPARTS[stock, layer.default_bits == 1] = layer
        return layer

    return register


def binary(layer: _Layer) -> _Layer:
    """The 1-bit form of a registered class: the same layer, built with 1 bit and called so."""
    made: Any = counterpart(layer.float_type(), 1)
    return made  # type: ignore[no-any-return]


def counterpart(kind: type[nn.Module], bits: int) -> type[QuantizedWeight] | None:
    """The class that a layer of exactly this class becomes with weights of that many bits.

    For a registered stock layer, the registered class. For a subclass of one, a class that extends
    the subclass: with the stock layer's way to compute if the subclass has not its own, else
    reading the quantized value wherever its forward reads the weight (:class:`ShadowedLayer`).

    Returns:
        ``None`` where there is none, see :func:`no_counterpart`.
    """
    binary = bits == 1
    known = _COUNTERPARTS.get((kind, binary)) or _MADE.get((kind, binary))
    if known is not None:
        return known
    if no_counterpart(kind) is not None:
        return None
    base = _stock(kind)
    assert base is not None
    general = _COUNTERPARTS[base, False]
    home, text = __name__, f"``{kind.__qualname__}`` with quantized weights."
    if kind is base:
        bases: tuple[type, ...] = (BinaryLayer, general)
        home, text = general.__module__, f"``{kind.__qualname__}`` with 1-bit weights (Eq. 6, 16)."
    elif _computes_alike(kind, base):
        stock = counterpart(base, bits)
        assert stock is not None
        bases = (stock, kind)
    else:
        shadowing = next(
            (
                c
                for c in general.__mro__
                if issubclass(c, ShadowedLayer) and not issubclass(c, nn.Module)
            ),
            ShadowedLayer,
        )
        bases = (BinaryLayer, shadowing, kind) if binary else (shadowing, kind)
    made: Any = type(
        f"{'Binary' if binary else 'Quant'}{kind.__name__}",
        bases,
        {"__doc__": text, "__module__": home, "__reduce_ex__": _reduce},
    )
    return _MADE.setdefault((kind, binary), made)


def no_counterpart(kind: type[nn.Module]) -> str | None:
    """Why layers of a class cannot be given quantized weights; ``None`` if they can."""
    base = _stock(kind)
    if base is None:
        return f"{kind.__name__} has no quantized counterpart"
    if issubclass(kind, nn.modules.lazy.LazyModuleMixin):
        return f"{kind.__name__} changes what {base.__name__} does until a sample has shaped it"
    if any("weight" in vars(c) for c in kind.__mro__ if c not in base.__mro__):
        return f"{kind.__name__} computes its weight in a way of its own"
    return None


def _stock(kind: type[nn.Module]) -> type[nn.Module] | None:
    return next((c for c in kind.__mro__ if (c, False) in _COUNTERPARTS), None)


def _computes_alike(kind: type, base: type) -> bool:
    """Whether a subclass leaves everything between input and output to its base."""
    names = ("forward", "_conv_forward", "_output_padding", "__call__", "__getattr__")
    return all(getattr(kind, n, None) is getattr(base, n, None) for n in names)


def _reduce(layer: Any, protocol: int) -> tuple[Any, ...]:
    """Pickling by what the class was made from, as no module has it by name."""
    rest: Any = nn.Module.__reduce_ex__(layer, protocol)[2:]
    return _empty, (type(layer).float_type(), type(layer).default_bits), *rest


def _empty(kind: type[nn.Module], bits: int) -> QuantizedWeight:
    made = counterpart(kind, bits)
    assert made is not None
    return made.__new__(made)


def is_synaptic(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer of any kind, quantized or not."""
    return isinstance(module, (_ConvNd, nn.Linear))


def is_stock_class(kind: type[nn.Module]) -> bool:
    """Whether a class of modules has a registered counterpart."""
    return (kind, False) in _COUNTERPARTS


def is_stock(module: nn.Module) -> bool:
    """Whether a module is exactly of a class that has a registered counterpart."""
    return is_stock_class(type(module))


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is of a class that has, or extends one that has, a counterpart."""
    return _stock(type(module)) is not None
