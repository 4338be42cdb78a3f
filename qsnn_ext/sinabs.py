"""sinabs: its neurons with quantized states.

The only file that imports sinabs. Its neurons take whole sequences with the batch in front,
``[N, T, ...]``, those called ``...Squeeze`` the two folded into one, ``[N*T, ...]``, and go on from
the states that the last call left until they are reset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts, kernels
from qsnn_ext.counterparts import QuantizedNeuron, held, kind_of, rounder
from qsnn_ext.errors import InputError
from qsnn_ext.neuron import Charge, NeuronModel, State

try:
    from sinabs import activation, layers
except ImportError as error:
    raise hosts.missing("sinabs", error) from error


class Triangle:
    """The paper's surrogate (Eq. 5) as sinabs takes it: gradient ``max(0, beta - |v - theta|)``.

    Pass it as ``surrogate_grad_fn``.

    Args:
        beta: half-width and height of the triangle; positive.

    Raises:
        ConfigError: ``beta`` is not positive.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = F.check_beta(beta)

    def __call__(self, v_mem: Tensor, spike_threshold: float | Tensor) -> Tensor:
        """The derivative at these potentials, like them."""
        return (self.beta - (v_mem - spike_threshold).abs()).clamp(min=0)


class _Fire:
    """``1[x >= 0]`` for ``x = v - theta``, with the gradient that the host's surrogate gives."""

    def __init__(self, derivative: Callable[..., Tensor], threshold: Any) -> None:
        self.derivative = derivative
        self.threshold = threshold

    def __call__(self, x: Tensor) -> Tensor:
        return _Spikes.apply(x, self)  # type: ignore[no-untyped-call,no-any-return]


class _Spikes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, fire: _Fire) -> Tensor:
        ctx.save_for_backward(x)
        ctx.fire = fire
        return (x >= 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        theta = ctx.fire.threshold
        return grad * ctx.fire.derivative(x + theta, theta), None


def _closed_form(fire: Any) -> kernels.Surrogate | None:
    """The closed form of a surrogate of the host, or of ours."""
    if type(fire) is not _Fire:
        return None
    derivative: Any = fire.derivative
    if type(derivative) is Triangle:
        return kernels.Surrogate.of("triangle", [derivative.beta], strict=False)
    if type(derivative) is activation.Gaussian and (derivative.mu, derivative.grad_scale) == (0, 1):
        return kernels.Surrogate.of("erf", [1 / (derivative.sigma * math.sqrt(2))], strict=False)
    return None


kernels.RECOGNIZERS.append(_closed_form)


class QuantizedStatefulLayer(QuantizedNeuron):
    """Mixin over a neuron of sinabs: what it carries is rounded after every time step.

    Takes and returns what the neuron does. Without a quantizer (``bits=None`` or 32) the host's own
    code runs, bit for bit. ``LIF`` and ``IAF`` that fire at most once a step, with subtraction of
    the threshold or reset to 0, without synaptic current and lower bound, run as one operation; any
    other neuron runs the host's own step.

    Takes the arguments of the neuron, then those of
    :class:`~qsnn_ext.counterparts.QuantizedNeuron`.

    Raises:
        ConfigError: as there.
    """

    prefix = "Quant"
    v_mem: Tensor
    record_states: bool

    def forward(self, input_data: Tensor) -> Tensor:
        """Spikes of a sequence, like it.

        Raises:
            InputTypeError: it is not floating point.
            InputError: fewer than two dimensions, or no time step.
        """
        if self.membrane is None:
            own: Tensor = super().forward(input_data)  # type: ignore[misc]
            return own
        F.check_floating(input_data, type(self).__name__)
        if isinstance(self, layers.SqueezeMixin):
            folded: Tensor = self.squeeze_forward(input_data, self._sequence)
            return folded
        return self._sequence(input_data)

    def _sequence(self, x: Tensor) -> Tensor:
        """``[N, T, ...]``."""
        F.check_rank(x, type(self).__name__, 2, "[N, T, ...]")
        if x.shape[1] == 0:
            raise InputError(f"{type(self).__name__} got a sequence of no time steps (T = 0).")
        model = _described(self)
        if model.charge is None:
            return self._host_steps(x, model)
        if self.v_mem.shape != (x.shape[0], *x.shape[2:]):
            self._shape_states(x)
        spikes, self.v_mem = kernels.run_layer(x.transpose(0, 1), self.v_mem, model)
        spikes = spikes.transpose(0, 1)
        self.recordings: dict[str, Tensor] = {}
        self.firing_rate = spikes.mean()
        return spikes

    def _shape_states(self, x: Tensor) -> None:
        """As the host does: states of other batches are drawn from for a batch of another size."""
        host: Any = self
        if self.v_mem.shape[1:] == x.shape[2:] and self.v_mem.dim() > 0 and len(self.v_mem):
            host.handle_state_batch_size_mismatch(x.shape[0])
        else:
            host.init_state_with_shape((x.shape[0], *x.shape[2:]))

    def _host_steps(self, x: Tensor, model: NeuronModel) -> Tensor:
        """The host's own code, one time step at a time, and its states rounded after each."""
        forward, feedback = _step_of(type(self).float_type()), getattr(self, "rec_connect", None)
        outputs: list[Tensor] = []
        recorded: dict[str, list[Tensor]] = {state.name: [] for state in model.states}
        for step in torch.split(x, 1, dim=1):
            if feedback is not None and outputs:
                step = step + feedback(outputs[-1][:, 0]).reshape(step[:, 0].shape).unsqueeze(1)
            outputs.append(forward(self, step))
            for state in model.rounded:
                if state.quantizer is not None:
                    setattr(self, state.name, rounder(state.quantizer)(getattr(self, state.name)))
            for name in recorded if self.record_states else ():
                recorded[name].append(getattr(self, name))
        self.recordings = {name: torch.stack(v, 1) for name, v in recorded.items() if v}
        spikes = torch.cat(outputs, dim=1)
        self.firing_rate = spikes.mean()
        return spikes

    # ------------------------------------------------------------------ the host looks in here

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """The neuron's own: the host takes every buffer for a state, and quantizers have one."""
        own: Any = super()
        yield from own.named_buffers(prefix, False, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """All but the quantizers: the host's ``reset_states`` passes neurons with children by."""
        own: Any = super()
        for name, child in own.named_children():
            if name not in ("membrane", "carried"):
                yield name, child

    def _quantizers(self) -> list[Any]:
        own: Any = self._modules  # type: ignore[attr-defined]
        return [own[name] for name in ("membrane", "carried") if own.get(name) is not None]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for quantizer in self._quantizers() if recurse else ():
            quantizer._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        """Sets the mode of the quantizers too."""
        for quantizer in self._quantizers():
            quantizer.train(mode)
        return super().train(mode)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, bits={self.bits}, order={self.order!r})"


def _step_of(cls: Any) -> Callable[[Any, Tensor], Tensor]:
    """The code of a neuron's class that runs over ``[N, T, ...]``, without feedback."""
    wrapped = (layers.SqueezeMixin, layers.LIFRecurrent, layers.ALIFRecurrent)
    step: Callable[[Any, Tensor], Tensor] = next(
        c.forward for c in cls.__mro__ if "forward" in vars(c) and not issubclass(c, wrapped)
    )
    return step


class QuantLIF(QuantizedStatefulLayer, layers.LIF):  # type: ignore[misc]
    """sinabs' ``LIF`` with a k-bit membrane potential (Eq. 10 to 12), and synaptic current."""


class QuantIAF(QuantizedStatefulLayer, layers.IAF):  # type: ignore[misc]
    """sinabs' ``IAF`` (no leak) with a k-bit membrane potential, and synaptic current."""


class QuantALIF(QuantizedStatefulLayer, layers.ALIF):  # type: ignore[misc]
    """sinabs' ``ALIF`` (adaptive threshold) with k-bit membrane potential and adaptation."""


def _charge(module: Any) -> Charge | None:
    """The charge of a neuron where it is affine and resets as the fused operation does."""
    kind = kind_of(type(module), (layers.LIF, layers.LIFSqueeze, layers.IAF, layers.IAFSqueeze))
    if kind is None or module.spike_fn is not activation.SingleSpike or _reset(module) is None:
        return None
    bounded = module.min_v_mem is not None or module.alpha_syn_calculated is not None
    if bounded or module.record_states:
        return None
    decay = module.alpha_mem_calculated
    return Charge(decay, 1 - decay if module.norm_input else 1.0)


def _reset(module: Any) -> F.Reset | None:
    """The reset, if it is one that is known."""
    how: Any = getattr(module, "reset_fn", None)
    if type(how) is activation.MembraneSubtract and how.subtract_value is None:
        return "soft"
    if type(how) is activation.MembraneReset and how.reset_value == 0:
        return "hard"
    return None


class _Sinabs(hosts.Adapter):
    """See :class:`qsnn_ext.hosts.Adapter`."""

    def describe(self, module: Any) -> NeuronModel | None:
        """A stateful layer of sinabs, or a user's own."""
        if not isinstance(module, layers.StatefulLayer):
            return None
        names = [name for name, value in module._buffers.items() if value is not None]
        potential = "v_mem" if "v_mem" in names else next(iter(names), None)
        derived = {"spike_threshold": "it follows from the adaptation"}
        spiking = getattr(module, "spike_fn", None) is not None
        reset, adaptive = _reset(module), "spike_threshold" in names
        threshold = None if adaptive else getattr(module, "spike_threshold", None)
        forgets = isinstance(module, layers.ALIF) and module.alpha_syn_calculated is not None
        derivative = getattr(module, "surrogate_grad_fn", None)
        return NeuronModel(
            kind=type(module).__name__,
            states=tuple(State(n, held(module, n, potential), derived.get(n)) for n in names),
            potential=potential,
            charge=_charge(module),
            spiking=spiking,
            threshold=None if threshold is None else threshold.detach(),
            fire=None if derivative is None else _Fire(derivative, threshold),
            reset=reset or "none",
            detach_reset=reset == "hard",
            order=getattr(module, "order", "fire_first"),
            recurrent=hasattr(module, "rec_connect"),
            readout=not spiking,
            obstacle="it forgets its synaptic current between calls" if forgets else None,
            no_integers="sequences with the batch in front, as sinabs has them, are not lowered",
        )

    def counterpart(self, float_type: type[nn.Module]) -> type[Any] | None:
        """Any stateful layer."""
        if issubclass(float_type, layers.StatefulLayer):
            return QuantizedStatefulLayer.over(float_type)
        return None

    def reset(self, model: nn.Module) -> None:
        """Put all states to zero, as ``reset_states`` does, in tensors of their own."""
        for module in model.modules():
            if isinstance(module, layers.StatefulLayer):
                for name, value in module._buffers.items():
                    if value is not None:
                        setattr(module, name, torch.zeros_like(value))

    def paper_neuron(self, bits: int | None, preset: str = "paper", **options: Any) -> nn.Module:
        """See :func:`paper_neuron`."""
        return paper_neuron(bits, preset, **options)


ADAPTER = _Sinabs()


def _described(module: Any) -> NeuronModel:
    model = ADAPTER.describe(module)
    assert model is not None
    return model


class TimeFirst(nn.Module):
    """Runs a neuron of sinabs over ``[T, N, ...]``.

    Args:
        neuron: one that takes ``[N, T, ...]``.
    """

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x_seq: Tensor) -> Tensor:
        """Spikes of all time steps, like ``x_seq``."""
        spikes: Tensor = self.neuron(x_seq.transpose(0, 1)).transpose(0, 1)
        return spikes


def paper_neuron(bits: int | None, preset: str = "paper", **options: Any) -> TimeFirst:
    """The paper's neuron over time: leak 1/2, threshold 1, hard reset to 0, triangle.

    Args:
        bits: membrane bits, ``None`` for float.
        preset: ``"paper"`` or ``"official"``.
        options: anything else :class:`QuantLIF` takes; overrides the values above.
    """
    defaults: dict[str, Any] = {
        "tau_mem": 1 / math.log(2),
        "norm_input": False,
        "spike_fn": activation.SingleSpike,
        "reset_fn": activation.MembraneReset(),
        "surrogate_grad_fn": Triangle(),
    }
    neuron = QuantLIF(**{**defaults, **options}, bits=bits, preset=preset)
    neuron.tau_mem.requires_grad_(False)
    return TimeFirst(neuron)


#: What is for users; the rest of the file serves the core.
__all__ = [
    "QuantALIF",
    "QuantIAF",
    "QuantLIF",
    "QuantizedStatefulLayer",
    "TimeFirst",
    "Triangle",
    "paper_neuron",
]
