"""SpikingJelly: its neurons with a quantized membrane potential, its layers with quantized weights.

The only file that imports SpikingJelly. Each class extends the host's own, so everything that looks
for a ``LIFNode`` or a ``layer.Conv2d`` (reset, step mode, monitors, energy counters) finds one.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.counterparts import QuantizedNeuron, held, kind_of, rounder
from qsnn_ext.errors import InputError
from qsnn_ext.layers import (
    QuantizedConv,
    QuantizedMatmul,
    QuantizedTransposedConv,
    QuantizedWeight,
    binary,
    counterpart_of,
    fold_,
    normalization_affine,
)
from qsnn_ext.neuron import Charge, Drive, Feedback, Link, NeuronModel, Output, State, Step
from qsnn_ext.quantizers import MembraneQuantizer

try:
    from spikingjelly.activation_based import (
        base,
        encoding,
        functional,
        layer,
        neuron,
        rnn,
        surrogate,
    )
    from spikingjelly.activation_based.functional import conv_bn_fusion
except ImportError as error:
    raise hosts.missing("spikingjelly", error) from error


kernels.COUNTERS.add("spikingjelly.activation_based.op_counter")

#: Surrogates with a derivative in closed form: its kind, names of its numbers.
_DERIVATIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "PiecewiseQuadratic": ("piecewise_quadratic", ("alpha",)),
    "PiecewiseExp": ("piecewise_exp", ("alpha",)),
    "Sigmoid": ("sigmoid", ("alpha",)),
    "SoftSign": ("soft_sign", ("alpha",)),
    "SuperSpike": ("super_spike", ("alpha",)),
    "ATan": ("atan", ("alpha",)),
    "Erf": ("erf", ("alpha",)),
    "Rect": ("rect", ("alpha",)),
    "LeakyKReLU": ("slope_from", ("k", "leak")),
}


def _closed_form(fire: Any) -> kernels.Surrogate | None:
    """The closed form of a surrogate of the host, or of ours; its primitive function has none."""
    cls = type(fire)
    if cls is Triangle and fire.spiking:
        return kernels.Surrogate.of("triangle", [fire.beta], bool(fire.strict))
    if cls.__module__ != surrogate.__name__ or cls.__name__ not in _DERIVATIVES:
        return None
    kind, names = _DERIVATIVES[cls.__name__]
    numbers = [getattr(fire, n) for n in names]
    return kernels.Surrogate.of(kind, numbers, strict=False) if fire.spiking else None


kernels.RECOGNIZERS.append(_closed_form)


class Triangle(surrogate.SurrogateFunctionBase):  # type: ignore[misc]
    """The paper's surrogate: gradient ``max(0, beta - |u - theta|)`` (Eq. 5), for any ``beta``.

    SpikingJelly's own ``PiecewiseQuadratic`` agrees with it for ``beta = 1`` only.

    Args:
        beta: half-width and height of the triangle; positive.
        spiking: ``False`` returns the primitive function, as for every SpikingJelly surrogate.
        strict: whether the threshold itself does not fire, as in the authors' code. ``None`` is
            ``False``, but neurons built with or converted to ``preset="official"`` get a ``True``
            one in its place.

    Raises:
        ConfigError: ``beta`` is not positive.
    """

    def __init__(self, beta: float = 1.0, spiking: bool = True, strict: bool | None = None) -> None:
        super().__init__(spiking=spiking, beta=F.check_beta(beta), strict=strict)

    @staticmethod
    def spiking_function(x: Tensor, beta: float, strict: bool | None = None) -> Tensor:
        """``1[x >= 0]``, or ``1[x > 0]`` if strict, with the triangular gradient."""
        return F.triangle(x, beta, bool(strict))

    @staticmethod
    def primitive_function(x: Tensor, beta: float, strict: bool | None = None) -> Tensor:
        """The integral of the triangle, from 0 to ``beta**2``."""
        clipped = x.clamp(-beta, beta)
        return beta * beta / 2 + beta * clipped - clipped * clipped.abs() / 2


class QuantizedNode(QuantizedNeuron):
    """Mixin over a neuron of SpikingJelly: what it carries is rounded.

    Works in step modes ``"s"`` (input ``[N, ...]``) and ``"m"`` (input ``[T, N, ...]``), with hard
    and soft reset, ``store_v_seq``, ``detach_reset`` and any surrogate. Without a quantizer
    (``bits=None`` or 32) the host's own code runs, bit for bit.

    A node with an affine charge runs all its steps in one operation. Any other runs the host's own
    single step, rounds what it carries, and repeats that over time; it fires on its unrounded
    charge (``order="fire_first"``), since the host's step cannot be entered between the two.

    Takes the arguments of the node, then those of
    :class:`~qsnn_ext.counterparts.QuantizedNeuron`.

    Raises:
        ConfigError: as there.
    """

    prefix = "Quant"
    surrogate_function: Any
    _memories: dict[str, Any]
    _has_rounded: bool

    def _take(
        self, membrane: MembraneQuantizer | None, order: F.StepOrder, preset: str = "paper"
    ) -> None:
        super()._take(membrane, order, preset)
        fire = getattr(self, "surrogate_function", None)
        if preset == "official" and isinstance(fire, Triangle) and fire.strict is None:
            self.surrogate_function = Triangle(fire.beta, fire.spiking, strict=True)

    @property
    def _is_fused(self) -> bool:
        """Whether its steps are one operation; else the host's own step runs."""
        return self.membrane is not None and kind_of(type(self), tuple(NEURONS)) is not None

    def materialize_states(
        self, inputs: tuple[Tensor, ...], states: tuple[object, ...], step_mode: str
    ) -> tuple[object, ...]:
        """The host's: states shaped and typed like the input, after the input has been checked.

        A state still at zero stays the number, ``None`` here: kernels need not read zeros.
        """
        if self.membrane is not None:
            self._check(inputs[0], step_mode)
            if self._is_fused and isinstance(states[0], float) and states[0] == 0.0:
                return (None, *states[1:])
        result: tuple[object, ...] = super().materialize_states(inputs, states, step_mode)  # type: ignore[misc]
        return result

    def _check(self, x: Tensor, step_mode: str) -> None:
        name = type(self).__name__
        F.check_floating(x, name)
        if step_mode == "s":
            F.check_rank(x, f"{name} in step mode 's'", 1, "[N, ...]")
            return
        F.check_rank(x, f"{name} in step mode 'm'", 2, "[T, N, ...]")
        if x.shape[0] == 0:
            raise InputError(f"{name} got a sequence of no time steps (T = 0).")

    def single_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """``((spikes,), states)`` of one step ``[N, ...]``; reads and writes no module state."""
        if self._is_fused:
            spikes, v = self._run(inputs[0].unsqueeze(0), states[0])
            return (spikes[0],), (v, *states[1:])
        stepped: Any = super().single_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc]
        outputs, updated = stepped
        if self.membrane is None:
            return outputs, updated
        self.__dict__["_has_rounded"] = True
        return outputs, self._rounded(updated)

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """``((spikes,), states)`` of a sequence ``[T, N, ...]``; touches no module state."""
        if self.membrane is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)  # type: ignore[misc,no-any-return]
        if not self._is_fused:
            repeated: Any = base.MemoryModule.multi_step_functional_forward(
                self, inputs, states, **kwargs
            )
            return repeated  # type: ignore[no-any-return]
        spike_seq, v = self._run(inputs[0], states[0])
        return (spike_seq,), (v, *states[1:])

    def _run(self, x_seq: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor]:
        model = ADAPTER.describe(self)
        assert model is not None
        return kernels.run_layer(x_seq, v, model)

    def single_step_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One step ``[N, ...]``, from the states that the module keeps."""
        if self.membrane is None:
            return super().single_step_forward(x, *args, **kwargs)  # type: ignore[misc]
        self.__dict__["_has_rounded"] = self._is_fused
        outputs = super().single_step_forward(x, *args, **kwargs)  # type: ignore[misc]
        if not self._has_rounded:  # a step of its own, that goes by no functional one
            self._memories.update(
                zip(self._memories, self._rounded(tuple(self._memories.values())), strict=True)
            )
        return outputs

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A sequence ``[T, N, ...]``, from the states that the module keeps."""
        if self.membrane is None or isinstance(self, _OWN_SEQUENCE):
            return super().multi_step_forward(x_seq, *args, **kwargs)  # type: ignore[misc]
        if not _is_functional(self.float_type()):
            self._check(x_seq, "m")
            return torch.stack([self.single_step_forward(x, *args, **kwargs) for x in x_seq])
        # Not the node's own, which may run a whole sequence in float.
        parent = neuron.BaseNode if isinstance(self, neuron.BaseNode) else base.MemoryModule
        return parent.multi_step_forward(self, x_seq, *args, **kwargs)

    def _rounded(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        """The states in the order of the module's memories, those that have a quantizer rounded."""
        done: dict[int, Tensor] = {}  # a node may carry one tensor under two names
        model = ADAPTER.describe(self)
        assert model is not None
        quantizers = {s.name: s.quantizer for s in model.states}
        for name, value in zip(self._memories, states, strict=True):
            q = quantizers.get(name)
            if q is not None and isinstance(value, Tensor) and id(value) not in done:
                done[id(value)] = rounder(q)(value)
        return tuple(done.get(id(value), value) for value in states)

    def extra_repr(self) -> str:
        """The host's, with bits and step order."""
        return f"{super().extra_repr()}, bits={self.bits}, order={self.order!r}"  # type: ignore[misc]


def _is_functional(cls: type[nn.Module]) -> bool:
    """Whether a step of this class goes by ``single_step_functional_forward``."""
    stock: Any = base.MemoryModule.single_step_functional_forward
    return cls.single_step_functional_forward is not stock  # type: ignore[attr-defined]


class QuantizedLoop(QuantizedNeuron):
    """Mixin over the nodes of SpikingJelly that loop over time inside their forward pass.

    What such a node keeps, it keeps for one sequence: its states are rounded after each of its
    steps. It fires on its unrounded charge.
    """

    prefix = "Quant"

    def neuronal_charge(self, x: Tensor) -> None:
        """The host's; for a node that never fires it ends the step."""
        super().neuronal_charge(x)  # type: ignore[misc]
        if not hasattr(self.float_type(), "neuronal_reset"):
            self._round()

    def neuronal_reset(self, *args: Any) -> None:
        """The host's, which ends the step."""
        super().neuronal_reset(*args)  # type: ignore[misc]
        self._round()

    def _round(self) -> None:
        model = ADAPTER.describe(self)
        assert model is not None
        for state in model.states:
            if state.quantizer is not None:
                setattr(self, state.name, rounder(state.quantizer)(getattr(self, state.name)))


class QuantizedCell(QuantizedNeuron):
    """Mixin over a recurrent cell of SpikingJelly, which is given its state and returns the next.

    ``SpikingLSTMCell``'s cell state ``c`` is rounded, and what it emits is computed from the
    unrounded one; ``SpikingGRUCell``'s hidden state ``h`` is both, and rounded. As long as a cell's
    gates fire, these are 0 and 1, which rounding leaves as they are.
    """

    prefix = "Quant"

    def forward(self, x: Tensor, *states: Any, **kwargs: Any) -> Any:
        """One step ``[N, input_size]``: what the host's cell returns, its state rounded."""
        returned = super().forward(x, *states, **kwargs)  # type: ignore[misc]
        if self.membrane is None:
            return returned
        quantize = rounder(self.membrane)
        if isinstance(returned, tuple):
            return (*returned[:-1], quantize(returned[-1]))
        return quantize(returned)


class QuantLIFNode(QuantizedNode, neuron.LIFNode):  # type: ignore[misc]
    """SpikingJelly's ``LIFNode`` with a k-bit membrane potential (Eq. 10 to 12).

    ``h = v - (v - v_reset)/tau + x`` (``x/tau`` with ``decay_input``); fires at
    ``h >= v_threshold``.
    The paper's neuron (``tau = 0.5`` there) is ``tau=2.0, decay_input=False, v_reset=0.0``.

    Takes all arguments of ``LIFNode``, with its defaults, then those of :class:`QuantizedNode`.
    """


class QuantIFNode(QuantizedNode, neuron.IFNode):  # type: ignore[misc]
    """SpikingJelly's ``IFNode`` (no leak) with a k-bit membrane potential."""


class QuantParametricLIFNode(QuantizedNode, neuron.ParametricLIFNode):  # type: ignore[misc]
    """SpikingJelly's ``ParametricLIFNode`` (learnable ``1/tau = sigmoid(w)``), k-bit membrane."""


class QuantGatedLIFNode(QuantizedNode, neuron.GatedLIFNode):  # type: ignore[misc]
    """SpikingJelly's ``GatedLIFNode`` (step mode ``"m"`` only) with a k-bit membrane potential."""

    def multi_step_functional_forward(
        self, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: object
    ) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The host's loop, which is written around its step, with the state rounded after each."""
        if self.membrane is None:
            return super().multi_step_functional_forward(inputs, states, **kwargs)
        names = ("alpha", "beta", "gamma", "tau", "v_threshold", "linear_decay", "v_subreset")
        values = [getattr(self, name).view(1, -1, 1, 1).sigmoid() for name in names]
        quantize, v = rounder(self.membrane), states[0]
        spike, spikes = torch.zeros_like(inputs[0][0]), []
        for t in range(self.T):
            conduct = self.conduct[t].view(1, -1, 1, 1).sigmoid()
            spike, v = functional.gated_lif_step(
                inputs[0][t], v, spike, *values, conduct, self.surrogate_function
            )
            spikes.append(spike)
            v = quantize(v)
        return (torch.stack(spikes),), (v, v)

    def multi_step_forward(self, x_seq: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's."""
        return base.MemoryModule.multi_step_forward(self, x_seq, *args, **kwargs)


#: Nodes whose own sequence goes by the functional step, and does more around it.
_OWN_SEQUENCE = (neuron.ComplementaryLIFNode,)

#: Quantized nodes by the host's class, for those whose charge is affine.
NEURONS: dict[type[nn.Module], type[QuantizedNode]] = {
    neuron.LIFNode: QuantLIFNode,
    neuron.IFNode: QuantIFNode,
    neuron.ParametricLIFNode: QuantParametricLIFNode,
}


def _leak(rate: float | Tensor, decay_input: bool, v_reset: float | None) -> Charge:
    """The affine charge of a leaky neuron that loses ``rate = 1/tau`` of its potential a step."""
    gain = rate if decay_input else 1.0
    return Charge(1.0 - rate, gain, rate * v_reset if v_reset else 0.0)


def _charge(module: Any) -> Charge | None:
    kind = kind_of(type(module), tuple(NEURONS))
    if kind is neuron.IFNode:
        return Charge(1.0, 1.0, 0.0)
    if kind is neuron.LIFNode:
        return _leak(1.0 / module.tau, module.decay_input, module.v_reset)
    if kind is neuron.ParametricLIFNode:
        return _leak(module.w.sigmoid(), module.decay_input, module.v_reset)
    return None


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


#: The same layers with 1 bit, by names of their own.
BinaryConv1d = binary(QuantConv1d)
BinaryConv2d = binary(QuantConv2d)
BinaryConv3d = binary(QuantConv3d)
BinaryLinear = binary(QuantLinear)
BinaryConvTranspose1d = binary(QuantConvTranspose1d)
BinaryConvTranspose2d = binary(QuantConvTranspose2d)
BinaryConvTranspose3d = binary(QuantConvTranspose3d)


def _fuse_conv_bn_eval(conv: nn.Module, bn: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """The fusion of one pair in ``functional.fuse_conv_bn_eval_modules``, right for our layers.

    The host finds pairs by isinstance, so it would fuse batch norm into the latent float weights of
    our layers, which are then quantized to something else. It looks this function up by name.
    """
    if not isinstance(conv, QuantizedWeight):
        fuse: Any = fuse_conv_bn_eval
        fused: nn.Module = fuse(conv, bn, *args, **kwargs)
        return fused
    copied = copy.deepcopy(conv)
    fold_(copied, *normalization_affine(bn))
    return copied


def _is_of_the_host(cls: Any) -> bool:
    return _of_the_host(cls)


@functools.lru_cache(maxsize=4096)
def _of_the_host(cls: type) -> bool:
    return any(
        b.__module__.startswith(neuron.__name__) and not issubclass(b, QuantizedNeuron)
        for b in cls.__mro__
    )


def _memories(module: Any) -> dict[str, Any]:
    """What a module carries, and to what each is reset."""
    if isinstance(module, base.MemoryModule):
        reset: dict[str, Any] = module._memories_rv
        return reset
    if isinstance(module, (neuron.NonSpikingBaseNode, neuron.ILCBaseNode)):
        current = {"c": 0.0} if hasattr(module, "c_decay") else {}
        return {"v": getattr(module, "v_reset", 0.0), **current}
    return {}


#: Recurrent cells, and what each is given of the step before besides spikes.
_CELLS: dict[type[nn.Module], tuple[str, ...]] = {
    rnn.SpikingLSTMCell: ("c",),
    rnn.SpikingGRUCell: ("h",),
    rnn.SpikingVanillaRNNCell: (),
}


def _describe_cell(module: Any) -> NeuronModel:
    kind = next((cell for cell in _CELLS if isinstance(module, cell)), None)
    names = () if kind is None else _CELLS[kind]
    potential = names[0] if names else None
    return NeuronModel(
        kind=type(module).__name__ if kind is None else kind.__name__,
        states=tuple(State(name, held(module, name, potential)) for name in names),
        potential=potential,
        recurrent=True,
        order=getattr(module, "order", "fire_first"),
        stateless="its only state is the spikes of the step before",
        obstacle="it is a cell of its own, whose states nothing tells" if kind is None else None,
    )


def _alone(module: Any, potential: str) -> Step:
    """The step of a copy of a node, as it is without quantizers."""
    one = copy.copy(module)
    one.__dict__.update({k: copy.deepcopy(t) for k, t in vars(module).items() if k != "_memories"})
    one.__dict__["_memories"] = dict(module._memories)
    one.__class__ = _float_type(module)
    one.double().eval()

    def step(v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        setattr(one, potential, v)
        return one.single_step_forward(x), getattr(one, potential)

    return step


#: What read-outs give of the potentials of a sequence.
_DECODED: dict[str | None, Output] = {
    "last_mem": "last",
    "mean-mem": "mean",
    "max-mem": "max",
    None: "each",
}


def _drive(module: Any) -> Drive | None:
    """The drive of a read-out, whose current is its input."""
    known = (neuron.NonSpikingIFNode, neuron.NonSpikingLIFNode)
    kind = kind_of(type(module), known, besides=("forward",))
    if kind is neuron.NonSpikingIFNode:
        return Drive(Charge(1.0))
    if kind is None:
        return None
    # In double precision: what a leak rounds away adds up over the steps.
    return Drive(_leak(torch.tensor(1.0 / module.tau, dtype=torch.float64), True, None))


def _no_integers(module: Any) -> str | None:
    if isinstance(module, layer.SynapseFilter):
        return (
            "a SynapseFilter leaks only where there is no spike, which no integer operation does; "
            "use a NonSpikingLIFNode, or snnTorch's Synaptic, whose current leaks at every step"
        )
    if not isinstance(module, neuron.NonSpikingBaseNode):
        return None
    if getattr(module, "membrane", None) is not None:
        return (
            "its potential is quantized between steps and given out unquantized; leave this "
            "read-out in floating point"
        )
    if module.decode not in _DECODED:
        return (
            f"decode={module.decode!r} has no integer form; use 'last_mem', 'mean-mem', 'max-mem' "
            "or None"
        )
    return None


_LINKS = (layer.Delay, layer.LinearRecurrentContainer, layer.ElementWiseRecurrentContainer)


class _SpikingJelly(hosts.Adapter):
    """See :class:`qsnn_ext.hosts.Adapter`."""

    helpers = tuple(m.__name__ for m in (base, functional, layer, neuron))

    def describe(self, module: Any) -> NeuronModel | None:
        """A node or cell of SpikingJelly, or a user's module with a memory called ``v``."""
        cls = type(module)
        if isinstance(module, rnn.SpikingRNNCellBase):
            return _describe_cell(module)
        memories = _memories(module)
        own = isinstance(module, base.MemoryModule) and "v" in memories
        if not (own or _is_of_the_host(cls) or isinstance(module, layer.SynapseFilter)):
            return None
        potential = "v" if "v" in memories else next(iter(memories), None)
        states = tuple(
            State(
                name,
                held(module, name, potential),
                None if _is_number(value, name) else "it has no number to start from",
            )
            for name, value in memories.items()
            if not (isinstance(module, neuron.GatedLIFNode) and name == "u")  # v once more
        )
        v_reset = getattr(module, "v_reset", 0.0)
        silent = (neuron.NonSpikingBaseNode, neuron.NoisyNonSpikingBaseNode)
        decodes = isinstance(module, neuron.NonSpikingBaseNode)
        threshold = getattr(module, "v_threshold", None)
        return NeuronModel(
            kind=(kind_of(cls, tuple(NEURONS)) or cls).__name__,
            states=tuple(s for s in states if s.why_float is None),
            potential=potential,
            potential_seq="v_seq",
            charge=_charge(module),
            own_drive=functools.partial(_drive, module),
            alone=functools.partial(_alone, module, potential or ""),
            spiking=not isinstance(module, (*silent, layer.SynapseFilter)),
            threshold=threshold,
            readout=isinstance(module, silent) or _is_infinite(threshold),
            output=_DECODED.get(module.decode, "each") if decodes else "spikes",
            fire=getattr(module, "surrogate_function", None),
            reset="soft" if v_reset is None else "hard",
            v_reset=v_reset or 0.0 if isinstance(v_reset, (float, type(None))) else 0.0,
            detach_reset=getattr(module, "detach_reset", False),
            order=getattr(module, "order", "fire_first"),
            stateless=_without_state(module),
            obstacle=self._obstacle(module),
            no_integers=_no_integers(module),
        )

    def _obstacle(self, module: Any) -> str | None:
        noisy = (neuron.NoisyBaseNode, neuron.NoisyNonSpikingBaseNode)
        if isinstance(module, noisy):
            return "it keeps its states inside its own forward pass"
        if isinstance(module, base.MemoryModule) and not isinstance(module, neuron.GatedLIFNode):
            cls = _float_type(module)
            stock: Any = base.MemoryModule.single_step_forward
            if cls.single_step_forward is stock and not _is_functional(cls):
                return "it runs whole sequences and has no step of its own"
            if isinstance(module, neuron.STBIFNode):
                return "it adds up counts, which have to stay whole"
            if isinstance(module, neuron.FlexSN):
                return "its states are a list of its user's, and nothing tells what they mean"
        return None

    def counterpart(self, float_type: type[nn.Module]) -> type[Any] | None:
        """Any node with memories, and those that loop over time by steps of their own."""
        if issubclass(float_type, base.MemoryModule):
            return QuantizedNode.over(float_type)
        if issubclass(float_type, (neuron.NonSpikingBaseNode, neuron.ILCBaseNode)):
            return QuantizedLoop.over(float_type)
        if issubclass(float_type, tuple(cell for cell, states in _CELLS.items() if states)):
            return QuantizedCell.over(float_type)
        return None

    def over_time(self, module: nn.Module) -> bool:
        """What is in step mode ``"m"``, and read-outs, which have no other."""
        is_readout = isinstance(module, neuron.NonSpikingBaseNode)
        return is_readout or getattr(module, "step_mode", "s") == "m"

    def link(self, module: Any) -> Link | None:
        """The recurrent containers, and ``Delay``."""
        kind = kind_of(type(module), _LINKS)
        if kind is layer.Delay:
            return Link(delay=module.delay_steps)
        if kind is layer.LinearRecurrentContainer:
            return Link("sub_module", Feedback("join", module.rc, "rc"))
        if kind is layer.ElementWiseRecurrentContainer:
            return Link("sub_module", Feedback("call", module.element_wise_function, ""))
        return None

    def encodes(self, module: nn.Module) -> bool:
        """An encoder, with or without a state."""
        return isinstance(module, (encoding.StatelessEncoder, encoding.StatefulEncoder))

    def starts_sequence(self, module: nn.Module, x: Tensor | None, left: Tensor | None) -> bool:
        """Whether the neuron's state is at its reset value: a number, not yet a tensor."""
        return self.state(module) is None

    def reset(self, model: nn.Module) -> None:
        """Put every memory in ``model`` back to its reset value, as ``functional.reset_net``."""
        for module in model.modules():
            if isinstance(module, base.MemoryModule):
                module.reset()

    def weighted(self) -> None:
        """From the first such layer on, let the host's fusion of batch norm heed them."""
        if conv_bn_fusion.fuse_conv_bn_eval is fuse_conv_bn_eval:
            conv_bn_fusion.fuse_conv_bn_eval = _fuse_conv_bn_eval

    def adopt(self, model: nn.Module, copied: bool) -> None:
        """Make ``functional.reset_net`` look at ``model`` anew."""
        functional.invalidate_reset_cache(model)

    def restart(self, module: nn.Module) -> None:
        """As ``functional.reset_net`` does, but traceable by ``torch.compile``."""
        for node in module.modules():
            if isinstance(node, neuron.BaseNode):
                node.v = 0.0 if node.v_reset is None else node.v_reset
                node.v_seq = None

    def paper_neuron(self, bits: int | None, preset: str = "paper", **options: Any) -> nn.Module:
        """See :func:`paper_neuron`."""
        return paper_neuron(bits, preset, **options)


def _float_type(module: nn.Module) -> Any:
    """The class of a node, without ours over it."""
    return module.float_type() if isinstance(module, QuantizedNeuron) else type(module)


def _is_infinite(threshold: object) -> bool:
    return isinstance(threshold, float) and threshold == math.inf


def _is_number(value: object, name: str) -> bool:
    """Whether a state starts from a number; a whole one, but for a potential's, is a counter."""
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, float) or (name == "v" and type(value) is int)


def _without_state(module: nn.Module) -> str:
    """What a node of the host does that carries no state to round."""
    if isinstance(module, (neuron.MaskedPSN, neuron.SlidingPSN)):
        return "it keeps past inputs, and no potential"
    if isinstance(module, neuron.PSN):
        return "it computes all time steps at once, and carries no potential"
    return "it carries no state from one step to the next"


ADAPTER = _SpikingJelly()


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


#: What is for users; the rest of the file serves the core.
__all__ = [
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryConv3d",
    "BinaryConvTranspose1d",
    "BinaryConvTranspose2d",
    "BinaryConvTranspose3d",
    "BinaryLinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantGatedLIFNode",
    "QuantIFNode",
    "QuantLIFNode",
    "QuantLinear",
    "QuantParametricLIFNode",
    "QuantizedCell",
    "QuantizedLoop",
    "QuantizedNode",
    "Triangle",
    "paper_neuron",
]
