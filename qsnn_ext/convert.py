"""``quantize_``: turn a model somebody else wrote into a Q-SNN, and say what became of each module.

Everything is planned and checked before anything changes. A module then changes its class and
gains a quantizer; the object, its parameters, hooks, flags and names stay. Should a step fail,
those before it are undone.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from qsnn_ext import hosts, layers, trace
from qsnn_ext.config import MembraneConfig, QuantConfig, Rule, WeightConfig, nearest
from qsnn_ext.errors import ConfigError, ConversionError, InputTypeError, QSNNError
from qsnn_ext.layers import QuantizedWeight, is_synaptic
from qsnn_ext.quantizers import MembraneQuantizer, Quantizer

#: - ``converted``: its class or its quantizer changed;
#: - ``unchanged``: it already was what the configuration asks for;
#: - ``kept``: left alone on purpose (a rule, a read-out, 32 bits);
#: - ``unsupported``: left in floating point because nothing here can quantize it;
#: - ``nothing``: it holds nothing to quantize.
Action = Literal["converted", "unchanged", "kept", "unsupported", "nothing"]

#: Modules that hand their children's weights to a fused function instead of calling them.
_OPAQUE = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

REPORT_ATTRIBUTE = "_qsnn_report"


@dataclass(frozen=True)
class ModuleReport:
    """What became of one module.

    Attributes:
        name: dotted name; empty for the model itself.
        type: its class before.
        became: its class now.
        action: see :data:`Action`.
        reason: why, in words.
        weight_bits: bits of its weights now; ``None`` without weights or in floating point.
        membrane_bits: bits of its membrane potential now, likewise.
        aliases: further names of the same module.
    """

    name: str
    type: str
    became: str
    action: Action
    reason: str
    weight_bits: int | None = None
    membrane_bits: int | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What :func:`quantize_` did; ``str()`` of it is a table.

    Attributes:
        config: the configuration that was applied.
        modules: every module of the model in definition order.
        first: name of the first weighted layer, ``None`` without one.
        last: name of the last weighted layer.
        ends_by: how these two were found.
        unseen: weighted layers that did not run on the sample.
    """

    config: QuantConfig
    modules: tuple[ModuleReport, ...]
    first: str | None
    last: str | None
    ends_by: str
    unseen: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether anything was converted; ``False`` on a second run."""
        return bool(self.of("converted"))

    def of(self, *actions: Action) -> tuple[ModuleReport, ...]:
        """The modules with one of these actions."""
        return tuple(row for row in self.modules if row.action in actions)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ConversionReport:
        """The inverse of :meth:`to_dict`."""
        modules = tuple(
            ModuleReport(**{**row, "aliases": tuple(row["aliases"])}) for row in data["modules"]
        )
        return cls(
            config=QuantConfig.from_dict(data["config"]),
            modules=modules,
            first=data["first"],
            last=data["last"],
            ends_by=data["ends_by"],
            unseen=tuple(data["unseen"]),
        )

    def __getitem__(self, name: str) -> ModuleReport:
        """The row of one module.

        Raises:
            KeyError: no module of that name.
        """
        for row in self.modules:
            if name == row.name or name in row.aliases:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "config": self.config.to_dict(),
            "first": self.first,
            "last": self.last,
            "ends_by": self.ends_by,
            "unseen": list(self.unseen),
            "modules": [asdict(row) for row in self.modules],
        }

    def __str__(self) -> str:
        """A table of all modules and a summary."""
        header = ("module", "type", "became", "weights", "membrane", "why")
        rows = [
            (
                row.name or "(model)",
                row.type,
                row.became if row.became != row.type else "",
                _bits(row.weight_bits),
                _bits(row.membrane_bits),
                f"{row.action}: {row.reason}",
            )
            for row in self.modules
        ]
        widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (header, tuple("-" * w for w in widths), *rows)
        ]
        counts = Counter(row.action for row in self.modules)
        summary = ", ".join(f"{n} {action}" for action, n in sorted(counts.items()))
        if not self.changed:
            summary += "; nothing was changed"
        ends = f"first weighted layer {self.first}, last {self.last}, by {self.ends_by}"
        if self.first is None:
            ends = "no weighted layer"
        if self.unseen:
            ends += f"; did not run on the sample: {', '.join(self.unseen)}"
        return "\n".join([*lines, "", summary, ends])


@overload
def quantize_(
    model: nn.Module,
    config: QuantConfig | dict[str, Any] | str | Path = "paper",
    sample: Any = None,
    inplace: Literal[True] = True,
    strict: bool = False,
) -> ConversionReport: ...


@overload
def quantize_(
    model: nn.Module,
    config: QuantConfig | dict[str, Any] | str | Path = "paper",
    sample: Any = None,
    *,
    inplace: Literal[False],
    strict: bool = False,
) -> nn.Module: ...


def quantize_(
    model: nn.Module,
    config: QuantConfig | dict[str, Any] | str | Path = "paper",
    sample: Any = None,
    inplace: bool = True,
    strict: bool = False,
) -> ConversionReport | nn.Module:
    """Quantize the weights and membrane potentials of a SpikingJelly or snnTorch model.

    Convolutions and linear layers of torch and of SpikingJelly become their binary or integer
    sisters; ``LIFNode``, ``IFNode``, ``ParametricLIFNode`` and ``Leaky`` become quantized neurons.
    Parameters, hooks, names, devices, dtypes, training and step modes and ``state_dict`` keys stay,
    so optimizers built before stay valid. A second run changes nothing, even after training or
    calibration; another configuration exchanges the quantizers and keeps the latent weights.

    Args:
        model: the model, changed in place; in evaluation or training mode.
        config: a :class:`QuantConfig`, a dictionary, a ``.toml`` or ``.yaml`` file, a shorthand
            such as ``"1w-2u"``, or the name of a preset.
        sample: an input; a tuple is positional, a dictionary named arguments. With it the model
            runs once, undisturbed, and the first and last weighted layer are those that run first
            and last; without it those defined first and last (or found by an earlier conversion).
        inplace: ``False`` leaves the model alone and returns a quantized copy; its report is
            :func:`conversion_report` of the copy.
        strict: make it an error that something with weights or spikes is left in floating point
            because it is not supported. What the configuration keeps is no error.

    Returns:
        The report, or with ``inplace=False`` the copy.

    Raises:
        InputTypeError: ``model`` is not a module, or ``config`` of no accepted kind.
        ConfigError: wrong configuration, or a rule that matches nothing, nothing it could act on,
            or only what earlier rules have already taken.
        ConversionError: NaN or infinite weights, parameters on the meta device, tied weights that
            would be quantized in two ways, the sample does not run, or ``strict``. The model is
            then as it was.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"quantize_ needs a module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("a scripted model cannot be quantized; quantize it before scripting.")
    parsed = QuantConfig.parse(config)
    if inplace:
        return _quantize(model, parsed, sample, strict)
    # States inside a live graph cannot be copied; the copy starts from their values.
    memo = {id(t): t.detach().clone() for t in trace.graph_tensors(model)}
    quantized = copy.deepcopy(model, memo)
    _quantize(quantized, parsed, sample, strict)
    for host in hosts.adapters():
        host.copied(quantized)
    return quantized


def conversion_report(model: nn.Module) -> ConversionReport | None:
    """The report of the last conversion of ``model``, ``None`` if it never was converted."""
    report: ConversionReport | None = model.__dict__.get(REPORT_ATTRIBUTE)
    return report


def _quantize(model: nn.Module, config: QuantConfig, sample: Any, strict: bool) -> ConversionReport:
    with all_or_nothing(model):
        plan = _Plan(model, config, sample)
        if strict and plan.unsupported:
            raise ConversionError(
                f"strict: {len(plan.unsupported)} module(s) would stay in floating point: "
                f"{'; '.join(plan.unsupported)}. Keep them with a rule (Rule.keep), or drop strict."
            )
        for unit in plan.units:
            if unit.target is not None:
                become(unit.module, unit.target)
        for host in hosts.adapters():
            host.converted(model)
        report = plan.report()
        setattr(model, REPORT_ATTRIBUTE, report)
    return report


# --------------------------------------------------------------------------- what can change


@dataclass(frozen=True)
class Target:
    """What a module is to become.

    Attributes:
        quantizer: of weights or membrane potential; ``None`` for floating point.
        order: step order, for neurons.
        device: where the quantizer goes, for neurons (layers know theirs).
    """

    quantizer: Quantizer | None
    order: Any = None
    device: torch.device | None = None


def sisters(module: nn.Module) -> dict[type[Quantizer], Any] | None:
    """Quantized classes that can take a layer's place, by kind of quantizer."""
    float_type = module.float_type() if isinstance(module, QuantizedWeight) else type(module)
    return next((t[float_type] for t in layers.sister_tables() if float_type in t), None)


def quantized_neuron(module: nn.Module) -> Any:
    """The quantized class that can take a neuron's place, or is its class already."""
    for host in hosts.adapters():
        for float_type, quantized in host.NEURONS.items():
            if type(module) in (float_type, quantized):
                return quantized
    return None


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo, when its body fails or is interrupted, every change of class, attribute or child.

    Values of tensors are not kept: a body must not write to those that were there before.

    Raises:
        ConversionError: the body failed; the model is as it was.
    """
    before = [
        (
            module,
            type(module),
            module.__dict__.copy(),
            # Parameters, buffers, children, hooks: put back into the same containers.
            [(t, t.copy()) for t in module.__dict__.values() if isinstance(t, (dict, set))],
        )
        for module in model.modules()
    ]
    try:
        yield
    except BaseException as error:
        for module, kind, attributes, tables in before:
            module.__class__ = kind
            trace.put_back(module.__dict__, attributes)
            for table, content in tables:
                table.clear()
                table.update(content)
        if isinstance(error, QSNNError) or not isinstance(error, Exception):
            raise
        raise ConversionError(
            f"conversion failed and was undone: {type(error).__name__}: {error}"
        ) from error


def become(module: Any, target: Target) -> None:
    """Change the class of one module to its target, inside :func:`all_or_nothing`."""
    if is_synaptic(module):
        table = sisters(module)
        assert table is not None  # planned with it
        if isinstance(module, QuantizedWeight):
            _restore_float(module)
        if target.quantizer is not None:
            table[type(target.quantizer)].from_float(module, target.quantizer)
        return
    quantized = quantized_neuron(module)
    if type(module) is quantized:
        del module.membrane
        del module.order
        module.__class__ = quantized.float_type()
    if target.quantizer is not None:
        quantized.from_float(module, target.quantizer.to(target.device), target.order)


def _restore_float(layer: Any) -> None:
    float_type = layer.float_type()
    del layer.quantizer
    layer.__class__ = float_type


# --------------------------------------------------------------------------- the plan


@dataclass
class _Unit:
    """One module of the model, and what the plan says about it."""

    module: nn.Module
    names: tuple[str, ...]
    type: str
    device: torch.device
    rule: Rule | None = None
    owner: _Unit | None = None  # the module whose fused call computes with these weights
    action: Action = "nothing"
    reason: str = "holds nothing to quantize"
    became: str = ""
    target: Target | None = None
    bits: dict[str, int | None] = field(default_factory=dict)

    @property
    def opaque(self) -> str | None:
        return self.owner.type if self.owner is not None else None

    def settle(self, action: Action, reason: str) -> None:
        self.action = action
        self.reason = reason

    def convert(self, target: Target, became: str, reason: str) -> None:
        self.settle("converted", reason)
        self.target = target
        self.became = became

    @property
    def name(self) -> str:
        return self.names[0] or "(model)"

    @property
    def is_weighted(self) -> bool:
        return is_synaptic(self.module)

    @property
    def is_neuron(self) -> bool:
        return any(host.is_neuron(self.module) for host in hosts.adapters())


class _Plan:
    """Decides about every module of one model, touching none."""

    def __init__(self, model: nn.Module, config: QuantConfig, sample: Any) -> None:
        self.config = config
        self.units = _units(model)
        for unit in self.units:
            unit.rule = config.rule_for(unit.names, unit.module)
        self.weighted = [u for u in self.units if u.is_weighted and u.opaque is None]
        self.unseen: tuple[str, ...] = ()
        self.first, self.last, self.ends_by = self._ends(model, sample)
        for unit in self.units:
            if unit.opaque is not None:
                self._plan_opaque(unit)
            elif unit.is_weighted:
                self._plan_weights(unit)
            elif unit.is_neuron:
                self._plan_neuron(unit)
            else:
                _plan_other(unit)
        self._check_rules()
        _check_ties(self.weighted)

    @property
    def unsupported(self) -> list[str]:
        return [f"{u.name} ({u.reason})" for u in self.units if u.action == "unsupported"]

    def report(self) -> ConversionReport:
        return ConversionReport(
            config=self.config,
            modules=tuple(
                ModuleReport(
                    name=unit.names[0],
                    type=unit.type,
                    became=unit.became or unit.type,
                    action=unit.action,
                    reason=unit.reason,
                    weight_bits=unit.bits.get("weight"),
                    membrane_bits=unit.bits.get("membrane"),
                    aliases=unit.names[1:],
                )
                for unit in self.units
            ),
            first=self.first.names[0] if self.first else None,
            last=self.last.names[0] if self.last else None,
            ends_by=self.ends_by,
            unseen=self.unseen,
        )

    def _ends(self, model: nn.Module, sample: Any) -> tuple[_Unit | None, _Unit | None, str]:
        """First and last weighted layer, and how they were found."""
        if not self.weighted:
            return None, None, "definition order"
        by_id = {id(unit.module): unit for unit in self.weighted}
        if sample is not None:
            try:
                calls = trace.running_order(
                    model,
                    [unit.module for unit in self.weighted],
                    lambda: trace.call(model, sample),
                )
            except Exception as error:
                raise ConversionError(
                    f"the model does not run on the sample ({type(error).__name__}: {error}); "
                    "pass an input its forward takes, or none to go by definition order."
                ) from error
            seen = {id(module) for module in calls}
            self.unseen = tuple(u.name for u in self.weighted if id(u.module) not in seen)
            if calls:
                return (
                    by_id[id(calls[0])],
                    by_id[id(calls[-1])],
                    "running order in a traced forward pass",
                )
        earlier = conversion_report(model)
        if earlier is not None:
            by_name = {name: unit for unit in self.weighted for name in unit.names}
            first, last = by_name.get(earlier.first or ""), by_name.get(earlier.last or "")
            if first is not None and last is not None:
                return first, last, earlier.ends_by
        return self.weighted[0], self.weighted[-1], "definition order"

    def _plan_opaque(self, unit: _Unit) -> None:
        if unit.is_weighted or unit.module._parameters or isinstance(unit.module, _OPAQUE):
            if unit.rule is None and unit.owner is not None:
                unit.rule = unit.owner.rule  # who keeps the owner keeps what is in it
            if unit.rule is not None and unit.rule.weight == "keep":
                return unit.settle("kept", f"rule for {unit.rule.selector}")
            self._forbid_request(unit, f"{unit.opaque} computes with its weights itself")
            unit.settle("unsupported", f"{unit.opaque} computes with its weights in a fused call")

    def _forbid_request(self, unit: _Unit, because: str) -> None:
        """A rule that explicitly asks for what cannot be done is an error, not a remark."""
        rule = unit.rule
        if rule is None:
            return
        asked = rule.membrane if unit.is_neuron else rule.weight
        if rule.name is not None and isinstance(asked, (WeightConfig, MembraneConfig)):
            literal = not any(character in rule.name for character in "*?[")
            if literal and asked.bits != 32:
                raise ConversionError(
                    f"the rule for {rule.selector} asks to quantize {unit.type}, but {because}; "
                    "drop the rule, or replace the module."
                )

    def _plan_weights(self, unit: _Unit) -> None:
        module = unit.module
        current = module.quantizer if isinstance(module, QuantizedWeight) else None
        unit.bits["weight"] = current.bits if current is not None else None
        if unit.rule is not None and unit.rule.weight is not None:
            wanted: WeightConfig | str = unit.rule.weight
            reason = f"rule for {unit.rule.selector}"
        elif unit is self.first:
            wanted, reason = self.config.end("first"), "first weighted layer"
        elif unit is self.last:
            wanted, reason = self.config.end("last"), "last weighted layer"
        else:
            wanted, reason = self.config.weight, "hidden layer"
        if isinstance(wanted, str):
            return unit.settle("kept", reason)
        table = sisters(module)
        if table is None:
            why = _no_sister(module)
            self._forbid_request(unit, why)
            if wanted.bits == 32:
                return unit.settle("kept", f"{reason}: 32 bits")
            return unit.settle("unsupported", why)
        quantizer = wanted.build(self.config.preset)
        if _same(current, quantizer):
            if quantizer is None:
                return unit.settle("kept", f"{reason}: 32 bits")
            return unit.settle("unchanged", f"{reason}; already quantized so")
        if getattr(module, "output_scale", None) is not None:
            raise ConversionError(
                f"{unit.name} has batch norm folded into it and cannot take other quantizers; "
                "quantize first, fold last."
            )
        why_not = _cannot_quantize(unit, quantizer)
        if why_not is not None:
            self._forbid_request(unit, why_not)
            return unit.settle("unsupported", why_not)
        kind = table[type(quantizer)] if quantizer is not None else type(module).float_type()  # type: ignore[attr-defined]
        unit.convert(Target(quantizer), kind.__name__, reason)
        unit.bits["weight"] = quantizer.bits if quantizer is not None else None

    def _plan_neuron(self, unit: _Unit) -> None:
        module = unit.module
        current: MembraneQuantizer | None = getattr(module, "membrane", None)
        quantized = quantized_neuron(module)
        rule = unit.rule.membrane if unit.rule is not None else None
        wanted = self.config.membrane if rule is None else rule
        reason = f"rule for {unit.rule.selector}" if rule is not None and unit.rule else "neuron"
        if quantized is not None:
            unit.bits["membrane"] = current.bits if current is not None else None
        if isinstance(wanted, str):
            return unit.settle("kept", reason)
        readout = any(host.is_readout(module) for host in hosts.adapters())
        if readout and rule is None and self.config.readouts == "keep" and current is None:
            return unit.settle("kept", "read-out: it only integrates")
        why_not = (
            f"{unit.type} is a neuron with no quantized sister"
            if quantized is None
            else next((o for host in hosts.adapters() if (o := host.obstacle(module))), None)
        )
        if why_not is not None:
            self._forbid_request(unit, why_not)
            return unit.settle("unsupported", why_not)
        membrane = wanted.build(self.config.preset)
        order = getattr(module, "order", wanted.order)
        if _same(current, membrane) and (membrane is None or order == wanted.order):
            if membrane is None:
                return unit.settle("kept", f"{reason}: 32 bits")
            return unit.settle("unchanged", f"{reason}; already quantized so")
        kind = quantized if membrane is not None else quantized.float_type()
        unit.convert(Target(membrane, wanted.order, unit.device), kind.__name__, reason)
        unit.bits["membrane"] = membrane.bits if membrane is not None else None

    def _check_rules(self) -> None:
        names = [name for unit in self.units for name in unit.names if name]
        for rule in self.config.rules:
            matched = [u for u in self.units if any(rule.matches(n, u.module) for n in u.names)]
            if not matched:
                known = names if rule.name is not None else sorted({u.type for u in self.units})
                word = rule.name if rule.name is not None else str(rule.type).rsplit(".", 1)[-1]
                hint = nearest(word, known) or f" There are: {', '.join(known[:20])}."
                raise ConfigError(f"the rule for {rule.selector} matches no module.{hint}")
            useful = [u for u in matched if _concerns(rule, u)]
            if not useful:
                unit = matched[0]
                what = {True: "weights", False: "membrane potential"}[rule.weight is not None]
                hint = (
                    f" To mean what is inside it write {unit.names[0] + '.*'!r}."
                    if next(unit.module.children(), None) is not None and unit.names[0]
                    else ""
                )
                raise ConfigError(
                    f"the rule for {rule.selector} only matches modules like {unit.name} "
                    f"({unit.type}), which have no {what} to decide about.{hint}"
                )
            if all(unit.rule is not rule for unit in useful):
                taken = useful[0].rule
                assert taken is not None
                raise ConfigError(
                    f"the rule for {rule.selector} is never reached: the rule for "
                    f"{taken.selector} comes before it and takes all it matches; "
                    "put the narrower rule first."
                )


def _units(model: nn.Module) -> list[_Unit]:
    """Every module once, with all its names, in definition order, quantizers left out."""
    units: dict[int, _Unit] = {}
    owners: dict[str, _Unit] = {}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Quantizer):
            continue
        # A neuron has no tensors of its own to tell its device by; the layer before it has.
        device = next((p.device for p in module._parameters.values() if p is not None), device)
        if id(module) in units:
            unit = units[id(module)]
            unit.names = (*unit.names, name)
            continue
        unit = _Unit(module, (name,), type(module).__name__, device)
        if isinstance(module, _OPAQUE):
            owners[name] = unit
        unit.owner = next((o for path, o in owners.items() if _inside(name, path)), None)
        units[id(module)] = unit
    return list(units.values())


def _inside(name: str, path: str) -> bool:
    return path == "" or name == path or name.startswith(path + ".")


def _plan_other(unit: _Unit) -> None:
    matrices = [
        name
        for name, p in unit.module._parameters.items()
        if p is not None and (p.dim() > 1 or isinstance(p, nn.UninitializedParameter))
    ]
    if matrices:
        if unit.rule is not None and unit.rule.weight == "keep":
            unit.settle("kept", f"rule for {unit.rule.selector}")
        else:
            unit.settle(
                "unsupported", f"type {unit.type} is unknown; its {', '.join(matrices)} stay float"
            )
    elif next(unit.module.children(), None) is not None:
        unit.reason = "container"


def _concerns(rule: Rule, unit: _Unit) -> bool:
    """Whether the rule says something about what the module has."""
    has_weights = unit.is_weighted or unit.action in ("unsupported", "kept")
    return (rule.weight is not None and has_weights and not unit.is_neuron) or (
        rule.membrane is not None and unit.is_neuron
    )


def _same(current: Quantizer | None, wanted: Quantizer | None) -> bool:
    """Whether a quantizer in use is the one asked for, training and calibration aside."""
    if current is None or wanted is None:
        return current is wanted
    if type(current) is not type(wanted):
        return False
    now, then = current.options(), wanted.options()
    now.pop("temperature", None)
    then.pop("temperature", None)
    if getattr(current, "calibrated", False):
        now.pop("mode")
        then.pop("mode")
    return now == then


def _no_sister(module: nn.Module) -> str:
    kind = type(module)
    if getattr(module, "parametrizations", None) is not None:
        return "its weight is parametrized; remove the parametrization first"
    known = {t for table in layers.sister_tables() for t in table}
    for base in kind.__mro__[1:]:
        if base in known:
            return f"{kind.__name__} changes what {base.__name__} does in ways unknown here"
    return f"{kind.__name__} has no quantized sister"


def _cannot_quantize(unit: _Unit, quantizer: Quantizer | None) -> str | None:
    """Why these weights cannot be quantized so; raises where the model itself is at fault."""
    if quantizer is None:
        return None
    weight = unit.module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta:
        raise ConversionError(
            f"the weight of {unit.name} is on the meta device; give the model real weights "
            "(model.to_empty(device=...), then load or initialise them) before quantizing it."
        )
    if not weight.is_floating_point():
        return f"weights of {weight.dtype} cannot be quantized"
    # The extremes tell as much as every single weight, and take no memory.
    if weight.numel() and not all(map(torch.isfinite, torch.aminmax(weight.detach()))):
        raise ConversionError(
            f"the weight of {unit.name} holds NaN or infinity, which no quantizer can represent; "
            "mend it before quantizing the model."
        )
    try:
        quantizer.check_shape(weight.shape)
    except QSNNError as error:
        return str(error)
    return None


def _check_ties(weighted: list[_Unit]) -> None:
    """One latent weight used by several layers must be one quantized weight too."""
    owners: dict[int, _Unit] = {}
    for unit in weighted:
        other = owners.setdefault(id(unit.module.weight), unit)
        if unit.bits["weight"] != other.bits["weight"] or not _same(
            _final_quantizer(unit), _final_quantizer(other)
        ):
            raise ConversionError(
                f"{unit.name} and {other.name} share one weight but would quantize it in two "
                f"ways ({_bits(unit.bits['weight'])} and {_bits(other.bits['weight'])} bits); "
                "give both the same quantizer with a rule."
            )


def _final_quantizer(unit: _Unit) -> Quantizer | None:
    if unit.target is not None:
        return unit.target.quantizer
    return unit.module.quantizer if isinstance(unit.module, QuantizedWeight) else None


def _bits(bits: int | None) -> str:
    return "" if bits is None else str(bits)
