"""From a trained model to an integer program.

The model is traced with a sample (:mod:`qsnn_ext.deploy.tracing`), then every node is interpreted:
layers become operations, reshapes only relabel axes, and whatever repeats over time collapses into
one step, since equal operations on equal inputs are created once. What has no exact counterpart
raises :class:`~qsnn_ext.errors.LoweringError` with the module path and the reason.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.neurons import NeuronModel, Real, integer_neuron, read_neuron
from qsnn_ext.deploy.program import (
    MAX_SHIFT,
    Add,
    Affine,
    Conv,
    IntArray,
    Logic,
    Neuron,
    Op,
    Pool,
    Program,
    Value,
    sources_of,
    targets_of,
    words,
)
from qsnn_ext.deploy.tracing import origin, trace
from qsnn_ext.errors import FormatError, InputError, LoweringError

# A current is scaled so that its largest possible value has about this many bits.
CURRENT_BITS = 26  # room to be added to currents of other units
NEURON_BITS = 28  # into a neuron, where nothing but the membrane potential is added
Atom: TypeAlias = tuple[str, int]  # (axis label, size)
Axis: TypeAlias = tuple[Atom, ...]  # several atoms: axes flattened into one


@dataclass
class _Array:
    """A tensor of the model: one activation of the program, seen through relabelled axes.

    Args:
        base: Index of the activation, or the key of a convolution not yet written.
        axes: Its axes; labels T and N are time and batch, the rest C, H, W.
        scale: Real value of one unit of the activation.
        gain, bias: Per-channel real factors not yet applied (a folded batch norm), or None.
        origin: Module path that gain and bias came from last.
        steps: Time steps it stands for: None for all (or a single-step model).
        reduction: Whether time has been summed over.
    """

    base: int | _PendingConv
    axes: tuple[Axis, ...]
    scale: float = 1.0
    gain: Real | None = None
    bias: Real | None = None
    origin: str = ""
    steps: frozenset[int] | None = None
    reduction: Literal["none", "sum", "mean"] = "none"
    factor: float = 1.0  # of the reduction

    @property
    def lazy(self) -> bool:
        return self.gain is not None


@dataclass(frozen=True, eq=False)
class _PendingConv:
    """A convolution whose scale and bias are still being collected."""

    name: str
    source: int
    weight: IntArray
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]
    groups: int
    shape: tuple[int, int, int]
    reach: int  # largest absolute accumulator


@dataclass
class _Membrane:
    """The membrane potential a neuron returned."""

    key: tuple[Any, ...]
    step: int
    axes: tuple[Axis, ...]


@dataclass
class _Constant:
    """A tensor or number that does not depend on the input."""

    value: Any


@dataclass
class _NeuronUse:
    """All calls of one neuron on one current."""

    name: str
    module: nn.Module
    model: NeuronModel
    source: int
    spikes: int
    unit: float
    calls: int = 0
    membrane: int | None = None
    multi_step: bool = False


@dataclass
class _State:
    values: list[Value] = field(default_factory=list)
    high: list[int] = field(default_factory=list)  # largest absolute integer of each value
    ops: list[Op | _NeuronUse] = field(default_factory=list)


def _is_leaf(module: nn.Module) -> bool:
    if hosts.adapter_of(module) is not None or type(module).__name__ == "OverTime":
        return True
    kinds = (*_CONVS, nn.Linear, *_NORMS, *_POOLS, *_IDENTITIES, nn.Flatten)
    return isinstance(module, kinds)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POOLS = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
_IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, tuple | list):
        items = [int(v) for v in value]
        return (items[0], items[1]) if len(items) == 2 else (1, items[0])
    return (int(value), int(value))


class _Lowering:
    def __init__(self, model: nn.Module, sample: Tensor, time_first: bool, scale: float) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.state = _State()
        self.uses: dict[tuple[Any, ...], _NeuronUse] = {}
        self.memo: dict[tuple[Any, ...], int] = {}
        self.names: dict[str, int] = {}
        self.arrays: dict[fx.Node, Any] = {}
        self.steps = 1
        self.where = "the model"
        self.room: int | None = None  # bits of input codes, where the first layer found too many
        rest = sample.shape[2 if time_first else 1 :]
        if not 1 <= len(rest) <= 3:
            raise self.fail(
                f"a sample of shape {tuple(sample.shape)} is not [N, ...] or [T, N, ...] of "
                "features, channels x length or images",
                "pass one that is; time_first= tells whether its first axis is time",
            )
        self.rank = len(rest)
        shape = (rest[0], *(1,) * (3 - len(rest)), *rest[1:])
        self.input = self._value("input", shape, 0, scale, 32767)
        lead = [(("T", sample.shape[0]),)] if time_first else []
        lead.append((("N", sample.shape[1 if time_first else 0]),))
        labels = ("C", "H", "W") if len(rest) == 3 else ("C", "W") if len(rest) == 2 else ("C",)
        axes: tuple[Axis, ...]
        axes = (*lead, *(((k, s),) for k, s in zip(labels, rest, strict=True)))
        if len(rest) == 1:
            axes = (*lead, (("C", rest[0]), ("H", 1), ("W", 1)))
        elif len(rest) == 2:
            axes = (*lead, (("C", rest[0]),), (("H", 1), ("W", rest[1])))
        self.sample_array = _Array(self.input, axes, scale)
        if time_first:
            self.steps = int(sample.shape[0])
        self.has_time = time_first

    # ---- building blocks -----------------------------------------------------------------------

    def fail(self, why: str, remedy: str) -> LoweringError:
        """The error for what is being lowered: where, why, and what to do about it."""
        return LoweringError(f"{self.where}: {why}; {remedy}")

    @contextmanager
    def at(self, where: str) -> Iterator[None]:
        """Let errors and names be about another module than the one being visited."""
        before, self.where = self.where, where or self.where
        try:
            yield
        finally:
            self.where = before

    def _unique(self, name: str) -> str:
        name = name or "model"
        self.names[name] = self.names.get(name, 0) + 1
        return name if self.names[name] == 1 else f"{name}#{self.names[name]}"

    def _value(self, name: str, shape: Any, planes: int, scale: float, high: int) -> int:
        taken = {v.name for v in self.state.values}
        unique, k = name, 2
        while unique in taken:
            unique, k = f"{name}#{k}", k + 1
        c, h, w = (int(s) for s in shape)
        self.state.values.append(Value(unique, (c, h, w), planes, float(scale)))
        self.state.high.append(int(high))
        return len(self.state.values) - 1

    def _shape(self, base: int | _PendingConv) -> tuple[int, int, int]:
        return base.shape if isinstance(base, _PendingConv) else self.state.values[base].shape

    def _once(self, key: tuple[Any, ...], make: Callable[[], int]) -> int:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _fixed_point(
        self, gain: Real, bias: Real, reach: int, bits: int, beside: float
    ) -> tuple[float, IntArray, IntArray, IntArray, int]:
        """Unit, multiplier, shift and bias of ``gain * x + bias`` for ``|x| <= reach``.

        ``bits`` hold the largest result, and ``beside``, the largest constant it meets.
        """
        if not (np.isfinite(gain).all() and np.isfinite(bias).all()):
            raise self.fail(
                "its scale or bias is not finite",
                "look for NaN and infinity in its parameters and train on or load a sound "
                "checkpoint",
            )
        top = float((np.abs(gain) * reach + np.abs(bias)).max())
        held = max(top, beside)
        exponent = bits - math.ceil(math.log2(held)) if held > 0 else 16
        exponent = max(-8, min(exponent, 24))
        unit = 2.0**-exponent
        # 32-bit products are faster; use them where they leave the multiplier 15 bits.
        narrow = reach * 2**15 < 2**30
        cap, longest = ((2**30) / max(reach, 1), 30) if narrow else (2.0**30, MAX_SHIFT)
        ratio = np.abs(gain) / unit
        with np.errstate(divide="ignore"):
            shift = np.floor(np.log2(np.where(ratio > 0, cap / ratio, 1.0)))
        shift = np.clip(shift, 1, longest)
        multiplier = np.rint(gain / unit * 2.0**shift)
        if np.abs(multiplier).max() > cap + 1:
            raise self.fail(
                f"its scale, up to {float(np.abs(gain).max()):.3g}, exceeds the fixed-point range",
                "look for exploded weights or a running variance near zero",
            )
        if narrow:  # leave room for the rounding constant
            half = 2.0 ** (shift - 1)
            assert float((np.abs(multiplier) * reach + half).max()) < 2**31
        integers = np.rint(bias / unit)
        high = int(top / unit) + 4
        return (
            unit, multiplier.astype(np.int64).astype(np.int32), shift.astype(np.uint8),
            integers.astype(np.int64).astype(np.int32), high,
        )  # fmt: skip

    def settle(self, a: _Array, bits: int = CURRENT_BITS, beside: float = 0.0) -> _Array:
        """Write a pending convolution or batch norm into the program."""
        if not a.lazy:
            return a
        with self.at(a.origin):
            return self._settle(a, bits, beside)

    def _settle(self, a: _Array, bits: int, beside: float) -> _Array:
        assert a.gain is not None
        assert a.bias is not None
        shape = self._shape(a.base)
        if isinstance(a.base, _PendingConv):
            conv = a.base
            unit, m, s, b, high = self._fixed_point(a.gain, a.bias, conv.reach, bits, beside)

            def make() -> int:
                name = self._unique(conv.name)
                target = self._value(name, shape, 0, unit, high)
                self.state.ops.append(
                    Conv(
                        name, conv.source, target, conv.weight, conv.kernel, conv.stride,
                        conv.padding, conv.dilation, conv.groups, m, s, b,
                    )
                )  # fmt: skip
                return target

            key = ("conv", id(conv), m.tobytes(), s.tobytes(), b.tobytes())
        else:
            source = a.base
            unit, m, s, b, high = self._fixed_point(
                a.gain, a.bias, self.state.high[source], bits, beside
            )

            def make() -> int:
                name = self._unique(self.where)
                target = self._value(name, shape, 0, unit, high)
                self.state.ops.append(Affine(name, source, target, m, s, b))
                return target

            key = ("affine", source, m.tobytes(), s.tobytes(), b.tobytes())
        return replace(a, base=self._once(key, make), scale=unit, gain=None, bias=None)

    def lead(self, a: _Array) -> tuple[Axis, ...]:
        """Time and batch axes, in front of the axes of one sample."""
        lead = [x for x in a.axes if x and all(label in "TN" for label, _ in x)]
        if tuple(lead) != a.axes[: len(lead)]:
            raise self.fail(
                "its batch or time axis is not in front",
                "permute the axes to [T, N, ...] before it",
            )
        return tuple(lead)

    def spatial(self, a: _Array) -> tuple[Axis, ...]:
        """Axes of one sample, checked to be in the order channels, height, width."""
        rest = a.axes[len(self.lead(a)) :]
        flat = [atom for axis in rest for atom in axis if atom[0] in "CHW"]
        c, h, w = self._shape(a.base)
        expected = [("C", c), ("H", h), ("W", w)]
        mentioned = [e for e in expected if e in flat or e[1] != 1]
        if [f for f in flat if f[1] != 1] != [e for e in mentioned if e[1] != 1]:
            raise self.fail(
                f"its input axes {a.axes} are not channels, height, width in order",
                "keep that order; a program moves no data",
            )
        return rest

    def _axes(
        self, lead: tuple[Axis, ...], shape: tuple[int, int, int], like: int
    ) -> tuple[Any, ...]:
        c, h, w = shape
        if like == 1:
            return (*lead, (("C", c), ("H", h), ("W", w)))
        if like == 2:
            return (*lead, (("C", c),), (("H", h), ("W", w)))
        return (*lead, (("C", c),), (("H", h),), (("W", w),))

    # ---- layers --------------------------------------------------------------------------------

    def weight_codes(self, module: Any) -> tuple[IntArray, Real]:
        """Integer codes and per-output-channel scale, from the quantizer that trained them."""
        quantizer = getattr(module, "quantizer", None)
        if quantizer is None:
            raise self.fail(
                "its weights are floating point",
                f"quantize the {type(module).__name__} (for example quantize_(model, "
                '"1w-2u"), which keeps first and last layer at 8 bits)',
            )
        if not bool(torch.isfinite(module.weight).all()):
            raise self.fail(
                "its weights contain NaN or infinity", "train on or load a sound checkpoint"
            )
        codes, scale = quantizer.codes(module.weight)
        alpha = scale.detach().to(torch.float64).cpu().numpy().reshape(-1)
        folded = getattr(module, "output_scale", None)  # left by fold_batchnorm_
        if folded is not None:
            alpha = alpha * folded.detach().to(torch.float64).cpu().numpy()
        codes = codes.detach().cpu().numpy()
        return codes, np.broadcast_to(alpha, (codes.shape[0],)).astype(np.float64)

    def pending(
        self, module: Any, source: _Array, codes: IntArray, alpha: Real, geometry: dict[str, Any]
    ) -> _Array:
        """A convolution with weight codes ``[C_out, C_in/groups, kh, kw]``."""
        source = self.settle(source)
        assert isinstance(source.base, int)
        groups = geometry["groups"]
        cout, cin, kh, kw = codes.shape
        rows = codes.transpose(2, 3, 1, 0).reshape(kh * kw * cin, groups, cout // groups)
        rows = rows.transpose(1, 0, 2)
        value = self.state.values[source.base]
        high = self.state.high[source.base]
        if source.base == self.input:
            high = self.input_high
        if value.planes == 0 and source.base != self.input:
            raise self.fail(
                "it follows another layer without a neuron in between, so its input is a "
                "current, not spikes",
                "merge the two layers or put a neuron between them",
            )
        key = ("pending", id(module), source.base, source.scale)
        binary = set(np.unique(codes).tolist()) <= {-1, 1} and _bits(module) == 1
        if binary:
            bits = (rows > 0).astype(np.uint8)
            padded = np.zeros((*bits.shape[:2], words(bits.shape[2]) * 32), np.uint8)
            padded[:, :, : bits.shape[2]] = bits
            packed = np.packbits(padded, axis=-1, bitorder="little").view("<u4")
            weight: IntArray = np.ascontiguousarray(packed.astype(np.uint32))
            reach = rows.shape[1] * high
        else:
            weight = np.ascontiguousarray(rows.astype(np.int8))
            reach = int(np.abs(rows.astype(np.int64)).sum(axis=1).max()) * high
        if reach >= 2**31:
            if source.base == self.input:
                largest = (2**31 - 1) // (reach // high)
                self.room = (largest + 1).bit_length()  # codes reach 2**(bits - 1) - 1 <= largest
                raise self.fail(
                    f"its 32-bit accumulator may overflow, reaching {reach}, with input codes up "
                    f"to {high}",
                    f"pass input_bits={max(self.room, 2)} or less",
                )
            raise self.fail(
                f"its accumulator may reach {reach}, which exceeds 32 bits",
                "split the layer, or give its input fewer levels (spikes, smaller pooling windows)",
            )
        name = self.where
        h, w = value.shape[1:]
        top, left, bottom, right = geometry["padding"]
        out = []
        for size, before, after, k, s, d in (
            (h, top, bottom, kh, geometry["stride"][0], geometry["dilation"][0]),
            (w, left, right, kw, geometry["stride"][1], geometry["dilation"][1]),
        ):
            out.append((size + before + after - d * (k - 1) - 1) // s + 1)
        if key not in self._pendings:
            self._pendings[key] = _PendingConv(
                name, source.base, weight, (kh, kw), geometry["stride"], geometry["padding"],
                geometry["dilation"], groups, (cout, out[0], out[1]), max(reach, 1),
            )  # fmt: skip
        bias = np.zeros(cout)
        if module.bias is not None:
            bias = module.bias.detach().to(torch.float64).cpu().numpy()
        return replace(
            source, base=self._pendings[key], gain=alpha * source.scale, bias=bias, origin=name
        )

    _pendings: dict[tuple[Any, ...], _PendingConv]

    def conv(self, module: Any, x: _Array) -> _Array:
        if isinstance(module, nn.Conv3d):
            raise self.fail(
                "three-dimensional convolutions are not part of the integer program",
                "use two-dimensional ones, with time as steps",
            )
        if module.padding_mode != "zeros":
            raise self.fail(
                f"padding_mode={module.padding_mode!r} cannot be lowered", "pad with zeros"
            )
        codes, alpha = self.weight_codes(module)
        one = isinstance(module, nn.Conv1d)
        if one:
            codes = codes[:, :, None, :]
        kernel, stride, dilation = ((1, v[0]) if one else v for v in (
            module.kernel_size, module.stride, module.dilation))  # fmt: skip
        if module.padding == "valid":
            padding = (0, 0, 0, 0)
        elif module.padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            before = [t // 2 for t in total]
            padding = (before[0], before[1], total[0] - before[0], total[1] - before[1])
        else:
            p = (0, module.padding[0]) if one else module.padding
            padding = (p[0], p[1], p[0], p[1])
        geometry = {
            "stride": tuple(stride), "padding": tuple(int(i) for i in padding),
            "dilation": tuple(dilation), "groups": module.groups,
        }  # fmt: skip
        self.spatial(x)
        rest = len(x.axes) - len(self.lead(x))
        if rest != (2 if one else 3):
            raise self.fail(
                f"its input has {rest} axes besides batch and time",
                f"give it {'[C, L]' if one else '[C, H, W]'} per sample",
            )
        y = self.pending(module, x, codes, alpha, geometry)
        return replace(y, axes=self._axes(self.lead(x), self._shape(y.base), rest))

    def linear(self, module: Any, x: _Array) -> _Array:
        rest = self.spatial(x)
        c, h, w = self._shape(x.base)
        if len(rest) != 1 and math.prod(n for axis in rest[:-1] for _, n in axis) != 1:
            raise self.fail(
                "a linear layer must see all features of a sample in one axis",
                "put a Flatten before it",
            )
        codes, alpha = self.weight_codes(module)
        # A flattened [C, H, W] is read by a kernel that covers it.
        codes = codes.reshape(codes.shape[0], c, h, w)
        geometry = {"stride": (1, 1), "padding": (0, 0, 0, 0), "dilation": (1, 1), "groups": 1}
        y = self.pending(module, x, codes, alpha, geometry)
        return replace(y, axes=self._axes(self.lead(x), self._shape(y.base), 1))

    def norm(self, module: Any, x: _Array) -> _Array:
        if module.running_mean is None or module.running_var is None:
            raise self.fail(
                "a batch norm without running statistics makes a sample depend on its batch",
                "build it with track_running_stats=True and train it",
            )
        for what in ("running_mean", "running_var", "weight", "bias"):
            value = getattr(module, what)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise self.fail(
                    f"its {what} contains NaN or infinity",
                    "train on or load a sound checkpoint; running statistics are also taken anew "
                    "by reset_running_stats() and a pass over data in training mode",
                )
        if bool((module.running_var + module.eps <= 0).any()):
            raise self.fail(
                "its running_var is not positive", "load a sound checkpoint or train it anew"
            )
        self.spatial(x)

        def real(t: Any, default: float) -> Real:
            if t is None:
                return np.full(module.num_features, default)
            return np.asarray(t.detach().to(torch.float64).cpu().numpy())

        gamma, beta = real(module.weight, 1.0), real(module.bias, 0.0)
        factor = gamma / np.sqrt(real(module.running_var, 1.0) + module.eps)
        shift = beta - real(module.running_mean, 0.0) * factor
        c = self._shape(x.base)[0]
        if factor.size != c:
            raise self.fail(
                f"it normalises {factor.size} features of a value of {c} channels",
                "give it as many features as its input has channels",
            )
        gain = x.gain if x.gain is not None else np.full(c, x.scale)
        bias = x.bias if x.bias is not None else np.zeros(c)
        return replace(x, gain=gain * factor, bias=bias * factor + shift, origin=self.where)

    def pool(self, module: Any, x: _Array) -> _Array:
        _, h, w = self._shape(x.base)
        one = isinstance(module, nn.MaxPool1d | nn.AvgPool1d | nn.AdaptiveAvgPool1d)
        if isinstance(module, nn.AdaptiveAvgPool1d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            size: Any = module.output_size
            wanted: Any = (
                [1, size] if one else list(size) if isinstance(size, tuple | list) else [size] * 2
            )
            out = [n if o is None else int(o if not isinstance(o, tuple) else o[0])
                   for o, n in zip(wanted, (h, w), strict=True)]  # fmt: skip
            return self.adaptive(x, (out[0], out[1]), isinstance(module, nn.AdaptiveMaxPool2d))
        if getattr(module, "return_indices", False):
            raise self.fail("return_indices cannot be lowered", "pool without it")
        if one and (h, w) == (1, 1) and "C" in {label for label, _ in x.axes[-1]}:
            return self.vote(module, x)
        stride = module.stride if module.stride is not None else module.kernel_size
        first = (
            (lambda v: (v, v)) if not one else (lambda v: (1, v[0] if isinstance(v, tuple) else v))
        )
        kernel = _pair(module.kernel_size) if not one else first(module.kernel_size)
        steps = _pair(stride) if not one else first(stride)
        p = _pair(module.padding) if not one else (0, first(module.padding)[1])
        function: Literal["max", "sum"] = "max"
        if isinstance(module, nn.AvgPool1d | nn.AvgPool2d):
            function = "sum"
            if getattr(module, "divisor_override", None):
                raise self.fail("divisor_override cannot be lowered", "pool without it")
            if any(p) and not module.count_include_pad:
                raise self.fail(
                    "count_include_pad=False divides by a different number at the edge",
                    "set count_include_pad=True, or pool without padding",
                )
        elif _pair(module.dilation) != (1, 1) and module.dilation != 1:
            raise self.fail("dilated pooling cannot be lowered", "pool with dilation=1")
        if module.ceil_mode:
            for size, k, s, q in zip((h, w), kernel, steps, p, strict=True):
                if (size + 2 * q - k) % s:
                    raise self.fail(
                        "ceil_mode adds a partial window here",
                        "turn it off and pad the input instead",
                    )
        self.spatial(x)
        return self.window(x, function, kernel, steps, (p[0], p[1], p[0], p[1]))

    def adaptive(self, x: _Array, out: tuple[int, int], maximum: bool) -> _Array:
        _, h, w = self._shape(x.base)
        self.spatial(x)
        if h % out[0] == 0 and w % out[1] == 0:
            kernel = (h // out[0], w // out[1])
            return self.window(x, "max" if maximum else "sum", kernel, kernel, (0, 0, 0, 0))
        if out[0] % h == 0 and out[1] % w == 0:
            return self.window(x, "repeat", (out[0] // h, out[1] // w), (1, 1), (0, 0, 0, 0))
        raise self.fail(
            f"adaptive pooling from {h}x{w} to {out[0]}x{out[1]} has windows of unequal size",
            "choose an output size that divides the input's, or another input size",
        )

    def window(
        self,
        x: _Array,
        function: Literal["max", "sum", "repeat"],
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int, int, int],
    ) -> _Array:
        x = self.settle(x)
        assert isinstance(x.base, int)
        source, area = x.base, kernel[0] * kernel[1]
        rest = len(x.axes) - len(self.lead(x))
        if kernel == (1, 1) and stride == (1, 1) and not any(padding):
            return x
        value, high = self.state.values[source], self.state.high[source]
        c, h, w = value.shape
        if function == "repeat":
            shape = (c, h * kernel[0], w * kernel[1])
        else:
            shape = (
                c,
                (h + padding[0] + padding[2] - kernel[0]) // stride[0] + 1,
                (w + padding[1] + padding[3] - kernel[1]) // stride[1] + 1,
            )
        scale = x.scale
        planes = value.planes
        if function == "sum":
            high, scale = high * area, scale / area
            planes = high.bit_length() if planes else 0
            if high >= 2**31 or planes > 16:
                raise self.fail(
                    "the sum of its window does not fit 16 bits of a count or 32 of a current",
                    "use smaller windows",
                )

        def make() -> int:
            name = self._unique(self.where)
            target = self._value(name, shape, planes, scale, high)
            self.state.ops.append(Pool(name, source, target, function, kernel, stride, padding))
            return target

        base = self._once(("pool", source, function, kernel, stride, padding), make)
        return replace(x, base=base, scale=scale, axes=self._axes(self.lead(x), shape, rest))

    def vote(self, module: Any, x: _Array) -> _Array:
        """Average of neighbouring features: SpikingJelly's VotingLayer."""
        if not isinstance(module, nn.AvgPool1d):
            raise self.fail("a maximum over features cannot be lowered", "average them (AvgPool1d)")
        k = int(_pair(module.kernel_size)[1])
        c = self._shape(x.base)[0]
        if _pair(module.stride)[1] != k or _pair(module.padding)[1] or c % k:
            raise self.fail(
                "features must be averaged in groups that do not overlap",
                "use kernel_size = stride, a divisor of the features, and no padding",
            )
        x = self.settle(x)
        assert isinstance(x.base, int)
        source = x.base
        if self.state.values[source].planes == 0 and source != self.input:
            raise self.fail(
                "averaging features needs spikes as its input", "put a neuron before it"
            )
        key = ("vote", source, k)
        if key not in self._pendings:
            self._pendings[key] = _PendingConv(
                self.where, source, np.ones((c // k, k, 1), np.int8), (1, 1), (1, 1), (0, 0, 0, 0),
                (1, 1), c // k, (c // k, 1, 1), k * self.state.high[source],
            )  # fmt: skip
        axes = (*x.axes[:-1], (("C", c // k), ("H", 1), ("W", 1)))
        gain = np.full(c // k, x.scale / k)
        return replace(
            x, base=self._pendings[key], gain=gain, bias=np.zeros(c // k), axes=axes,
            origin=self.where,
        )  # fmt: skip

    # ---- neurons -------------------------------------------------------------------------------

    def neuron(self, module: Any, x: _Array, mem: Any, name: str) -> Any:
        """One call of a neuron: spikes, or (spikes, membrane) as the host returns them."""
        inner = module.neuron if type(module).__name__ == "OverTime" else module
        model = read_neuron(name or "the model", inner)
        x = self.settle(x, NEURON_BITS, model.largest / model.gain)
        assert isinstance(x.base, int)
        source = x.base
        over_time = any(label == "T" for axis in x.axes for label, _ in axis)
        over_time = over_time or type(module).__name__ == "OverTime"
        own = "hand the membrane potential it returned last, and nothing else, to its next call"
        if mem is None:
            others = [u for k, u in self.uses.items() if k[0] == id(inner) and k[1] != source]
            if others:
                raise self.fail(
                    "it is used in two places of the network, which would share a state",
                    "give each place a neuron of its own",
                )
        key = (id(inner), source)
        if key not in self.uses:
            shape = self.state.values[source].shape
            unique = self._unique(name)
            spikes = self._value(unique + ".spikes", shape, 1, 1.0, 1)
            use = _NeuronUse(unique, inner, model, source, spikes, x.scale, multi_step=over_time)
            self.uses[key] = use
            self.state.ops.append(use)
        use = self.uses[key]
        step = use.calls
        use.calls += 1
        if use.multi_step and step:
            raise self.fail(
                "it is called more than once on a whole sequence",
                "give each place a neuron of its own",
            )
        if x.steps is not None and x.steps != frozenset([step]):
            raise self.fail(
                f"its call number {step} sees the input of step {sorted(x.steps)}",
                "feed the time steps in order, each once",
            )
        if isinstance(mem, _Membrane):
            if mem.key != key or mem.step != step - 1:
                raise self.fail(
                    "it continues from a membrane potential that is not its own last",
                    own,
                )
        elif isinstance(mem, _Constant):
            zero = torch.as_tensor(mem.value).abs().max() == 0 if _numel(mem.value) else True
            if step or not bool(zero):
                raise self.fail(
                    "its membrane potential does not start at zero and stay its own",
                    own,
                )
        elif mem is not None:
            raise self.fail(
                "its membrane potential is computed by something else than itself",
                own,
            )
        steps = None if over_time else frozenset([step])
        self.steps = max(self.steps, step + 1)
        spikes_array = _Array(use.spikes, x.axes, 1.0, steps=steps)
        if over_time or not _returns_membrane(inner):
            return spikes_array
        return (spikes_array, _Membrane(key, step, x.axes))

    def reading(self, m: _Membrane) -> _Array:
        """Make the membrane potential of a neuron an output of it."""
        use = self.uses[m.key]
        unit = use.unit * use.model.gain if use.model.bits == 32 else 2.0**-16
        if use.membrane is None:
            shape = self.state.values[use.source].shape
            use.membrane = self._value(use.name + ".membrane", shape, 0, unit, 2**31 - 2)
        return _Array(use.membrane, m.axes, unit, steps=frozenset([m.step]))

    # ---- arithmetic ----------------------------------------------------------------------------

    def _steps_of(self, a: _Array, b: _Array) -> frozenset[int] | None:
        if a.steps is not None and b.steps is not None and a.steps != b.steps:
            raise self.fail(
                "it combines different time steps", "let only neurons carry anything over time"
            )
        return a.steps if a.steps is not None else b.steps

    def add(self, a: Any, b: Any, sign: int = 1) -> Any:
        a, b = self._tensor(a), self._tensor(b)
        if isinstance(a, _Constant) and isinstance(b, _Array):
            return self._plus_constant(b, a, sign)
        if isinstance(b, _Constant) and isinstance(a, _Array):
            if sign < 0:
                raise self.fail(
                    "subtracting a constant cannot be lowered", "put it into a layer's bias"
                )
            return self._plus_constant(a, b, 1)
        if (
            sign > 0 and a.steps is not None and b.steps is not None and a.steps.isdisjoint(b.steps)
            and self.settle(a).base == self.settle(b).base and a.scale == b.scale
        ):  # fmt: skip
            a = self.settle(a)
            return replace(a, steps=a.steps | b.steps, reduction="sum")  # a sum over time so far
        steps = self._steps_of(a, b)
        a, b = self.settle(a), self.settle(b)
        assert isinstance(a.base, int)
        assert isinstance(b.base, int)
        values, high = self.state.values, self.state.high
        if values[a.base].shape != values[b.base].shape:
            raise self.fail(
                "it adds values of different shapes", "bring both to one shape; nothing broadcasts"
            )
        operands = [(a, 1), (b, sign)]
        if values[a.base].planes and values[b.base].planes and a.scale == b.scale and sign > 0:
            scale, factors = a.scale, (1, 1)
            planes = (high[a.base] + high[b.base]).bit_length()
        else:
            units = [x.scale for x, _ in operands if values[_settled(x)].planes == 0]
            scale = min(units) if units else 2.0**-16
            factors = (round(a.scale / scale), sign * round(b.scale / scale))
            planes = 0
        total = abs(factors[0]) * high[a.base] + abs(factors[1]) * high[b.base]
        if total >= 2**31:
            raise self.fail(
                f"its operands differ too much in scale ({a.scale:.3g} and {b.scale:.3g}) for the "
                "fixed-point range",
                "look for a batch norm with exploded weights, or normalise both alike",
            )
        sources = (a.base, b.base)

        def make() -> int:
            name = self._unique(f"{self.where}.add" if self.where != "the model" else "add")
            target = self._value(name, values[sources[0]].shape, planes, scale, total)
            self.state.ops.append(Add(name, sources, factors, target))
            return target

        base = self._once(("add", sources, factors), make)
        axes = a.axes if len(a.axes) >= len(b.axes) else b.axes
        return _Array(base, axes, scale, steps=steps)

    def _plus_constant(self, a: _Array, c: _Constant, sign: int) -> Any:
        value = torch.as_tensor(c.value).detach().to(torch.float64)
        if sign > 0 and value.numel() and bool((value == 0).all()):
            return a
        if sign < 0 and isinstance(a.base, int) and value.numel() == 1 and float(value) == 1.0:
            return ("complement", a)
        raise self.fail("adding a constant cannot be lowered", "put it into a layer's bias")

    def multiply(self, a: Any, b: Any) -> Any:
        a, b = self._tensor(a), self._tensor(b)
        if isinstance(a, _Constant):
            a, b = b, a
        if isinstance(b, _Constant):
            if _numel(b.value) != 1 or not isinstance(a, _Array):
                raise self.fail(
                    "multiplying by a tensor cannot be lowered",
                    "put the factors into a batch norm or a layer's weights",
                )
            return self.scaled(a, float(b.value))
        function: Literal["and", "iand"] = "and"
        if isinstance(b, tuple) and b[0] == "complement":
            a, b = b, a
        if isinstance(a, tuple) and a[0] == "complement":
            function, a = "iand", a[1]
        if not (isinstance(a, _Array) and isinstance(b, _Array)):
            raise self.fail(
                "this product cannot be lowered",
                "multiply spikes with spikes, or with a positive number",
            )
        steps = self._steps_of(a, b)
        assert isinstance(a.base, int)
        assert isinstance(b.base, int)
        for x in (a, b):
            if x.lazy or self.state.values[x.base].planes != 1 or x.scale != 1.0:  # type: ignore[index]
                raise self.fail(
                    "only spikes can be multiplied with each other", "put a neuron before it"
                )
        sources = (a.base, b.base)

        def make() -> int:
            name = self._unique(f"{self.where}.{function}")
            target = self._value(name, self.state.values[sources[0]].shape, 1, 1.0, 1)
            self.state.ops.append(Logic(name, sources, target, function))
            return target

        return _Array(self._once((function, sources), make), a.axes, 1.0, steps=steps)

    def scaled(self, a: _Array, factor: float) -> _Array:
        if a.reduction == "sum":
            return replace(a, factor=a.factor * factor)
        if a.lazy:
            assert a.gain is not None
            assert a.bias is not None
            return replace(a, gain=a.gain * factor, bias=a.bias * factor)
        if factor <= 0:
            raise self.fail(
                "multiplying by a number that is not positive cannot be lowered",
                "put it into a batch norm or a layer's weights",
            )
        return replace(a, scale=a.scale * factor)

    def _tensor(self, a: Any) -> Any:
        if isinstance(a, _Membrane):
            return self.reading(a)
        if isinstance(a, int | float):
            return _Constant(a)
        return a

    # ---- axes ----------------------------------------------------------------------------------

    def regroup(self, a: _Array, sizes: list[int]) -> _Array:
        """Relabel the axes of a reshape; nothing moves."""
        atoms = [atom for axis in a.axes for atom in axis]
        if -1 in sizes:
            known = math.prod(s for s in sizes if s != -1)
            total = math.prod(n for _, n in atoms)
            sizes = [total // known if s == -1 else s for s in sizes]
        axes: list[Axis] = []
        at = 0
        for size in sizes:
            group: list[Atom] = []
            product = 1
            while product < size and at < len(atoms):
                group.append(atoms[at])
                product *= atoms[at][1]
                at += 1
            if size == 1 and at < len(atoms) and atoms[at][1] == 1:
                group.append(atoms[at])
                at += 1
            if product != size:
                raise self.fail(
                    f"a reshape from {a.axes} to {sizes} splits an axis",
                    "only join neighbouring axes, as Flatten does, or split what was joined",
                )
            axes.append(tuple(group))
        while at < len(atoms) and atoms[at][1] == 1 and axes:
            axes[-1] = (*axes[-1], atoms[at])
            at += 1
        if at != len(atoms):
            raise self.fail(
                f"a reshape to {sizes} loses elements", "only join or split neighbouring axes"
            )
        return replace(a, axes=tuple(axes))

    def reshaped(self, node: fx.Node, a: Any) -> Any:
        if isinstance(a, _Constant):
            return _Constant(node.meta["concrete"])
        return self.regroup(a, list(node.meta["concrete"].shape))

    def mean(self, a: _Array, dims: Any, total: bool) -> Any:
        rank = len(a.axes)
        if dims is None:
            raise self.fail(
                "a mean over everything cannot be lowered",
                "name the axes: time, or height and width",
            )
        listed = [dims] if isinstance(dims, int) else list(dims)
        chosen = sorted(d % rank for d in listed)
        labels = [label for d in chosen for label, n in a.axes[d]]
        if labels and set(labels) == {"T"} and chosen == [0]:
            a = self.settle(a)
            axes = a.axes[1:]
            steps = a.axes[0][0][1]
            self.steps = max(self.steps, steps)
            return replace(a, axes=axes, reduction="sum", factor=1.0 if total else 1.0 / steps,
                           steps=frozenset(range(steps)))  # fmt: skip
        if set(labels) <= {"H", "W"} and "C" not in labels:
            _, h, w = self._shape(a.base)
            kernel = (h if "H" in labels else 1, w if "W" in labels else 1)
            pooled = self.window(a, "sum", kernel, kernel, (0, 0, 0, 0))
            if total:
                pooled = replace(pooled, scale=pooled.scale * kernel[0] * kernel[1])
            atoms = {"C": self._shape(pooled.base)[0], "H": h // kernel[0], "W": w // kernel[1]}
            axes = tuple(
                tuple((k, atoms.get(k, n)) for k, n in axis)
                for d, axis in enumerate(a.axes)
                if d not in chosen
            )
            return replace(pooled, axes=axes)
        raise self.fail(
            "a mean over channels or the batch cannot be lowered",
            "average over time, height or width; a VotingLayer averages features",
        )

    def select(self, a: Any, index: Any, node: fx.Node) -> Any:
        if isinstance(a, tuple | list):
            return a[index]
        if isinstance(a, _Constant):
            return _Constant(node.meta.get("concrete"))
        if isinstance(index, tuple) and index and isinstance(index[0], int):
            if any(i != slice(None) for i in index[1:]):
                raise self.fail("indexing into a sample cannot be lowered", "index time steps only")
            index = index[0]
        if isinstance(index, int) and a.axes and {k for k, _ in a.axes[0]} == {"T"}:
            steps = a.axes[0][0][1]
            return replace(a, axes=a.axes[1:], steps=frozenset([index % steps]))
        if index is None or (isinstance(index, tuple) and None in index):
            return self.reshaped(node, a)
        raise self.fail(
            "indexing or slicing can only be lowered over time steps",
            "crop or select outside the model",
        )

    def stack(self, items: Any, dim: int) -> _Array:
        arrays = [self._tensor(i) for i in items]
        if not all(isinstance(a, _Array) for a in arrays) or dim != 0:
            raise self.fail(
                "this stack cannot be lowered",
                "stack the outputs of all time steps along the first axis",
            )
        arrays = [self.settle(a) for a in arrays]
        first = arrays[0]
        for t, a in enumerate(arrays):
            if a.base != first.base or (a.steps is not None and a.steps != frozenset([t])):
                raise self.fail(
                    "it stacks something else than one output at every time step",
                    "stack that alone, all steps in order",
                )
        axes = ((("T", len(arrays)),), *first.axes)
        stacked: _Array = replace(first, axes=axes, steps=None)
        return stacked

    # ---- the walk ------------------------------------------------------------------------------

    def run(self, graph: fx.Graph, input_high: int) -> Any:
        self.input_high = input_high
        self.state.high[self.input] = input_high
        self._pendings = {}
        result: Any = None
        for node in graph.nodes:
            if node.op == "output":
                result = fx.node.map_arg(node.args[0], lambda n: n)
                return self._resolve(result)
            self.arrays[node] = self._visit(node)
        return result  # pragma: no cover

    def _resolve(self, x: Any) -> Any:
        if isinstance(x, fx.Node):
            return self.arrays[x]
        if isinstance(x, tuple | list):
            return type(x)(self._resolve(i) for i in x)
        if isinstance(x, slice) or x is None or isinstance(x, int | float | bool | str):
            return x
        if isinstance(x, Tensor):
            return _Constant(x)
        return x

    def _visit(self, node: fx.Node) -> Any:
        args = [self._resolve(a) for a in node.args]
        kwargs = {k: self._resolve(v) for k, v in node.kwargs.items()}
        if node.op == "placeholder":
            return self.sample_array
        if node.op == "get_attr":
            found: Any = self.model
            for part in str(node.target).split("."):
                found = getattr(found, part)
            return _Constant(found)
        if node.op == "call_module":
            self.where = str(node.target) or "the model"
            return self._module(self.modules[str(node.target)], str(node.target), args, kwargs)
        self.where = origin(node)
        name = (
            node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "?")
        )
        if not any(isinstance(a, _Array | _Membrane | tuple | list) for a in args):
            return _Constant(node.meta.get("concrete"))
        return self._function(str(name), node, args, kwargs)

    def _module(self, module: nn.Module, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        x = self._tensor(args[0])
        if hosts.adapter_of(module) is not None or type(module).__name__ == "OverTime":
            mem = args[1] if len(args) > 1 else kwargs.get("mem")
            if not isinstance(x, _Array):
                raise self.fail(
                    "its input does not depend on the input of the model",
                    "remove it, or feed it from the model's input",
                )
            return self.neuron(module, x, mem, name)
        if not isinstance(x, _Array):
            raise self.fail(
                "its input does not depend on the input of the model",
                "remove it, or feed it from the model's input",
            )
        if x.reduction != "none":
            raise self.fail(
                "it follows a sum over time, so it would run once per sequence",
                "sum or average over time last",
            )
        if isinstance(module, _CONVS):
            return self.conv(module, x)
        if isinstance(module, nn.Linear):
            return self.linear(module, x)
        if isinstance(module, _NORMS):
            return self.norm(module, x)
        if isinstance(module, _POOLS):
            return self.pool(module, x)
        if isinstance(module, nn.Flatten):
            start = module.start_dim
            if getattr(module, "step_mode", "s") == "m":
                start = start + 1 if start >= 0 else start
            return self._flatten(x, start, module.end_dim)
        return x

    def _flatten(self, x: _Array, start: int, end: int) -> _Array:
        rank = len(x.axes)
        start, end = start % rank, end % rank
        merged = tuple(atom for axis in x.axes[start : end + 1] for atom in axis)
        return replace(x, axes=(*x.axes[:start], merged, *x.axes[end + 1 :]))

    def _function(self, name: str, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if name in ("add", "add_", "iadd"):
            if kwargs.get("alpha", 1) != 1:
                raise self.fail("a scaled addition cannot be lowered", "add without alpha")
            return self.add(args[0], args[1])
        if name in ("sub", "sub_", "isub"):
            return self.add(args[0], args[1], sign=-1)
        if name == "rsub":
            return self.add(args[1], args[0], sign=-1)
        if name in ("mul", "mul_", "imul", "logical_and"):
            return self.multiply(args[0], args[1])
        if name in ("truediv", "div", "div_", "itruediv"):
            if not isinstance(args[1], int | float):
                raise self.fail("dividing by a tensor cannot be lowered", "divide by a number")
            return self.scaled(self._tensor(args[0]), 1.0 / args[1])
        if name == "getitem":
            return self.select(args[0], args[1], node)
        if name == "unbind":
            if args[1:] not in ([], [0]) or kwargs.get("dim", 0) != 0:
                raise self.fail("this unbind cannot be lowered", "unbind time only, the first axis")
            count = len(node.meta["concrete"])
            return tuple(self.select(args[0], t, node) for t in range(count))
        if name == "stack":
            return self.stack(args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if isinstance(args[0], _Membrane) and name in ("detach", "clone", "contiguous"):
            return args[0]
        x = self._tensor(args[0])
        if name in ("mean", "sum"):
            dims = args[1] if len(args) > 1 else kwargs.get("dim")
            if kwargs.get("keepdim"):
                raise self.fail("keepdim cannot be lowered", "leave the axis out")
            return self.mean(x, dims, total=name == "sum")
        if name in ("contiguous", "clone", "detach", "float", "to", "dropout", "type_as", "cpu"):
            return x
        if name in ("flatten", "view", "reshape", "unsqueeze", "squeeze", "unflatten"):
            return self.reshaped(node, x)
        if name in ("expand", "repeat", "unsqueeze_"):
            return self._expand(node, x)
        if name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "_max_pool2d",
                    "boolean_dispatch", "max_pool1d", "avg_pool1d"):  # fmt: skip
            return self._functional_pool(name, x, args[1:], kwargs)
        if name in ("zeros_like", "ones_like"):
            return _Constant(node.meta["concrete"])
        raise self.fail(
            f"the operation {name!r} has no integer form",
            "express it with layers, neurons, additions and poolings",
        )

    def _functional_pool(
        self, name: str, x: _Array, args: list[Any], kwargs: dict[str, Any]
    ) -> Any:
        kinds: dict[str, Any] = {
            "max_pool2d": nn.MaxPool2d, "boolean_dispatch": nn.MaxPool2d,
            "_max_pool2d": nn.MaxPool2d,
            "avg_pool2d": nn.AvgPool2d, "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
            "max_pool1d": nn.MaxPool1d, "avg_pool1d": nn.AvgPool1d,
        }  # fmt: skip
        return self.pool(kinds[name](*args, **kwargs), x)

    def _expand(self, node: fx.Node, x: _Array) -> _Array:
        """Showing a still input at every step: a new first axis is time."""
        shape = list(node.meta["concrete"].shape)
        old = [math.prod(n for _, n in axis) for axis in x.axes]
        if len(shape) == len(old) + 1 and shape[1:] == old:
            return replace(x, axes=((("T", shape[0]),), *x.axes), steps=None)
        if len(shape) == len(old) and shape[1:] == old[1:] and old[0] == 1 and not x.axes[0]:
            return replace(x, axes=((("T", shape[0]),), *x.axes[1:]), steps=None)
        if shape == old:
            return x
        raise self.fail(
            "this expansion cannot be lowered", "only repeat the input over time, as a first axis"
        )


def _settled(a: _Array) -> int:
    assert isinstance(a.base, int)
    return a.base


def _bits(module: Any) -> int:
    return int(getattr(getattr(module, "quantizer", None), "bits", 32))


def _numel(value: Any) -> int:
    return int(value.numel()) if isinstance(value, Tensor) else 1


def _returns_membrane(module: Any) -> bool:
    if "Leaky" not in {b.__name__ for b in type(module).__mro__}:
        return False
    return bool(module.output) or not bool(module.init_hidden)


HEADROOM = 2.0  # 16-bit codes reach this much further than the sample


def input_code(
    sample: npt.NDArray[Any], bits: int | None = None, widest: int = 16
) -> tuple[float, tuple[int, int]]:
    """Scale and range of the input codes.

    Counts of events stay what they are, and images of 256 grey levels in [0, 1] become the levels
    0 to 255: both are exact in 8 bits. Anything else takes 16 bits, which reach to twice the
    sample's largest value. Where the sample lies on a grid of evenly spaced values (grey levels
    after normalisation), the unit is chosen so that these fall on codes, or nearly.

    Args:
        sample: Representative inputs.
        bits: Width of a code; by default it is chosen.
        widest: Width to take instead of 16 bits.

    Returns:
        ``scale`` and ``(lo, hi)``: ``code = clip(round(x / scale), lo, hi)``.
    """
    top = float(np.abs(sample).max(initial=0.0))
    signed = bool((sample < 0).any())
    small = min(bits or 8, widest)
    signed = signed or small == 16  # codes fit 16 bits with their sign
    most = 2 ** (small - 1) - 1 if signed else 2**small - 1
    narrow = (-most if signed else 0, most)
    if top == 0:
        return 1.0, narrow
    flat = np.asarray(sample, np.float64).reshape(-1)
    for unit in (1.0, 1 / 255):
        if top / unit <= most + 0.5 and _on_grid(flat, unit):
            return unit, narrow
    flat = flat[:200_000]
    if bits is not None:
        return _grid(flat, top, most) or top / most, narrow
    most = 2 ** (widest - 1) - 1
    finest = HEADROOM * top / most
    grid = _grid(flat, top, 255)
    if grid is not None and top / grid <= most:
        return grid / 2.0 ** max(math.floor(math.log2(grid / finest)), 0), (-most, most)
    return _offset_grid(flat, finest) or finest, (-most, most)


def _on_grid(flat: npt.NDArray[np.float64], unit: float) -> bool:
    codes = flat / unit
    return bool(np.abs(codes - np.rint(codes)).max() < 1e-4)


def _grid(flat: npt.NDArray[np.float64], top: float, most: int) -> float | None:
    """The coarsest grid of at most ``most`` steps up to ``top`` that all values lie on."""
    if _on_grid(flat, 1.0):
        return 1.0
    for steps in range(1, most + 1):
        if _on_grid(flat, top / steps):
            return top / steps
    return None


def _offset_grid(flat: npt.NDArray[np.float64], finest: float) -> float | None:
    """A unit that divides a grid which does not pass through 0, so that it hardly needs rounding.

    With values ``start + i * gap`` and the unit ``gap / m`` all of them miss the codes by as much
    as ``start`` does, and for a good m that is far less than half a code.
    """
    values = np.unique(flat)
    gaps = np.diff(values)
    gaps = gaps[gaps > finest / 100]  # closer ones are one value and its float rounding
    if gaps.size == 0 or gaps.size > 4096:
        return None
    start, span = values[0], values[-1] - values[0]
    gap = span / max(round(span / gaps.min()), 1)
    places = (values - start) / gap
    if np.abs(places - np.rint(places)).max() > 1e-2:
        return None
    m = np.arange(1, int(gap / finest) + 1)
    if m.size == 0:
        return None
    miss = np.abs(start / gap * m - np.rint(start / gap * m)) / m
    return float(gap / m[miss.argmin()])


def lower(
    model: nn.Module,
    sample: Tensor,
    *,
    time_first: bool | None = None,
    input_scale: float | None = None,
    input_bits: int | None = None,
) -> Program:
    """Turn a quantized model into an integer program.

    The model is left as it was, but for the state of its neurons, which is reset.

    Args:
        model: A quantized model of either host with frozen membrane scales.
        sample: Representative input, as the model is called with: ``[N, ...]`` or ``[T, N, ...]``.
            It fixes the input shape and, unless ``input_scale`` is given, the range of the input
            codes.
        time_first: Whether the first axis of the sample is time. By default it is for 3 axes
            (``[T, N, features]``) and 5 axes (``[T, N, C, H, W]``).
        input_scale: Real value of one input code.
        input_bits: Bits of an input code, 2 to 16. By default 8 where those are exact for the
            sample (see :func:`input_code`), else 16, or as many as the first layer's 32-bit
            accumulators leave room for.

    Returns:
        A valid program.

    Raises:
        LoweringError: If something has no exact integer counterpart; names the module.
        InputError: If the sample is not a finite floating point tensor, or all zero without an
            ``input_scale``.
    """
    if not isinstance(sample, Tensor) or not sample.is_floating_point() or sample.dim() < 2:
        raise InputError("the sample must be a floating point tensor [N, ...] or [T, N, ...]")
    if not bool(torch.isfinite(sample).all()) or sample.numel() == 0:
        raise InputError("the sample must be finite and not empty")
    if input_bits is not None and not 2 <= input_bits <= 16:
        raise InputError(f"input_bits={input_bits}: choose 2 to 16")
    if input_scale is not None and not 0 < input_scale < 1e30:
        raise InputError(f"input_scale={input_scale}: it must be a positive finite number")
    if input_scale is None and not bool(sample.any()):
        raise InputError(
            "the sample is all zero and does not show the range of the inputs; pass representative "
            "inputs, or input_scale="
        )
    first = sample.dim() in (3, 5) if time_first is None else time_first
    data = sample.detach().cpu()
    reset_states(model)
    twin = copy.deepcopy(model).cpu().eval()
    # Two samples, so that no axis but a real one has size 1 by accident.
    axis = 1 if first else 0
    pair = data.float().narrow(axis, 0, 1)
    pair = torch.cat([pair, pair], axis)
    graph = trace(twin, pair, _is_leaf)
    reset_states(twin)
    widest = 16
    while True:
        scale, limits = _input(data.numpy(), input_scale, input_bits, widest)
        work = _Lowering(twin, pair, first, scale)
        try:
            result = work.run(graph, max(-limits[0], limits[1]))
        except LoweringError:
            if input_bits is not None or work.room is None or not 2 <= work.room < widest:
                raise
            widest = work.room
            continue
        return _finish(work, result, scale, limits, type(model).__name__)


def _input(
    data: npt.NDArray[Any], scale: float | None, bits: int | None, widest: int
) -> tuple[float, tuple[int, int]]:
    """Scale and range of the input codes as :func:`lower` was asked for them."""
    if scale is None:
        return input_code(data, bits, widest)
    _, limits = input_code(np.rint(data / scale), bits, widest)
    return float(scale), limits


def _finish(
    work: _Lowering, result: Any, scale: float, limits: tuple[int, int], model: str
) -> Program:
    work.where = "the output"
    answers = list(result) if isinstance(result, tuple | list) else [result]
    arrays = []
    for a in answers:
        a = work._tensor(a)
        if not isinstance(a, _Array):
            raise work.fail("it does not depend on the input of the model", "return what does")
        arrays.append(work.settle(a))
    timed = ["T" in {k for axis in a.axes for k, _ in axis} for a in arrays]
    reductions = {(a.reduction, round(a.factor, 12)) for a in arrays}
    if len(reductions) != 1:
        raise work.fail(
            "some outputs are summed over time and some are not", "return all of one kind"
        )
    reduction, factor = reductions.pop()
    steps = max([work.steps, *(n for a in arrays for axis in a.axes for k, n in axis if k == "T")])
    values = list(work.state.values)
    final: Literal["none", "sum", "mean"] = "none"
    if reduction == "sum":
        if any(a.steps is not None and len(a.steps) != steps for a in arrays):
            raise work.fail(
                f"it sums over some of the {steps} time steps only", "sum over all of them"
            )
        final = "mean" if math.isclose(factor * steps, 1.0, rel_tol=1e-6) else "sum"
        rest = factor * steps if final == "mean" else factor
        arrays = [replace(a, scale=a.scale * rest) for a in arrays]
    elif steps > 1 and not all(timed):
        raise work.fail("it is the answer of one time step only", "return all steps, or their mean")
    for a in arrays:
        assert isinstance(a.base, int)
        values[a.base] = replace(values[a.base], scale=a.scale)
    ops = [_integer(work, op, values) for op in work.state.ops]
    unrolled = any(u.calls > 1 or u.multi_step for u in work.uses.values())
    time = "sequence" if work.has_time else "repeat" if unrolled or steps > 1 else "step"
    ranks = [len(a.axes) - len(work.lead(a)) for a in arrays]
    program = Program(
        values, ops, tuple(int(a.base) for a in arrays),  # type: ignore[arg-type]
        reduction=final, input_scale=float(scale), input_range=limits, timesteps=steps,
        metadata={
            "model": model, "time": time, "input_rank": str(work.rank),
            "output_ranks": ",".join(map(str, ranks)),
            "structure": "tuple" if isinstance(result, tuple | list) else "tensor",
        },
    )  # fmt: skip
    program = _prune(program)
    try:
        program.validate()
    except FormatError as error:
        raise LoweringError(
            f"{model}: no exact integer form ({error}); look for exploded weights or scales there"
        ) from error
    return program


def _integer(work: _Lowering, op: Op | _NeuronUse, values: list[Value]) -> Op:
    if not isinstance(op, _NeuronUse):
        return op
    channels = values[op.source].shape[0]
    unit = values[op.membrane].scale if op.membrane is not None else 1.0
    return integer_neuron(
        op.name, op.model, op.source, op.spikes, op.unit, channels, op.membrane, unit
    )


def _prune(program: Program) -> Program:
    """Drop operations no output depends on, and renumber the values."""
    needed = set(program.outputs)
    kept: list[Op] = []
    for op in reversed(program.ops):
        if needed & set(targets_of(op)):
            needed |= set(sources_of(op))
            kept.append(op)
    kept.reverse()
    used = [0, *(t for op in kept for t in targets_of(op))]
    number = {old: new for new, old in enumerate(used)}
    ops: list[Op] = []
    for op in kept:
        changes: dict[str, Any] = {"target": number[op.target]}
        if isinstance(op, Add | Logic):
            changes["sources"] = tuple(number[i] for i in op.sources)
        else:
            changes["source"] = number[op.source]
        if isinstance(op, Neuron) and op.membrane is not None:
            changes["membrane"] = number[op.membrane]
        ops.append(replace(op, **changes))
    return replace(
        program,
        values=[program.values[i] for i in used],
        ops=ops,
        outputs=tuple(number[i] for i in program.outputs),
    )


def reset_states(model: nn.Module) -> None:
    """Put the neurons of either host back to their initial state."""
    for module in model.modules():
        bases = {b.__name__ for b in type(module).__mro__}
        if "MemoryModule" in bases:
            module.reset()  # type: ignore[operator]
        elif "SpikingNeuron" in bases and isinstance(getattr(module, "mem", None), Tensor):
            module.mem = torch.zeros(0, device=module.mem.device)  # type: ignore[arg-type]
            if hasattr(module, "reset") and isinstance(module.reset, Tensor):
                module.reset = module.reset.detach()
