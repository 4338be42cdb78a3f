"""SpikingJelly: its neurons with a quantized membrane potential, its layers with quantized weights.

The only file that imports SpikingJelly. Each class extends the host's own, so everything that looks
for a ``LIFNode`` or a ``layer.Conv2d`` (reset, step mode, monitors, energy counters) finds one.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Literal, Self

from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.errors import ConfigError, InputError, InputTypeError
from qsnn_ext.layers import (
    BinaryLayer,
    QuantizedConv,
    QuantizedMatmul,
    QuantizedTransposedConv,
    QuantizedWeight,
    counterpart_of,
    fold_,
    normalization_affine,
)
from qsnn_ext.quantizers import MembraneQuantizer, membrane_quantizer

try:
    from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
    from spikingjelly.activation_based.functional import conv_bn_fusion
except ImportError as error:
    raise hosts.missing("spikingjelly", error) from error


kernels.COUNTERS.add("spikingjelly.activation_based.op_counter")


class Triangle(surrogate.SurrogateFunctionBase):  # type: ignore[misc]
    """The paper's surrogate: gradient ``max(0, beta - |u - theta|)`` (Eq. 5), for any ``beta``.

    SpikingJelly's own ``PiecewiseQuadratic`` agrees with it for ``beta = 1`` only.

    Args:
        beta: half-width and height of the triangle; positive.
        spiking: ``False`` returns the primitive function, as for every SpikingJelly surrogate.
        strict: whether the threshold itself does not fire, as in the authors' code. ``None`` is
            ``True`` in neurons built with ``preset="official"`` and ``False`` elsewhere.

    Raises:
        ConfigError: ``beta`` is not positive.
    """

    def __init__(self, beta: float = 1.0, spiking: bool = True, strict: bool | None = None) -> None:
        if not beta > 0:
            raise ConfigError(f"beta={beta!r} of the triangular surrogate must be positive.")
        super().__init__(spiking=spiking, beta=beta, strict=strict)

    @staticmethod
    def spiking_function(x: Tensor, beta: float, strict: bool | None = None) -> Tensor:
        """``1[x >= 0]``, or ``1[x > 0]`` if strict, with the triangular gradient."""
        return F.triangle(x, beta, bool(strict))

    @staticmethod
    def primitive_function(x: Tensor, beta: float, strict: bool | None = None) -> Tensor:
        """The integral of the triangle, from 0 to ``beta**2``."""
        clipped = x.clamp(-beta, beta)
        return beta * beta / 2 + beta * clipped - clipped * clipped.abs() / 2


class QuantizedNode:
    """Mixin over a SpikingJelly integrate-and-fire neuron: the carried state is quantized.

    Works in step modes ``"s"`` (input ``[N, ...]``) and ``"m"`` (input ``[T, N, ...]``), with hard
    and soft reset, ``store_v_seq``, ``detach_reset`` and any surrogate. Without a quantizer
    (``bits=None`` or 32) the host's own code runs, bit for bit.

    Args:
        bits: 2 to 8, or ``None``/32 for a float membrane potential.
        membrane: a ready quantizer; overrides ``bits`` and the options below.
        preset: ``"paper"`` or ``"official"``: defaults of the options below.
        scale: ``"max"`` or ``"absmax"``.
        squash: ``"tanh"``, ``"none"``, or ``None`` for the preset's.
        mode: ``"dynamic"`` (default) or ``"frozen"``.
        order: ``"fire_first"`` (Eq. 12: fire, reset, quantize what is carried) or
            ``"quantize_first"`` (Algorithm 1: quantize the charge, then fire).

    Raises:
        ConfigError: unknown bits, preset or option.
    """

    membrane: MembraneQuantizer | None
    order: F.StepOrder
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    surrogate_function: Any

    def __init__(
        self,
        *args: Any,
        bits: int | None = 2,
        membrane: MembraneQuantizer | None = None,
        preset: str = "paper",
        scale: F.MembraneScale | None = None,
        squash: F.Squash | Literal["none"] | None = None,
        mode: Literal["dynamic", "frozen"] | None = None,
        order: F.StepOrder = "fire_first",
        **kwargs: Any,
    ) -> None:
        if membrane is None:
            membrane = membrane_quantizer(bits, preset, scale=scale, squash=squash, mode=mode)
        F.check_order(order)
        super().__init__(*args, **kwargs)
        self.membrane = membrane
        self.order = order
        fire = self.surrogate_function
        if preset == "official" and isinstance(fire, Triangle) and fire.strict is None:
            self.surrogate_function = Triangle(fire.beta, fire.spiking, strict=True)

    @property
    def bits(self) -> int | None:
        """Bits of the membrane potential; ``None`` when it is in floating point."""
        return None if self.membrane is None else self.membrane.bits

    @classmethod
    def float_type(cls) -> type[nn.Module]:
        """The host's class this neuron extends."""
        return next(b for b in cls.__mro__ if b in NEURONS)

    @classmethod
    def from_float(
        cls,
        node: nn.Module,
        membrane: MembraneQuantizer | None,
        order: F.StepOrder = "fire_first",
    ) -> Self:
        """Turn a host neuron into this one, in place (its class changes), and return it.

        Raises:
            InputTypeError: ``node`` is not exactly of the host's class.
        """
        if type(node) is not cls.float_type():
            raise InputTypeError(
                f"{cls.__name__} replaces a {cls.float_type().__name__}, got {type(node).__name__}."
            )
        F.check_order(order)
        node.__class__ = cls  # type: ignore[assignment]
        assert isinstance(node, cls)
        if membrane is not None:
            membrane.train(node.training)
        node.membrane = membrane
        node.order = order
        return node

    def _charge(self) -> dict[str, float | Tensor]:
        """``decay``, ``gain``, ``offset`` of the charge ``h = decay*v + gain*x + offset``."""
        raise NotImplementedError

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """The host's: states shaped and typed like the input, after the input has been checked.

        A state still at zero stays the number, ``None`` here: kernels need not read zeros.
        """
        if self.membrane is None:
            result: tuple[object, ...] = super().materialize_states(inputs, states, step_mode)  # type: ignore[misc]
            return result
        x = inputs[0]
        F.check_floating(x, type(self).__name__)
        if step_mode == "m":
            F.check_rank(x, f"{type(self).__name__} in step mode 'm'", 2, "[T, N, ...]")
            if x.shape[0] == 0:
                raise InputError(f"{type(self).__name__} got a sequence of no time steps (T = 0).")
        else:
            F.check_rank(x, f"{type(self).__name__} in step mode 's'", 1, "[N, ...]")
        if isinstance(states[0], float) and states[0] == 0.0:
            return (None, *states[1:])
        result = super().materialize_states(inputs, states, step_mode)  # type: ignore[misc]
        return result

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """``((spikes,), (v, ...))`` of one step ``[N, ...]``; reads and writes no module state."""
        if self.membrane is None:
            return super().single_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc,no-any-return]
        spikes, v = self._run(inputs[0].unsqueeze(0), states[0])
        return (spikes[0],), (v, *states[1:])

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """``((spikes,), (v, ...))`` of a sequence ``[T, N, ...]``; touches no module state."""
        if self.membrane is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc,no-any-return]
        spike_seq, v = self._run(inputs[0], states[0])
        return (spike_seq,), (v, *states[1:])

    def _run(self, x_seq: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        assert self.membrane is not None
        return kernels.run_layer(
            x_seq,
            v,
            self.membrane,
            charge=self._charge(),
            threshold=self.v_threshold,
            reset="soft" if self.v_reset is None else "hard",
            v_reset=self.v_reset or 0.0,
            detach_reset=self.detach_reset,
            surrogate=self.surrogate_function,
            order=self.order,
        )

    def extra_repr(self) -> str:
        """The host's, with bits and step order."""
        return f"{super().extra_repr()}, bits={self.bits}, order={self.order!r}"  # type: ignore[misc]


def _leak(
    rate: float | Tensor, decay_input: bool, v_reset: float | None
) -> dict[str, float | Tensor]:
    """The affine charge of a leaky neuron that loses ``rate = 1/tau`` of its potential a step."""
    return {
        "decay": 1.0 - rate,
        "gain": rate if decay_input else 1.0,
        "offset": rate * v_reset if v_reset else 0.0,
    }


class QuantLIFNode(QuantizedNode, neuron.LIFNode):  # type: ignore[misc]
    """SpikingJelly's ``LIFNode`` with a k-bit membrane potential (Eq. 10 to 12).

    ``h = v - (v - v_reset)/tau + x`` (``x/tau`` with ``decay_input``); fires at
    ``h >= v_threshold``.
    The paper's neuron (``tau = 0.5`` there) is ``tau=2.0, decay_input=False, v_reset=0.0``.

    Takes all arguments of ``LIFNode``, with its defaults, then those of :class:`QuantizedNode`.
    """

    tau: float
    decay_input: bool

    def _charge(self) -> dict[str, float | Tensor]:
        return _leak(1.0 / self.tau, self.decay_input, self.v_reset)


class QuantIFNode(QuantizedNode, neuron.IFNode):  # type: ignore[misc]
    """SpikingJelly's ``IFNode`` (no leak) with a k-bit membrane potential."""

    def _charge(self) -> dict[str, float | Tensor]:
        return {"decay": 1.0, "gain": 1.0, "offset": 0.0}


class QuantParametricLIFNode(QuantizedNode, neuron.ParametricLIFNode):  # type: ignore[misc]
    """SpikingJelly's ``ParametricLIFNode`` (learnable ``1/tau = sigmoid(w)``), k-bit membrane."""

    w: nn.Parameter
    decay_input: bool

    def _charge(self) -> dict[str, float | Tensor]:
        return _leak(self.w.sigmoid(), self.decay_input, self.v_reset)


@counterpart_of(layer.Conv1d)
class QuantConv1d(QuantizedConv, layer.Conv1d):  # type: ignore[misc]
    """SpikingJelly's ``layer.Conv1d`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.Conv2d)
class QuantConv2d(QuantizedConv, layer.Conv2d):  # type: ignore[misc]
    """SpikingJelly's ``layer.Conv2d`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.Conv3d)
class QuantConv3d(QuantizedConv, layer.Conv3d):  # type: ignore[misc]
    """SpikingJelly's ``layer.Conv3d`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.Linear)
class QuantLinear(QuantizedMatmul, layer.Linear):  # type: ignore[misc]
    """SpikingJelly's ``layer.Linear`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.ConvTranspose1d)
class QuantConvTranspose1d(QuantizedTransposedConv, layer.ConvTranspose1d):  # type: ignore[misc]
    """SpikingJelly's ``layer.ConvTranspose1d`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.ConvTranspose2d)
class QuantConvTranspose2d(QuantizedTransposedConv, layer.ConvTranspose2d):  # type: ignore[misc]
    """SpikingJelly's ``layer.ConvTranspose2d`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.ConvTranspose3d)
class QuantConvTranspose3d(QuantizedTransposedConv, layer.ConvTranspose3d):  # type: ignore[misc]
    """SpikingJelly's ``layer.ConvTranspose3d`` with 8-bit weights, in both step modes."""


@counterpart_of(layer.Conv1d)
class BinaryConv1d(BinaryLayer, QuantConv1d):
    """SpikingJelly's ``layer.Conv1d`` with 1-bit weights, in both step modes."""


@counterpart_of(layer.Conv2d)
class BinaryConv2d(BinaryLayer, QuantConv2d):
    """SpikingJelly's ``layer.Conv2d`` with 1-bit weights, in both step modes."""


@counterpart_of(layer.Conv3d)
class BinaryConv3d(BinaryLayer, QuantConv3d):
    """SpikingJelly's ``layer.Conv3d`` with 1-bit weights, in both step modes."""


@counterpart_of(layer.Linear)
class BinaryLinear(BinaryLayer, QuantLinear):
    """SpikingJelly's ``layer.Linear`` with 1-bit weights, in both step modes."""


@counterpart_of(layer.ConvTranspose1d)
class BinaryConvTranspose1d(BinaryLayer, QuantConvTranspose1d):
    """SpikingJelly's ``layer.ConvTranspose1d`` with 1-bit weights, in both step modes."""


@counterpart_of(layer.ConvTranspose2d)
class BinaryConvTranspose2d(BinaryLayer, QuantConvTranspose2d):
    """SpikingJelly's ``layer.ConvTranspose2d`` with 1-bit weights, in both step modes."""


@counterpart_of(layer.ConvTranspose3d)
class BinaryConvTranspose3d(BinaryLayer, QuantConvTranspose3d):
    """SpikingJelly's ``layer.ConvTranspose3d`` with 1-bit weights, in both step modes."""


#: Which class takes a host neuron's place, by exact type: unrelated nodes subclass these.
NEURONS: dict[type[nn.Module], type[QuantizedNode]] = {
    neuron.LIFNode: QuantLIFNode,
    neuron.IFNode: QuantIFNode,
    neuron.ParametricLIFNode: QuantParametricLIFNode,
}


def _fuse_conv_bn_eval(conv: nn.Module, bn: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """The fusion of one pair in ``functional.fuse_conv_bn_eval_modules``, right for our layers."""
    if not isinstance(conv, QuantizedWeight):
        fused: nn.Module = _stock_fusion(conv, bn, *args, **kwargs)
        return fused
    copied = copy.deepcopy(conv)
    fold_(copied, *normalization_affine(bn))
    return copied


# The host finds pairs by isinstance, so it would fuse batch norm into the latent float weights of
# our layers, which are then quantized to something else. It looks this function up by name.
_stock_fusion = conv_bn_fusion.fuse_conv_bn_eval
conv_bn_fusion.fuse_conv_bn_eval = _fuse_conv_bn_eval


def is_spiking(module: nn.Module) -> bool:
    """Whether ``module`` is one of SpikingJelly's spiking neurons (or ours)."""
    return isinstance(module, neuron.BaseNode) or (
        type(module).__module__.startswith(neuron.__name__ + ".")
        and type(module).__name__.endswith(("Node", "PSN"))
        and not type(module).__name__.startswith("NonSpiking")
    )


def state(module: nn.Module) -> Tensor | None:
    """The membrane potential the neuron keeps; ``None`` before the first step."""
    v = getattr(module, "v", None)
    return v if isinstance(v, Tensor) else None


def starts_sequence(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], left: Tensor | None
) -> bool:
    """Whether the neuron's state is at its reset value: a number, not yet a tensor."""
    return state(module) is None


def reset(model: nn.Module) -> None:
    """Put every memory in ``model`` back to its reset value, as ``functional.reset_net`` does."""
    for module in model.modules():
        if isinstance(module, base.MemoryModule):
            module.reset()


def is_neuron(module: nn.Module) -> bool:
    """Whether ``module`` is a neuron of SpikingJelly of any kind, spiking or not (or ours)."""
    return is_spiking(module) or type(module).__module__.startswith(neuron.__name__ + ".")


def is_readout(module: nn.Module) -> bool:
    """Whether the neuron has no threshold to reach, and so only integrates."""
    return getattr(module, "v_threshold", None) == math.inf


def obstacle(module: nn.Module) -> str | None:
    """Nothing stands in the way of a node of a known type."""
    return None


def converted(model: nn.Module) -> None:
    """Make ``functional.reset_net`` look at ``model`` anew."""
    functional.invalidate_reset_cache(model)


def copied(model: nn.Module) -> None:
    """Nothing to do: SpikingJelly keeps no list of neurons."""


def restart(module: nn.Module) -> None:
    """Put the membrane potentials in ``module`` back to their reset value.

    As ``functional.reset_net`` does, but traceable by ``torch.compile``.
    """
    for node in module.modules():
        if isinstance(node, neuron.BaseNode):
            node.v = 0.0 if node.v_reset is None else node.v_reset
            node.v_seq = None


def paper_neuron(bits: int | None, preset: str = "paper", **options: Any) -> QuantLIFNode:
    """The paper's neuron in step mode ``"m"``: leak 1/2, threshold 1, hard reset to 0, triangle.

    Args:
        bits: membrane bits, ``None`` for float.
        preset: ``"paper"`` or ``"official"``.
        options: anything else :class:`QuantLIFNode` takes; overrides the values above.
    """
    defaults: dict[str, Any] = {
        "tau": 2.0,
        "decay_input": False,
        "v_threshold": 1.0,
        "v_reset": 0.0,
        "surrogate_function": Triangle(),
        "step_mode": "m",
    }
    return QuantLIFNode(**{**defaults, **options}, bits=bits, preset=preset)
