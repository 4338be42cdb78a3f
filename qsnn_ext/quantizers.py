"""Quantizers that answer for themselves: bits, levels, quantized value, integer codes and scale.

Layers, neurons, report, conversion and export all ask the quantizer; nobody keeps a second table.
``codes(x)`` returns ``(codes, scale)``, and ``codes * scale`` equals ``quantizer(x)`` bit for bit.

The two presets bundle the options in which the paper and its authors' code differ. A preset is
nothing but a set of options that can each be given on its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext.errors import ConfigError, InputError, StateError

WEIGHT_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
MEMBRANE_BITS = (2, 3, 4, 5, 6, 7, 8)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigError(f"{name}={value!r} is unknown; choose one of {listed}.")


def _or_none(option: Any) -> Any:
    """An option's value; the word for none is ``"none"`` where ``None`` leaves it to a preset."""
    return None if option == "none" else option


def check_bits(bits: Any, allowed: tuple[int, ...], what: str) -> int | None:
    """The bit width as an ``int``, or ``None`` for "not quantized" (``None`` or 32).

    Args:
        bits: what was asked for.
        allowed: the widths that can be used, ascending.
        what: ``"weight"``, ``"integer weight"`` or ``"membrane"``, for the message.

    Raises:
        ConfigError: any other value; the message lists what is allowed.
    """
    if bits is None or (type(bits) is int and bits == 32):
        return None
    if type(bits) is not int or bits not in allowed:
        hint = ""
        if bits == 1:
            hint = (
                " A sign carries no membrane potential; 2 bits is the least."
                if what == "membrane"
                else " For 1 bit use BinaryWeight."
            )
        raise ConfigError(
            f"{what} bits={bits!r} cannot be used; choose {allowed[0]} to {allowed[-1]}, "
            f"or None (or 32) for no quantization.{hint}"
        )
    return bits


def parse_bits(shorthand: str) -> tuple[int | None, int | None]:
    """``"1w-2u"`` to ``(1, 2)``: bits of weights and of membrane potential; 32 becomes ``None``.

    Raises:
        ConfigError: not of the form ``<weight bits>w-<membrane bits>u``, or bits out of range.
    """
    match = re.fullmatch(r"(\d+)w-(\d+)u", shorthand) if isinstance(shorthand, str) else None
    if match is None:
        raise ConfigError(
            f"bits {shorthand!r} are not of the form '1w-2u' "
            "(weight bits 1 to 8 or 32, membrane bits 2 to 8 or 32)."
        )
    return (
        check_bits(int(match[1]), WEIGHT_BITS, "weight"),
        check_bits(int(match[2]), MEMBRANE_BITS, "membrane"),
    )


class Quantizer(nn.Module):
    """What all quantizers share.

    Only :class:`LearnedMembraneQuantizer` holds a parameter, so swapping another in leaves
    optimizers and checkpoints valid.

    Attributes:
        bits: width of one integer code.
        widths: the widths that there are of its kind, ascending.
    """

    bits: int
    widths: ClassVar[tuple[int, ...]]

    @classmethod
    def with_bits(cls, bits: int, **options: Any) -> Self:
        """One of that width.

        Raises:
            ConfigError: there is none of that width, or an option cannot be used.
        """
        if bits not in cls.widths:
            listed = " or ".join(map(str, cls.widths))
            raise ConfigError(f"a {cls.__name__} has {listed} bits, not {bits!r}.")
        return cls(bits, **options) if len(cls.widths) > 1 else cls(**options)

    @property
    def levels(self) -> tuple[int, ...]:
        """All integer codes, ascending."""
        n = F.levels(self.bits)
        return tuple(range(-n, n + 1))

    def scale_count(self, x: Tensor) -> int:
        """How many scale factors quantizing ``x`` takes."""
        return 1

    def options(self) -> dict[str, Any]:
        """The constructor arguments: ``type(q)(**q.options())`` is an equal quantizer."""
        raise NotImplementedError

    def check_shape(self, shape: torch.Size) -> None:
        """Raise a :class:`~qsnn_ext.errors.QSNNError` if that shape cannot be quantized."""

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integer codes (int8, like ``x``) and the scale; ``codes * scale == self(x)`` exactly."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items())


def _check_finite(x: Tensor, what: str) -> None:
    if not torch.isfinite(x).all():
        raise InputError(f"{what} hold NaN or infinity, which have no integer code; mend them.")


def _integers(codes: Tensor, what: str) -> Tensor:
    _check_finite(codes, what)
    return codes.to(torch.int8)


def _shortest(number: Tensor) -> float:
    """A 0-dim tensor with no more digits than it takes: 0.1 and not 0.10000000149."""
    number = number.detach().cpu()
    wide = number if number.dtype == torch.float64 else number.float()
    return float(str(wide.numpy()[()]))


class BinaryWeight(Quantizer):
    """1-bit weights ``alpha_w * sign(What)`` (Eq. 6), with ``What`` standardised (Eq. 16).

    Backward: the sign's pseudo-gradient (:func:`qsnn_ext.functional.sign`) times ``alpha_w``, then
    through the standardisation. ``alpha_w`` is a constant of the backward pass.

    Args:
        standardize: ``"layer"`` (Eq. 16), ``"channel"`` (the authors' code) or ``"none"``; ``None``
            is the same word here, where no preset is asked.
        scale: ``alpha_w`` per output channel: ``"mean"`` of |What| (XNOR-Net, the paper),
            ``"power_of_two"`` = 2**round(log2(mean|What|)) (the authors' code: a shift), or
            ``"none"`` for 1.
        gradient: ``"clipped"``, ``"identity"`` or ``"annealed"``.
        temperature: start of the annealed gradient's ``t``;
            :class:`~qsnn_ext.SignGradientSchedule` moves it.

    Raises:
        ConfigError: an option that is not in the lists above.
    """

    bits = 1
    widths = (1,)
    temperature: Tensor

    def __init__(
        self,
        standardize: F.Standardize | Literal["none"] | None = "layer",
        scale: Literal["mean", "power_of_two", "none"] | None = "mean",
        gradient: F.SignGradient = "clipped",
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        _check_choice("standardize", standardize, ("layer", "channel", "none", None))
        _check_choice("scale", scale, ("mean", "power_of_two", "none", None))
        _check_choice("gradient", gradient, ("clipped", "identity", "annealed"))
        if not temperature > 0:
            raise ConfigError(f"temperature={temperature!r} must be a positive number.")
        self.standardize: F.Standardize | None = _or_none(standardize)
        self.scale: Literal["mean", "power_of_two"] | None = _or_none(scale)
        self.gradient = gradient
        # A tensor, not a float: a compiled model would be compiled again for each new float.
        self.register_buffer("temperature", torch.tensor(float(temperature)), persistent=False)

    @property
    def levels(self) -> tuple[int, ...]:
        """-1 and +1."""
        return (-1, 1)

    def scale_count(self, x: Tensor) -> int:
        """One per output channel; none where the scale is 1."""
        return 0 if self.scale is None else x.shape[0]

    def options(self) -> dict[str, Any]:
        """The constructor arguments; the temperature is the current one."""
        options: dict[str, Any] = {
            "standardize": self.standardize,
            "scale": self.scale,
            "gradient": self.gradient,
        }
        if self.gradient == "annealed":
            options["temperature"] = _shortest(self.temperature)
        return options

    def check_shape(self, shape: torch.Size) -> None:
        """Raise for weights without two dimensions, or with too few to standardise."""
        if len(shape) < 2:
            raise InputError(
                f"binary weights need an output and an input dimension, got {tuple(shape)}."
            )
        if self.standardize is not None:
            F.check_standardize(shape, self.standardize)

    def _signs_and_scale(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        self.check_shape(weight.shape)
        what = weight if self.standardize is None else F.standardize(weight, self.standardize)
        signs = F.sign(what, self.gradient, self.temperature)
        magnitude = what.detach().abs()
        shape = (-1, *[1] * (weight.dim() - 1))
        if self.scale is None:
            alpha = magnitude.new_ones(weight.shape[0])
        else:
            alpha = magnitude.flatten(1).mean(1)
            if self.scale == "power_of_two":
                # A channel of zeros has no logarithm; its scale is 0 as with "mean".
                power = torch.exp2(torch.round(torch.log2(alpha)))
                alpha = torch.where(alpha > 0, power, alpha)
        return signs, alpha.view(shape)

    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weights like ``weight`` ``[C_out, ...]``."""
        signs, alpha = self._signs_and_scale(weight)
        return signs * alpha

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in {-1, +1} (int8) and ``alpha_w`` of shape ``[C_out, 1, ...]``."""
        signs, alpha = self._signs_and_scale(x)
        return _integers(signs, "weights"), alpha


class IntWeight(Quantizer):
    """``bits``-bit weights on one symmetric grid per tensor, ``alpha = max|w|``.

    ``codes = round(w/max|w| * n)``, ``n = 2**(bits-1) - 1``; straight-through identity gradient.
    The paper keeps the first and the last layer at 8 bits.

    Args:
        bits: 2 to 8.

    Raises:
        ConfigError: bits out of range.
    """

    widths = WEIGHT_BITS[1:]

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        checked = check_bits(bits, self.widths, "integer weight")
        if checked is None:
            raise ConfigError(
                "IntWeight needs bits from 2 to 8; for float weights use no quantizer."
            )
        self.bits = checked

    def options(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {"bits": self.bits}

    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weights like ``weight``."""
        return F.quantize_symmetric(weight, F.membrane_alpha(weight, "absmax"), self.bits)

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in -n..n (int8) and the 0-dim scale ``max|w|/n``."""
        codes, scale = F.symmetric_codes(x, F.membrane_alpha(x, "absmax"), self.bits)
        return _integers(codes, "weights"), scale


class TernaryWeight(Quantizer):
    """Weights ``alpha_w * {-1, 0, 1}`` (Ternary Weight Networks, arXiv:1605.04711).

    ``codes = sign(w) 1[|w| > delta]`` with ``delta = threshold * mean|w|``, and ``alpha_w`` is the
    mean of the ``|w|`` above ``delta``, both per output channel. The gradient is the identity.

    Args:
        threshold: 0.7 is about the best for weights that are normally or uniformly distributed.

    Raises:
        ConfigError: ``threshold`` is no positive number.
    """

    bits = 2
    widths = (2,)

    def __init__(self, threshold: float = 0.7) -> None:
        super().__init__()
        if isinstance(threshold, bool) or not 0 < threshold < float("inf"):
            raise ConfigError(f"threshold={threshold!r} must be a positive number.")
        self.threshold = float(threshold)

    def options(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {"threshold": self.threshold}

    def scale_count(self, x: Tensor) -> int:
        """One per output channel."""
        return x.shape[0]

    def _signs_and_scale(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = weight.detach().abs().flatten(1)
        above = magnitude > self.threshold * magnitude.mean(1, keepdim=True)
        # A channel of equal weights may have none above the threshold; its scale is 0.
        alpha = (magnitude * above).sum(1) / above.sum(1).clamp(min=1)
        signs = weight.detach().sign() * above.view(weight.shape)
        return signs, alpha.view(-1, *[1] * (weight.dim() - 1))

    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weights like ``weight`` ``[C_out, ...]``."""
        signs, alpha = self._signs_and_scale(weight)
        return F.straight_through(weight, signs * alpha)

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in {-1, 0, 1} (int8) and ``alpha_w`` of shape ``[C_out, 1, ...]``."""
        signs, alpha = self._signs_and_scale(x)
        return _integers(signs, "weights"), alpha


class MembraneQuantizer(Quantizer):
    """The k-bit membrane potential of one layer (Eq. 10, 11), and where its scale comes from.

    ``mode="dynamic"`` takes ``alpha_u`` over the whole tensor at every time step, as the paper
    does, so a sample's result depends on its batch mates. ``mode="frozen"`` uses the stored value
    ``alpha``, which :func:`qsnn_ext.calibrate` sets or training accumulates as a running mean; a
    sample's result is then its own, and this is what is exported. ``eval()`` changes nothing but
    that the running mean stands still.

    ``alpha`` enters the ``state_dict`` only when frozen and calibrated, so checkpoints of float
    models load strictly. A ``state_dict`` with an ``alpha`` makes the quantizer that loads it
    frozen, as the one was that it came from.

    Attributes:
        observer: called with the (squashed) potentials of every time step before they are
            quantized; ``None`` for nobody. Calibration sets it.

    Args:
        bits: 2 to 8.
        scale: ``"max"`` (the paper) or ``"absmax"`` (the authors' code); what frozen mode tracks.
        mode: ``"dynamic"`` or ``"frozen"``.
        squash: ``"none"`` or ``"tanh"`` (the authors' code).
        momentum: weight of the newest time step in the running mean of frozen mode.
        sync_scale: all-reduce the maximum over the processes of ``torch.distributed``; without it
            each process of a data-parallel run has its own scale.

    Raises:
        ConfigError: an option that is not in the lists above.
    """

    widths = MEMBRANE_BITS
    alpha: Tensor

    def __init__(
        self,
        bits: int = 2,
        scale: F.MembraneScale = "max",
        mode: Literal["dynamic", "frozen"] = "dynamic",
        squash: F.Squash | Literal["none"] | None = None,
        momentum: float = 0.1,
        sync_scale: bool = False,
    ) -> None:
        super().__init__()
        checked = check_bits(bits, self.widths, "membrane")
        if checked is None:
            raise ConfigError("MembraneQuantizer needs bits from 2 to 8; use none for a float one.")
        _check_choice("scale", scale, ("max", "absmax"))
        _check_choice("mode", mode, ("dynamic", "frozen"))
        _check_choice("squash", squash, ("none", None, "tanh"))
        if not 0 < momentum <= 1:
            raise ConfigError(f"momentum={momentum!r} must be above 0 and at most 1.")
        self.bits = checked
        self.scale = scale
        self.mode = mode
        self.squash: F.Squash | None = _or_none(squash)
        self.momentum = momentum
        self.sync_scale = sync_scale
        self.calibrated = False
        self.observer: Callable[[Tensor], None] | None = None
        self.register_buffer("alpha", torch.zeros(()))

    def options(self) -> dict[str, Any]:
        """The constructor arguments; the frozen value itself is in the ``state_dict``."""
        return {
            "bits": self.bits,
            "scale": self.scale,
            "mode": self.mode,
            "squash": self.squash,
            "momentum": self.momentum,
            "sync_scale": self.sync_scale,
        }

    def freeze(self, alpha: float | Tensor) -> None:
        """Switch to frozen mode with the given scale (the value of the largest level).

        Raises:
            ConfigError: ``alpha`` is negative, NaN or infinite.
        """
        value = torch.as_tensor(alpha, dtype=self.alpha.dtype, device=self.alpha.device).detach()
        if value.dim() or not torch.isfinite(value) or value < 0:
            raise ConfigError(f"frozen membrane scale {alpha!r} must be one finite number >= 0.")
        self.alpha.copy_(value)
        self.mode = "frozen"
        self.calibrated = True

    def observe(self, v: Tensor) -> Tensor:
        """The scale of this time step's (squashed) potentials, over all processes if asked."""
        alpha = F.membrane_alpha(v, self.scale)
        if self.sync_scale and dist.is_available() and dist.is_initialized():
            dist.all_reduce(alpha, op=dist.ReduceOp.MAX)
        return alpha

    def alpha_for(self, v: Tensor) -> Tensor:
        """The scale that rounds these (squashed) potentials, without moving the running mean."""
        if self.mode == "frozen" and self.calibrated:
            return self.alpha.to(v.dtype)
        return self.observe(v)

    def _current_alpha(self, v: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(v)
        if self.mode == "dynamic":
            return self.observe(v)
        if not self.training:
            if not self.calibrated:
                raise StateError(
                    "a frozen membrane scale is used before it has a value; call "
                    "qsnn_ext.calibrate(model, batches), or train for a step, first."
                )
            return self.alpha.to(v.dtype)
        observed = self.observe(v).clamp(min=0).to(self.alpha.dtype)
        # 0 stands for "no value yet". The tensor says so, and not a Python flag, because gradient
        # checkpointing runs a step again from the buffers' old values, and must then get the same.
        used = torch.where(self.alpha > 0, self.alpha, observed)
        # In place: data-parallel wrappers and gradient checkpointing hold on to the buffer itself.
        # Written out, not torch.lerp: the fused kernels round it the same way.
        self.alpha.copy_(used + self.momentum * (observed - used))
        self.calibrated = True
        return used.to(v.dtype)

    def quantize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize one time step of one layer; updates the running mean of frozen mode.

        Args:
            u: membrane potentials, any shape.

        Returns:
            The quantized potentials like ``u``, and the 0-dim step of their grid.

        Raises:
            StateError: frozen, in evaluation mode, and no scale has been set.
        """
        v = torch.tanh(u) if self.squash == "tanh" else u
        alpha = self._current_alpha(v)
        value = F.quantize_symmetric(v, alpha, self.bits)
        return value, alpha.clamp(min=0) / F.levels(self.bits)

    def forward(self, u: Tensor) -> Tensor:
        """The first result of :meth:`quantize`."""
        return self.quantize(u)[0]

    @torch.no_grad()
    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes in -n..n (int8) and the 0-dim scale ``alpha/n``. Updates no running mean."""
        _check_finite(x, "membrane potentials")  # clipping would make infinity a code
        v = torch.tanh(x) if self.squash == "tanh" else x
        codes, scale = F.symmetric_codes(v, self.alpha_for(v), self.bits)
        return _integers(codes, "membrane potentials"), scale

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.mode == "frozen" and self.calibrated:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = prefix + "alpha"
        if key in state_dict:
            # Only a frozen scale is ever saved, so the saved model computed with this one.
            self.mode = "frozen"
            self.calibrated = True
        else:
            # Checkpoints of float models and of dynamic scales have no alpha: keep ours.
            state_dict[key] = self.alpha
        super()._load_from_state_dict(state_dict, prefix, *args)


class LearnedMembraneQuantizer(MembraneQuantizer):
    """A membrane quantizer whose scale is learnt as the weights are (LSQ).

    ``alpha`` is a parameter that takes the first time step's maximum and then the gradient of
    :func:`qsnn_ext.functional.quantize_learned`; a scale that the optimizer takes to 0 or below
    begins anew. As with frozen scales a sample's result is its own, and the network is exported as
    it is. Runs in the eager loop. Several processes need ``sync_scale`` to begin alike.

    Args:
        bits: 2 to 8.
        scale: ``"max"`` or ``"absmax"``: what it begins with.
        squash: ``"none"`` or ``"tanh"``.
        sync_scale: begin with the maximum over all processes.

    Raises:
        ConfigError: an option that is not in the lists above.
    """

    def __init__(
        self,
        bits: int = 2,
        scale: F.MembraneScale = "max",
        squash: F.Squash | Literal["none"] | None = None,
        sync_scale: bool = False,
    ) -> None:
        super().__init__(bits, scale, "frozen", squash, sync_scale=sync_scale)
        del self.alpha
        self.alpha = nn.Parameter(torch.zeros(()))

    def options(self) -> dict[str, Any]:
        """The constructor arguments; the value itself is in the ``state_dict``."""
        kept = ("bits", "scale", "squash", "sync_scale")
        return {name: value for name, value in super().options().items() if name in kept}

    @torch.no_grad()
    def freeze(self, alpha: float | Tensor) -> None:
        """Set the scale, from which training goes on."""
        super().freeze(alpha)

    def quantize(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`MembraneQuantizer.quantize`, with a gradient of the scale."""
        if self.mode == "dynamic":  # while it is calibrated
            return super().quantize(u)
        v = torch.tanh(u) if self.squash == "tanh" else u
        if self.observer is not None:
            self.observer(v)
        if self.training:
            with torch.no_grad():
                first = self.observe(v).clamp(min=0).to(self.alpha.dtype)
                self.alpha.copy_(torch.where(self.alpha > 0, self.alpha, first))
            self.calibrated = True
        elif not self.calibrated:
            raise StateError(
                "a learnt membrane scale is used before it has a value; train for a step, or call "
                "qsnn_ext.calibrate(model, batches), first."
            )
        # A copy: the next time step may write to the parameter before the gradient is taken.
        alpha = self.alpha.clone().to(v.dtype)
        value = F.quantize_learned(v, alpha, self.bits)
        return value, alpha.detach().clamp(min=0) / F.levels(self.bits)


#: Weight quantizers by the name that a configuration gives them.
WEIGHTS: dict[str, type[Quantizer]] = {
    "binary": BinaryWeight,
    "integer": IntWeight,
    "ternary": TernaryWeight,
}

#: Every quantizer of the package by the name of its class: those that a file may name, and whose
#: result follows from what they are given and their options alone.
KINDS: dict[str, type[Quantizer]] = {
    kind.__name__: kind for kind in (*WEIGHTS.values(), MembraneQuantizer, LearnedMembraneQuantizer)
}


@dataclass(frozen=True)
class Preset:
    """A named set of options.

    Attributes:
        weight: arguments of :class:`BinaryWeight`.
        membrane: arguments of :class:`MembraneQuantizer` other than ``bits``.
        reduction: of :class:`~qsnn_ext.WSDRRegularizer` over layers, ``"sum"`` or ``"mean"``.
    """

    weight: dict[str, Any] = field(default_factory=dict)
    membrane: dict[str, Any] = field(default_factory=dict)
    reduction: Literal["sum", "mean"] = "sum"


PRESETS: dict[str, Preset] = {
    "paper": Preset(
        weight={"standardize": "layer", "scale": "mean", "gradient": "clipped"},
        membrane={"scale": "max", "squash": None},
        reduction="sum",
    ),
    "official": Preset(
        weight={"standardize": "channel", "scale": "power_of_two", "gradient": "annealed"},
        membrane={"scale": "absmax", "squash": "tanh"},
        reduction="mean",
    ),
}


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    _check_choice("preset", name, tuple(PRESETS))
    return PRESETS[name]


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not left to the preset."""
    return {name: value for name, value in options.items() if value is not None}


def weight_quantizer(
    bits: int | None, preset_name: str = "paper", kind: str | None = None, **options: Any
) -> Quantizer | None:
    """The weight quantizer of that width, ``None`` for float.

    Args:
        bits: 1 to 8, or ``None``/32.
        preset_name: ``"paper"`` or ``"official"``; matters for :class:`BinaryWeight` only.
        kind: a name in :data:`WEIGHTS`; ``None`` is binary for 1 bit, integer for 2 to 8.
        options: of the quantizer; they override the preset's, those given as ``None`` do not.

    Raises:
        ConfigError: bits out of range, an unknown kind or preset, a kind that has no such width, or
            an unknown value of an option.
    """
    checked = check_bits(bits, WEIGHT_BITS, "weight")
    base = preset(preset_name).weight
    if kind is None:
        kind = "binary" if checked == 1 else "integer"
    _check_choice("quantizer", kind, tuple(WEIGHTS))
    if checked is None:
        return None
    given = _given(options)
    return WEIGHTS[kind].with_bits(checked, **({**base, **given} if kind == "binary" else given))


def membrane_quantizer(
    bits: int | None, preset_name: str = "paper", **options: Any
) -> MembraneQuantizer | None:
    """The membrane quantizer of that width, ``None`` for float.

    Args:
        bits: 2 to 8, or ``None``/32.
        preset_name: ``"paper"`` or ``"official"``.
        options: options of :class:`MembraneQuantizer` that override the preset's; those given as
            ``None`` do not.
            ``mode="learned"`` makes a :class:`LearnedMembraneQuantizer`.

    Raises:
        ConfigError: bits out of range, an unknown preset or an unknown value of an option.
    """
    checked = check_bits(bits, MEMBRANE_BITS, "membrane")
    base = preset(preset_name).membrane
    if checked is None:
        return None
    given = {**base, **_given(options)}
    if given.get("mode") == "learned":
        made = {k: v for k, v in given.items() if k not in ("mode", "momentum")}
        return LearnedMembraneQuantizer(checked, **made)
    return MembraneQuantizer(checked, **given)
