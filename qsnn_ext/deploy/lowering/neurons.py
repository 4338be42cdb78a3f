"""Takes the constants of a neuron from its description, and turns them into integers.

:func:`integer_neuron` is the one place where leak, threshold and quantization become fixed point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qsnn_ext.deploy.lowering.probing import probe
from qsnn_ext.deploy.program import INT32_MAX, WIDE_LIMIT, Neuron
from qsnn_ext.errors import LoweringError
from qsnn_ext.neuron import Drive, NeuronModel, Output
from qsnn_ext.quantizers import MembraneQuantizer

Real = npt.NDArray[np.float64]

FINE = 2**12  # units of a current in a membrane scale from which on it is rounded, not exact


@dataclass
class Constants:
    """One step of a neuron in numbers: charge ``h = decay*carried + gain*x + offset``, fire, reset.

    Args:
        decay, theta: Arrays of 1 or C entries, as the host shapes them until a current is known.
        gain, offset: Numbers.
        reset: ``"hard"``, ``"soft"`` or ``"none"``.
        v_reset: Target of the hard reset, and the initial membrane potential ``v_initial``.
        strict: Fires at ``h > theta`` instead of ``h >= theta``.
        delayed: The host resets at the start of the next step (snnTorch's default).
        bits: k, or 32 for a float membrane potential.
        alpha: Frozen membrane scale.
        squash: Whether tanh precedes the quantizer.
        order: Order of quantizing and firing.
        silent: Whether its threshold is infinite: it only integrates.
        output: What it answers with: spikes, or its potential, see
            :class:`~qsnn_ext.neuron.NeuronModel`.
    """

    decay: Real
    theta: Real
    gain: float
    offset: float
    reset: Literal["hard", "soft", "none"]
    v_reset: float
    v_initial: float
    strict: bool
    delayed: bool
    bits: int
    alpha: float
    squash: bool
    order: Literal["fire_first", "quantize_first"]
    silent: bool = False
    output: Output = "spikes"

    @property
    def largest(self) -> float:
        """Bound on the constants that meet the current: threshold, reset and leaked levels."""
        reset = max(abs(self.v_reset), abs(self.v_initial), abs(self.offset))
        theta = float(self.theta.max())
        if self.bits == 32 and self.delayed:
            theta /= max(float(self.decay.min()), 0.01)
        return theta + reset + max(self.alpha, 0.0) * (self.bits != 32)


def _array(value: Any) -> Real:
    tensor = torch.as_tensor(value).detach().to(torch.float64).cpu()
    return np.atleast_1d(np.asarray(tensor.numpy(), np.float64))


def read_neuron(name: str, module: nn.Module, model: NeuronModel) -> tuple[Constants, Drive]:
    """The constants of a neuron of any host, and how its current comes about.

    Args:
        name: Module path, for messages.
        module: The neuron.
        model: Its description.

    Raises:
        LoweringError: For neurons with no integer equivalent; says why.
    """
    drive, output = model.drive, model.output
    if drive is None and (found := probe(model)) is not None:
        drive, output = Drive(found.charge), "potential" if found.readout else output
    fires = model.fire is not None and model.threshold is not None
    if drive is None or (output == "spikes" and not fires):
        raise LoweringError(
            f"{name}: a {type(module).__name__} has no integer form; neurons that "
            "can be lowered are LIFNode, IFNode, ParametricLIFNode, Leaky, RLeaky, Synaptic and "
            "RSynaptic, their quantized versions, and those of your own whose step charges in "
            "proportion to potential and current"
        )
    if model.obstacle is not None:
        raise LoweringError(f"{name}: state_quant is not exported; use QLeaky(bits=...)")
    if (_array(model.graded) != 1.0).any():
        raise LoweringError(
            f"{name}: graded spikes are not single bits; set graded_spikes_factor=1"
        )
    bits, alpha, squash = membrane_of(name, model.quantizer)
    if bits == 32 and model.reset == "soft" and model.resets_again:
        raise LoweringError(
            f"{name}: a float membrane potential with reset_delay=False and subtraction can "
            "be reset twice; use reset_delay=True"
        )
    constants = Constants(
        decay=_array(drive.charge.decay), theta=_array(model.threshold if fires else math.inf),
        gain=_number(drive.charge.gain), offset=_number(drive.charge.offset), reset=model.reset,
        v_reset=model.v_reset, v_initial=model.v_reset,
        strict=model.fire is None or _strict(model.fire), delayed=model.delayed, bits=bits,
        alpha=alpha, squash=squash, order=model.order, output=output,
    )  # fmt: skip
    if output != "spikes" or bool(np.isposinf(constants.theta).all()):
        constants.silent, constants.reset, constants.theta = True, "none", np.ones(1)
        constants.delayed, constants.order = False, "fire_first"
    if not (constants.theta > 0).all() or not np.isfinite(constants.theta).all():
        raise LoweringError(f"{name}: its threshold is not a positive number; set one above 0")
    return constants, drive


def integrator(name: str, decay: Any, quantizer: MembraneQuantizer | None) -> Constants:
    """The constants of what leaks and never fires."""
    bits, alpha, squash = membrane_of(name, quantizer)
    return Constants(
        decay=_array(decay), theta=np.ones(1), gain=1.0, offset=0.0, reset="none", v_reset=0.0,
        v_initial=0.0, strict=True, delayed=False, bits=bits, alpha=alpha, squash=squash,
        order="fire_first", silent=True,
    )  # fmt: skip


def _number(value: Any) -> float:
    return float(value.detach()) if isinstance(value, torch.Tensor) else float(value)


def membrane_of(name: str, quantizer: MembraneQuantizer | None) -> tuple[int, float, bool]:
    """Bits, frozen scale of a carried state, and whether tanh precedes its quantizer."""
    if quantizer is None:
        return 32, 1.0, False
    if quantizer.mode != "frozen" or not quantizer.calibrated:
        raise LoweringError(
            f"{name}: its membrane scale is not frozen, so one sample's result would depend on "
            "its batch; run qsnn_ext.calibrate(model, batches) first"
        )
    return quantizer.bits, _number(quantizer.alpha), quantizer.squash == "tanh"


def _strict(surrogate: Any) -> bool:
    """Whether the surrogate does not fire at exactly the threshold."""
    return not bool(surrogate(torch.zeros(1)).item() >= 0.5)


def fits_unit(m: Constants, unit: float) -> bool:
    """Whether whole units of the current are fine enough for the neuron's constants."""
    one = unit * m.gain
    constants = [m.decay * m.v_reset + m.offset, np.array([m.v_reset])]
    if m.reset == "soft":
        constants.append(m.theta)
    if m.bits == 32:
        if (m.decay != 1).any():
            return False
    else:
        n = 2 ** (m.bits - 1) - 1
        constants.append((m.decay.reshape(-1, 1) * np.arange(-n, n + 1) * m.alpha / n).reshape(-1))
        if m.delayed:
            constants += [m.decay * m.theta, m.theta]
    units = np.concatenate([np.asarray(c, np.float64).reshape(-1) for c in constants]) / one
    return bool(np.abs(units - np.rint(units)).max() < 1e-6)


def _int32(name: str, what: str, values: Any) -> npt.NDArray[np.int32]:
    values = np.atleast_1d(np.asarray(values, np.float64))
    if not np.isfinite(values).all() or np.abs(values).max(initial=0) >= 2**30:
        raise LoweringError(
            f"{name}: its {what}, up to {np.abs(values).max(initial=0):.3g} units of its input, "
            "does not fit the fixed-point range; look for NaN and for exploded or vanished scales "
            "in it and in the batch norm or layer before it"
        )
    integers: npt.NDArray[np.int32] = values.astype(np.int64).astype(np.int32)
    return integers


def _first_at_or_above(real: Any, strict: bool) -> Real:
    """The smallest integer x with ``x >= real`` (``x > real`` if strict)."""
    result: Real = np.floor(real) + 1 if strict else np.ceil(real)
    return result


def integer_neuron(
    name: str,
    m: Constants,
    source: int,
    target: int,
    unit: float,
    channels: int,
    membrane: int | None = None,
    reading_unit: float = 1.0,
) -> Neuron:
    """The integer neuron for a current whose unit is ``unit``.

    Everything is divided by the gain, so that the current needs no multiplication.

    Args:
        name: Module path.
        m: What to build.
        source, target: Indices of current and spikes.
        unit: Real value of one unit of the current.
        channels: Channels of the current.
        membrane: Index of the membrane output, if it has one.
        reading_unit: Real value of one unit of the membrane output.

    Raises:
        LoweringError: If a constant does not fit, or has as many entries as neither 1 nor C.
    """
    for what, array in (("leak", m.decay), ("threshold", m.theta)):
        if array.size not in (1, channels):
            raise LoweringError(
                f"{name}: its {what} has {array.size} entries; give it 1 or {channels} (one per "
                "channel)"
            )
    one = unit * m.gain  # membrane potential that one unit of current adds
    if m.silent:
        still = replace(m, silent=False)
        op = integer_neuron(name, still, source, target, unit, channels, membrane, reading_unit)
        return replace(op, threshold=np.array([INT32_MAX], np.int32))
    if m.bits == 32:
        return _wide(name, m, source, target, one, membrane, reading_unit)
    n = 2 ** (m.bits - 1) - 1
    alpha = max(m.alpha, 0.0)
    step = alpha / n
    size = 2**m.bits
    codes = np.arange(size)
    codes = np.where(codes >= size // 2, codes - size, codes).astype(np.float64)
    levels = codes * step
    theta = m.theta[:, None]
    decay = m.decay[:, None]
    initial = 0
    delay: Literal["none", "table"] = "none"
    ceiling = n
    stored = np.broadcast_to(levels, (1, size))

    def reset(v: Real) -> Real:
        fired = (v > theta) if m.strict else (v >= theta)
        if m.reset == "soft":
            return np.where(fired, v - theta, v)
        if m.reset == "hard":
            return np.where(fired, m.v_reset, v)
        return v + 0 * theta

    if m.order == "quantize_first":
        if m.delayed and m.reset == "soft":  # the reset is not leaked
            fired = (levels > theta) if m.strict else (levels >= theta)
            leak = decay * levels - np.where(fired, theta, 0.0)
        else:
            leak = decay * reset(np.broadcast_to(levels, (theta.shape[0], size)))
        # In float32, as the simulation compares, so that a level on the threshold falls alike.
        grid = np.arange(-n, n + 1, dtype=np.float32) * np.float32(np.float32(alpha) / n)
        side: Literal["left", "right"] = "right" if m.strict else "left"
        threshold = np.searchsorted(grid, m.theta.astype(np.float32), side=side) - n
    elif m.delayed and m.reset != "none":
        delay = "table"
        # What did not fire is carried as the largest level below the threshold at most: one code
        # for all channels, or, where thresholds differ, what each channel makes of the codes above.
        kept = np.broadcast_to(levels, (theta.shape[0], size))
        if step:
            highest = np.minimum(np.floor(theta / step), n)
            kept = np.minimum(levels, highest * step)
            if (highest == highest[0]).all():
                ceiling = int(highest[0, 0])
        quiet = decay * kept
        soft = m.reset == "soft"
        fired_leak = decay * (levels + theta) - theta if soft else np.zeros_like(quiet)
        leak = np.concatenate([quiet, fired_leak], axis=1)
        stored = np.concatenate([kept, levels + theta], axis=1)
        threshold = _first_at_or_above(m.theta / one, m.strict)
    else:
        leak = decay * levels + 0 * theta
        threshold = _first_at_or_above(m.theta / one, m.strict)
    leak = np.array(leak + m.offset)
    start = decay * m.v_initial + m.offset
    if np.abs(leak[:, 0] - start[:, 0]).max() > 0:
        initial = size // 2  # the one code no quantization produces carries the initial potential
        leak[:, initial] = start[:, 0]
    reset_value = np.array([m.v_reset]) if m.reset == "hard" else m.theta
    if leak.shape[0] > 1 and (leak == leak[:1]).all():
        leak = leak[:1]
    reading = np.zeros(0, np.int32)
    if membrane is not None:
        if stored.shape[0] > 1:
            raise LoweringError(
                f"{name}: the membrane potential it gives out depends on its channel; use one "
                "threshold for all channels"
            )
        reading = _int32(name, "membrane", np.rint(stored[0] / reading_unit))
    return Neuron(
        name, source, target, m.bits,
        leak=_int32(name, "leak", np.rint(leak / one)),
        threshold=_int32(name, "threshold", threshold),
        bounds=_bounds(m, n, alpha, one),
        reset=m.reset, reset_value=_int32(name, "reset", np.rint(reset_value / one)),
        order=m.order, delay=delay, ceiling=ceiling, initial=initial, membrane=membrane,
        reading=reading,
    )  # fmt: skip


def _bounds(m: Constants, n: int, alpha: float, one: float) -> npt.NDArray[np.int32]:
    """Integers from which on each code is reached: ``code = (number of bounds <= v) - n``.

    Code c begins at ``(c - 1/2) * alpha/n``; on the boundary itself rounding half to even gives
    the even neighbour. With 2 bits that boundary is met again and again: the largest current there
    is makes the scale, and after a leak by half it leads from code -1 to exactly there. A fine
    current is rounded by less than 2 units, which so still count as the boundary.
    """
    limit = float(2**30)
    if alpha <= 0:  # every membrane potential quantizes to code 0
        return np.repeat([-limit, limit], n).astype(np.int32)
    codes = np.arange(-n + 1, n + 1, dtype=np.float64)
    edge = (codes - 0.5) * alpha / n
    if m.squash:
        with np.errstate(divide="ignore"):
            edge = np.where(np.abs(edge) < 1, np.arctanh(np.clip(edge, -1, 1)), np.sign(edge) * 1e9)
    even = codes % 2 == 0
    wider = 2 if n == 1 and alpha / one >= FINE else 0
    bounds = np.where(even, np.ceil(edge / one) - wider, np.floor(edge / one) + 1 + wider)
    return np.clip(bounds, -limit, limit).astype(np.int64).astype(np.int32)


def _wide(
    name: str,
    m: Constants,
    source: int,
    target: int,
    one: float,
    membrane: int | None,
    reading_unit: float,
) -> Neuron:
    theta, decay = m.theta, m.decay
    value = np.array([m.v_reset]) if m.reset == "hard" else theta
    reading = np.zeros(0, np.int32)
    back = 0.0
    if m.delayed and m.reset == "soft":
        # The host leaks first and subtracts theta afterwards: carry u - theta/beta instead.
        if decay.min() <= 0.01:
            raise LoweringError(
                f"{name}: a delayed reset by subtraction cannot be lowered for a beta this small; "
                "use one above 0.01, or reset_delay=False"
            )
        value = theta / decay
        back = float(value[0] / one)
    if membrane is not None:
        if m.delayed and m.reset == "hard":
            raise LoweringError(
                f"{name}: a float neuron with a delayed reset to zero does not keep the membrane "
                "potential it gives out; quantize the neuron or use reset_mechanism='none'"
            )
        if value.size > 1 and back:
            raise LoweringError(
                f"{name}: the membrane potential it gives out depends on its channel; use one "
                "threshold for all channels"
            )
        if not math.isclose(reading_unit, one, rel_tol=1e-12):
            raise LoweringError(
                f"{name}: the membrane potential it gives out is scaled; return it as it is"
            )
        reading = _int32(name, "membrane", [0, np.rint(back)])
    shift = 30
    leak = np.stack(
        [
            np.rint(decay * 2.0**shift),
            np.full(decay.size, shift),
            np.full(decay.size, np.rint(m.offset / one)),
        ],
        axis=1,
    )
    initial = round(m.v_initial / one)
    if abs(initial) > WIDE_LIMIT:
        raise LoweringError(
            f"{name}: its initial membrane potential {m.v_initial:.3g} is out of the fixed-point "
            "range; use a v_reset nearer to the threshold"
        )
    return Neuron(
        name, source, target, 32,
        leak=leak.astype(np.int64).astype(np.int32),
        threshold=_int32(name, "threshold", _first_at_or_above(theta / one, m.strict)),
        bounds=np.zeros(0, np.int32), reset=m.reset,
        reset_value=_int32(name, "reset", np.rint(value / one)),
        initial=initial, membrane=membrane, reading=reading,
    )  # fmt: skip
