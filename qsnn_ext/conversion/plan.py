"""What is to become of every module of a model, decided before any is touched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.prune import BasePruningMethod

from qsnn_ext import hosts
from qsnn_ext.conversion.change import Target, quantized_layer, quantized_neuron
from qsnn_ext.conversion.config import MembraneConfig, QuantConfig, Rule, WeightConfig, nearest
from qsnn_ext.conversion.flow import Flow, follow
from qsnn_ext.conversion.report import Action, ConversionReport, ModuleReport, conversion_report
from qsnn_ext.errors import ConfigError, ConversionError, QSNNError
from qsnn_ext.layers import QuantizedWeight, is_weighted, no_counterpart
from qsnn_ext.neuron import NeuronModel
from qsnn_ext.quantizers import MembraneQuantizer, Quantizer
from qsnn_ext.wrapping import named_modules

#: Modules that hand their children's weights to a fused function instead of calling them.
_OPAQUE = (nn.TransformerEncoderLayer,)

#: Modules that read the weights of a child of theirs, which so follows what they become.
_READS_CHILDREN = (nn.MultiheadAttention,)

#: Modules whose parameters scale and shift each value by itself.
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

#: How the reason for keeping a neuron begins that is no spiking one.
_READOUT = "read-out: "

#: How the reason for not quantizing a neuron begins that is of no library.
_PROBABLY = "probably a neuron: it "

#: From this share of exact zeros on a layer is taken for a pruned one.
_PRUNED = 0.05

#: Weights that are looked at to tell that factor.
_SOME = 1 << 13

#: From this factor on a change of the currents' scale is worth a word.
_RESCALED = 1.5


@dataclass(eq=False)
class Unit:
    """One module of the model, and what the plan says about it."""

    module: nn.Module
    names: tuple[str, ...]
    type: str
    device: torch.device
    rule: Rule | None = None
    owner: Unit | None = None  # the module whose fused call computes with these weights
    reader: Unit | None = None  # the module that reads these weights, as its own
    cell: Unit | None = None  # the neuron this is a part of
    action: Action = "nothing"
    reason: str = "holds nothing to quantize"
    became: str = ""
    target: Target | None = None
    bits: dict[str, int | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def settle(self, action: Action, reason: str) -> None:
        """Decide, without a change of class."""
        self.action = action
        self.reason = reason

    def convert(self, target: Target, became: str, reason: str) -> None:
        """Decide on a change of class."""
        self.settle("converted", reason)
        self.target = target
        self.became = became

    @property
    def name(self) -> str:
        """Its first name, for messages."""
        return self.names[0] or "(model)"

    @property
    def is_weighted(self) -> bool:
        """Whether it is a layer whose weights could be quantized."""
        return is_weighted(self.module)

    @cached_property
    def neuron(self) -> NeuronModel | None:
        """What a step of it computes, if it is a neuron of a host; nothing is changed yet."""
        return hosts.describe(self.module)

    @property
    def is_neuron(self) -> bool:
        """Whether it is a neuron of a host."""
        return self.neuron is not None

    @property
    def is_quantized(self) -> bool:
        """Whether it will be quantized."""
        return self.action in ("converted", "unchanged")

    @property
    def matrices(self) -> list[str]:
        """Names of its own parameters that are weights: what a quantizer quantizes, or would.

        A layer's are all that have several axes. Anything else has weights where two axes or more
        are longer than 1: a factor per channel or per step is a vector, whatever axes it has to be
        broadcast over. Those of norms and of neurons act on each value by itself.
        """
        if isinstance(self.module, _NORMS) or (self.is_neuron and not self.is_weighted):
            return []
        return [
            name
            for name, p in self.module._parameters.items()
            if p is not None
            and (
                isinstance(p, nn.UninitializedParameter)
                or (p.dim() if self.is_weighted else sum(size > 1 for size in p.shape)) > 1
            )
        ]

    @property
    def is_trained(self) -> bool:
        """Whether any parameter of its own takes a gradient."""
        parameters = self.module._parameters
        return any(p is not None and p.requires_grad for p in parameters.values())

    @property
    def quantizer(self) -> Quantizer | None:
        """The quantizer of its weights once the plan has been carried out."""
        if self.target is not None:
            return self.target.quantizer
        return self.module.quantizer if isinstance(self.module, QuantizedWeight) else None


class Plan:
    """Decides about every module of one model, touching none."""

    def __init__(
        self,
        model: nn.Module,
        config: QuantConfig,
        sample: Any,
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        self.config = config
        self.units = _units(model)
        for unit in self.units:
            unit.rule = config.rule_for(unit.names, unit.module)
        self.weighted = [u for u in self.units if u.is_weighted and u.owner is None]
        # Weights inside a cell feed it back to itself, and constants are no part of what is
        # learned: neither is where a network begins or ends.
        trained = any(u.is_trained for u in self.weighted)
        self.constants = [u for u in self.weighted if trained and not u.is_trained]
        self.ends = [
            u
            for u in self.weighted
            if u.cell is None and u.reader is None and u not in self.constants
        ]
        self.in_cells = [
            u
            for u in self.weighted
            if u.cell is not None and u.reader is None and u not in self.constants
        ]
        self.earlier = conversion_report(model)
        self.flow = self._follow(model, sample, forward)
        self.firsts, self.lasts, self.ends_by = self._ends()
        # Cells first: what is inside goes by what becomes of them.
        for unit in sorted(self.units, key=lambda u: not u.is_neuron):
            if unit.owner is not None:
                self._plan_opaque(unit)
            elif unit.is_weighted:
                self._plan_weights(unit)
            elif unit.is_neuron:
                self._plan_neuron(unit)
            else:
                self._plan_other(unit)
        self._check_rules()
        _check_ties(self.weighted)
        self.missing = self._missing()
        self.warnings = [*self.missing, *self._warnings()]

    @property
    def unsupported(self) -> list[str]:
        """What stays in floating point for want of support, with reasons."""
        return [f"{u.name} ({u.reason})" for u in self.units if u.action == "unsupported"]

    def report(self) -> ConversionReport:
        """The plan in the words of what it will have done."""
        seen: set[int] = set()
        return ConversionReport(
            config=self.config,
            modules=tuple(self._row(unit, seen) for unit in self.units),
            firsts=tuple(u.names[0] for u in self.firsts),
            lasts=tuple(u.names[0] for u in self.lasts),
            ends_by=self.ends_by,
            unseen=self._unseen(),
            warnings=tuple(self.warnings),
        )

    def _row(self, unit: Unit, seen: set[int]) -> ModuleReport:
        own = [
            p
            for p in unit.module._parameters.values()
            if p is not None and not isinstance(p, nn.UninitializedParameter) and id(p) not in seen
        ]
        seen.update(map(id, own))
        weights = {id(unit.module._parameters[name]) for name in unit.matrices}
        key = id(unit.module)
        return ModuleReport(
            name=unit.names[0],
            type=unit.type,
            became=unit.became or unit.type,
            action=unit.action,
            reason="; ".join([unit.reason, *unit.notes]),
            weight_bits=unit.bits.get("weight"),
            membrane_bits=unit.bits.get("membrane"),
            aliases=unit.names[1:],
            neuron=unit.is_neuron or self._fires(unit) is not None,
            parameters=sum(p.numel() for p in own),
            weights=sum(p.numel() for p in own if id(p) in weights),
            operations=self.flow.operations.get(key) if self.flow else None,
            states=self.flow.states.get(key) if self.flow else None,
        )

    # ----------------------------------------------------------------- first and last

    def _follow(self, model: nn.Module, sample: Any, forward: Any) -> Flow | None:
        if sample is None:
            return None
        holders = [u.module for u in self.units if u.matrices and (u.owner or not u.is_weighted)]
        layers = [u.module for u in (*self.ends, *self.in_cells)]
        try:
            return follow(model, layers, holders, sample, forward)
        except Exception as error:
            raise ConversionError(
                f"the model does not run on the sample ({type(error).__name__}: {error}); "
                "pass an input its forward takes, or none to go by definition order."
            ) from error

    def _unseen(self) -> tuple[str, ...]:
        if self.flow is None:
            return ()
        seen = set(map(id, self.flow.order)) | self.flow.read
        return tuple(u.name for u in self.ends if id(u.module) not in seen)

    def _ends(self) -> tuple[list[Unit], list[Unit], str]:
        """First and last weighted layers, and how they were found."""
        if self.flow is not None and self.flow.order:
            by_id = {id(unit.module): unit for unit in (*self.ends, *self.in_cells)}
            firsts = [by_id[id(m)] for m in self.flow.firsts]
            return (
                # A cell's matrix that is given the spikes of its own last step too is no first.
                [u for u in firsts if u.cell is None or id(u.module) not in self.flow.looped],
                [by_id[id(m)] for m in self.flow.lasts if by_id[id(m)].cell is None],
                "what feeds what, in running order, in a traced forward pass",
            )
        if not self.ends:
            return [], [], "definition order"
        if self.earlier is not None:
            by_name = {name: u for u in (*self.ends, *self.in_cells) for name in u.names}
            firsts = [by_name[n] for n in self.earlier.firsts if n in by_name]
            lasts = [by_name[n] for n in self.earlier.lasts if n in by_name]
            if firsts and lasts:
                return firsts, lasts, self.earlier.ends_by
        return self.ends[:1], self.ends[-1:], "definition order"

    # ----------------------------------------------------------------- weights

    def _plan_opaque(self, unit: Unit) -> None:
        owner = unit.owner
        assert owner is not None
        if unit.is_weighted or unit.module._parameters or isinstance(unit.module, _OPAQUE):
            if unit.rule is None:
                unit.rule = owner.rule  # who keeps the owner keeps what is in it
            if unit.rule is not None and unit.rule.weight == "keep":
                return unit.settle("kept", f"rule for {unit.rule.selector}")
            self._forbid_request(unit, f"{owner.type} computes with its weights itself")
            unit.settle(
                "unsupported",
                f"{owner.type} computes with its weights in a fused call; build it of layers "
                "that are called one by one",
            )

    def _forbid_request(self, unit: Unit, because: str) -> None:
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

    def _wanted(self, unit: Unit) -> tuple[WeightConfig | Literal["keep"], str]:
        """What the configuration wants of some weights, and why."""
        if unit.rule is not None and unit.rule.weight is not None:
            return unit.rule.weight, f"rule for {unit.rule.selector}"
        if unit in self.firsts:
            return self.config.end("first"), "first weighted layer"
        if unit in self.lasts:
            return self.config.end("last"), "last weighted layer"
        if unit.cell is not None:
            return self.config.weight, f"weights of the cell {unit.cell.name}"
        return self.config.weight, "hidden layer"

    def _plan_weights(self, unit: Unit) -> None:
        module = unit.module
        current = module.quantizer if isinstance(module, QuantizedWeight) else None
        unit.bits["weight"] = current.bits if current is not None else None
        wanted, reason = self._wanted(unit.reader or unit)
        if unit.reader is not None and unit.rule is not None and unit.rule.weight is not None:
            wanted, reason = unit.rule.weight, f"rule for {unit.rule.selector}"
        if isinstance(wanted, str):
            return unit.settle("kept", reason)
        by_rule = unit.rule is not None and unit.rule.weight is not None
        if unit in self.constants and not by_rule and current is None:
            return unit.settle(
                "kept",
                "a constant: its weights are not trained (requires_grad is False); a rule "
                "quantizes it all the same",
            )
        if unit.cell is not None and not by_rule and unit.cell.action in ("kept", "unsupported"):
            return unit.settle(
                unit.cell.action,
                f"weights of the cell {unit.cell.name}, which stays in floating point; a rule "
                "quantizes them all the same",
            )
        if unit.reader is not None and unit.reader.action in ("unsupported", "kept"):
            return unit.settle(unit.reader.action, unit.reader.reason)
        quantizer = wanted.build(self.config.preset)
        if _same(current, quantizer):
            if quantizer is None:
                return unit.settle("kept", f"{reason}: 32 bits")
            return unit.settle("unchanged", f"{reason}; already quantized so")
        if getattr(module, "output_scale", None) is not None:
            raise ConversionError(
                f"{unit.name} has batch norm folded into it, or its currents scaled, and cannot "
                "take other quantizers; quantize first, fold and scale last."
            )
        why_not = _cannot_quantize(unit, quantizer)
        if why_not is not None:
            self._forbid_request(unit, why_not)
            return unit.settle("unsupported", why_not)
        kind: Any = type(module)
        if quantizer is not None:
            kind = quantized_layer(module, quantizer)
        elif isinstance(module, QuantizedWeight):
            kind = module.float_type()
        unit.convert(Target(quantizer), kind.__name__, reason)
        unit.bits["weight"] = quantizer.bits if quantizer is not None else None
        if quantizer is not None and quantizer.bits == 1:
            zeros = _zeros(module)
            if zeros >= _PRUNED:
                unit.notes.append(
                    f"{zeros:.0%} of its weights are exactly 0 and count as +-alpha now, since "
                    "1 bit has no zero; 2 bits and more have one"
                )

    # ----------------------------------------------------------------- neurons and the rest

    def _plan_neuron(self, unit: Unit) -> None:
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
        model = unit.neuron
        assert model is not None
        if not model.states and model.obstacle is None:
            return unit.settle("nothing", model.stateless)
        if rule is None and self.config.readouts == "keep" and current is None:
            if model.readout:
                return unit.settle("kept", f"{_READOUT}it only integrates")
            if self._gives_potential(unit):
                return unit.settle("kept", f"{_READOUT}it gives its potential, and no spikes")
        why_not = (
            f"{unit.type} is a neuron with no quantized counterpart"
            if quantized is None and model.obstacle is None
            else model.obstacle
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
        unit.convert(
            Target(membrane, wanted.order, unit.device, self.config.preset), kind.__name__, reason
        )
        unit.bits["membrane"] = membrane.bits if membrane is not None else None

    def _found_before(self, unit: Unit) -> ModuleReport | None:
        """What an earlier conversion says of a module, where this one has no run to go by."""
        if self.flow is not None or self.earlier is None:
            return None
        return next((row for row in self.earlier.modules if row.name == unit.names[0]), None)

    def _gives_potential(self, unit: Unit) -> bool:
        """Whether a run has shown a neuron to give its potential and no spikes."""
        if self.flow is not None:
            return id(unit.module) in self.flow.readouts
        row = self._found_before(unit)
        return row is not None and row.action == "kept" and row.reason.startswith(_READOUT)

    def _fires(self, unit: Unit) -> str | None:
        """Why a module of nobody's is probably a neuron."""
        if self.flow is not None:
            return self.flow.neurons.get(id(unit.module))
        row = self._found_before(unit)
        if row is None or row.type != unit.type or not row.reason.startswith(_PROBABLY):
            return None
        return row.reason.removeprefix(_PROBABLY).partition(";")[0]

    def _plan_other(self, unit: Unit) -> None:
        matrices, fires = unit.matrices, self._fires(unit)
        keeps = unit.rule is not None and "keep" in (unit.rule.weight, unit.rule.membrane)
        if fires is not None and keeps:
            unit.settle("kept", f"rule for {unit.rule.selector}")  # type: ignore[union-attr]
        elif fires is not None:
            unit.settle(
                "unsupported",
                f"{_PROBABLY}{fires}; say what it is with "
                f"quantize_(replace={{{unit.type}: ...}}), or keep it with a rule",
            )
        elif matrices:
            if unit.rule is not None and unit.rule.weight == "keep":
                return unit.settle("kept", f"rule for {unit.rule.selector}")
            unit.settle(
                "unsupported",
                f"type {unit.type} is unknown; its {', '.join(matrices)} stay float; compute with "
                "a layer such as nn.Linear, or keep it with a rule",
            )
        elif next(unit.module.children(), None) is not None:
            unit.reason = "container"

    # ----------------------------------------------------------------- what to warn of

    def _missing(self) -> list[str]:
        """What was asked for and happened nowhere."""
        missing = []
        bits = self.config.weight.bits
        if bits != 32 and not any(u.bits.get("weight") == bits for u in self.units):
            ends = [u for u in self.weighted if u in self.firsts or u in self.lasts]
            why = "no layer with weights was found"
            if self.weighted and len(ends) == len(self.weighted):
                got = sorted({u.bits.get("weight") or 32 for u in ends})
                which = f"every one of the {len(ends)} layers" if len(ends) > 1 else "the one layer"
                why = (
                    f"{which} is a first or a last one ({', '.join(map(str, got))} bits); "
                    "QuantConfig(first=, last=) or rules change that"
                )
            elif self.weighted:
                left = next((u for u in self.weighted if not u.is_quantized), self.weighted[0])
                why = f"see the table; {left.name}: {left.reason}"
            missing.append(f"no layer has {bits}-bit weights: {why}")
        bits = self.config.membrane.bits
        if bits != 32 and not any(u.bits.get("membrane") for u in self.units):
            neurons = [u for u in self.units if u.is_neuron or self._fires(u) is not None]
            why = "no neuron of SpikingJelly or snnTorch was found"
            if neurons:  # one of each class says what there is to say
                classes = {u.type: u for u in reversed(neurons)}
                why = "; ".join(f"{u.name}: {u.reason}" for u in [*classes.values()][:3])
            elif self.flow is None:
                why += "; with sample= neurons written by hand are looked for"
            missing.append(f"no membrane potential was quantized: {why}")
        return missing

    def _warnings(self) -> list[str]:
        warnings = []
        binary = [u for u in self.weighted if u.bits.get("weight") == 1]
        if self.flow is not None:
            plain = [u for u in binary if id(u.module) in self.flow.unscaled]
        else:
            norms = any(isinstance(u.module, (_NormBase, nn.GroupNorm)) for u in self.units)
            plain = [] if norms else binary
        factors = {u.name: f for u in plain if (f := _rescaled(u)) > _RESCALED}
        if factors:
            shown = ", ".join(f"{name} {factor:.0f}x" for name, factor in list(factors.items())[:8])
            warnings.append(
                "1-bit weights without a batch norm behind them make currents larger than the "
                f"float weights did: {shown}; qsnn_ext.calibrate_scales(model) keeps their "
                "deviation"
            )
        read = [u.name for u in self.ends if self.flow and id(u.module) in self.flow.read]
        if read:
            warnings.append(
                f"the weights of {', '.join(read)} are also read by a module around, which "
                "computes with the latent ones; call the layer instead"
            )
        return warnings

    # ----------------------------------------------------------------- rules

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


def _units(model: nn.Module) -> list[Unit]:
    """Every module once, with all its names, in definition order, quantizers left out."""
    units: dict[int, Unit] = {}
    around: list[tuple[str, Unit]] = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, module in named_modules(model, remove_duplicate=False):
        if isinstance(module, Quantizer):
            continue
        # A neuron has no tensors of its own to tell its device by; the layer before it has.
        device = next((p.device for p in module._parameters.values() if p is not None), device)
        if id(module) in units:
            unit = units[id(module)]
            unit.names = (*unit.names, name)
            continue
        unit = Unit(module, (name,), type(module).__name__, device)
        for path, other in around:
            if _inside(name, path):
                if isinstance(other.module, _OPAQUE):
                    unit.owner = unit.owner or other
                elif isinstance(other.module, _READS_CHILDREN):
                    unit.reader = other
                else:
                    unit.cell = unit.cell or other
        if isinstance(module, _OPAQUE):
            unit.owner = unit.owner or unit
        if isinstance(module, (*_OPAQUE, *_READS_CHILDREN)) or unit.is_neuron:
            around.append((name, unit))
        units[id(module)] = unit
    return list(units.values())


def _inside(name: str, path: str) -> bool:
    return path == "" or name == path or name.startswith(path + ".")


def _concerns(rule: Rule, unit: Unit) -> bool:
    """Whether the rule says something about what the module has."""
    has_weights = unit.is_weighted or unit.action in ("unsupported", "kept")
    return (rule.weight is not None and has_weights and not unit.is_neuron) or (
        rule.membrane is not None and (unit.is_neuron or unit.action in ("unsupported", "kept"))
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


def _cannot_quantize(unit: Unit, quantizer: Quantizer | None) -> str | None:
    """Why these weights cannot be quantized so; raises where the model itself is at fault."""
    if quantizer is None:
        return None
    module: Any = unit.module
    why = _recomputed(module, quantizer)
    if why is None and not isinstance(module, QuantizedWeight):
        why = no_counterpart(type(module))
    if why is not None:
        return why
    names = module.weight_names() if isinstance(module, QuantizedWeight) else unit.matrices
    weights = [module._parameters.get(name) for name in names] or [module.weight]
    for weight in weights:
        if weight is None:
            weight = module.weight
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
                f"the weight of {unit.name} holds NaN or infinity, which no quantizer can "
                "represent; mend it before quantizing the model."
            )
        try:
            quantizer.check_shape(weight.shape)
        except QSNNError as error:
            return str(error)
    return None


def _recomputed(module: nn.Module, quantizer: Quantizer) -> str | None:
    """Why the weight is not the layer's own: something computes it anew before every call."""
    if getattr(module, "parametrizations", None) is not None:
        return (
            "its weight is parametrized; remove the parametrization first "
            "(torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight'))"
        )
    if "weight" in module._parameters or not isinstance(module.__dict__.get("weight"), Tensor):
        return None
    hooks = list(module._forward_pre_hooks.values())
    names = {type(hook).__name__ for hook in hooks}
    if any(isinstance(hook, BasePruningMethod) for hook in hooks):
        if quantizer.bits > 1:
            return None  # such a grid has a zero: what is pruned stays so
        return (
            "it is pruned, and 1 bit has no zero: what was pruned would count fully; give it 2 "
            "bits or more with a rule, or keep it"
        )
    for name, remedy in (
        ("WeightNorm", "torch.nn.utils.remove_weight_norm(layer)"),
        ("SpectralNorm", "torch.nn.utils.remove_spectral_norm(layer)"),
    ):
        if name in names:
            return f"{name} computes its weight anew before every call; first {remedy}"
    return "its weight is no parameter: something computes it; make it one first"


def _zeros(module: Any) -> float:
    """The share of weights that are exactly zero."""
    weights = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    total = sum(w.numel() for w in weights)
    return 1 - sum(int(torch.count_nonzero(w)) for w in weights) / total if total else 0.0


@torch.no_grad()
def _rescaled(unit: Unit) -> float:
    """About how many times the deviation of a layer's currents grows by its quantizer."""
    quantizer = unit.quantizer
    weight = unit.module._parameters.get("weight")
    if quantizer is None or weight is None or "output_scale" in unit.module._buffers:
        return 1.0
    some = weight.detach()[: max(2, _SOME // max(1, weight[0].numel()))]
    was = float(some.float().square().mean().sqrt())
    now = float(quantizer(some).float().square().mean().sqrt())
    return now / was if was > 0 else 1.0


def _check_ties(weighted: list[Unit]) -> None:
    """One latent weight used by several layers must be one quantized weight too."""
    owners: dict[int, Unit] = {}
    for unit in weighted:
        weight = unit.module._parameters.get("weight")
        if weight is None:
            continue
        other = owners.setdefault(id(weight), unit)
        if unit.bits["weight"] != other.bits["weight"] or not _same(
            unit.quantizer, other.quantizer
        ):
            bits = [str(u.bits["weight"] or "") for u in (unit, other)]
            raise ConversionError(
                f"{unit.name} and {other.name} share one weight but would quantize it in two "
                f"ways ({bits[0]} and {bits[1]} bits); "
                "give both the same quantizer with a rule."
            )
