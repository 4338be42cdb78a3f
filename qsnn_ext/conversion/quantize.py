"""``quantize_``: turn a model somebody else wrote into a Q-SNN, and say what became of each module.

Everything is planned and checked before anything changes. A module then changes its class and
gains a quantizer; the object, its parameters, hooks, flags and names stay. Should a step fail,
those before it are undone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from qsnn_ext import hosts, trace
from qsnn_ext.conversion.change import all_or_nothing, change_class, replace_module
from qsnn_ext.conversion.config import QuantConfig
from qsnn_ext.conversion.plan import Plan
from qsnn_ext.conversion.report import REPORT_ATTRIBUTE, ConversionReport
from qsnn_ext.errors import ConfigError, ConversionError, InputTypeError
from qsnn_ext.progress import working
from qsnn_ext.wrapping import unwrap

#: Class of modules -> what makes the module that takes the place of one.
Replacements = Mapping[type[nn.Module], Callable[[Any], nn.Module]]


@overload
def quantize_(
    model: nn.Module,
    config: QuantConfig | dict[str, Any] | str | Path = "paper",
    sample: Any = None,
    inplace: Literal[True] = True,
    strict: bool = False,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    replace: Replacements | None = None,
) -> ConversionReport: ...


@overload
def quantize_(
    model: nn.Module,
    config: QuantConfig | dict[str, Any] | str | Path = "paper",
    sample: Any = None,
    *,
    inplace: Literal[False],
    strict: bool = False,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    replace: Replacements | None = None,
) -> nn.Module: ...


def quantize_(
    model: nn.Module,
    config: QuantConfig | dict[str, Any] | str | Path = "paper",
    sample: Any = None,
    inplace: bool = True,
    strict: bool = False,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    replace: Replacements | None = None,
) -> ConversionReport | nn.Module:
    """Quantize the weights and membrane potentials of a SpikingJelly or snnTorch model.

    Convolutions, transposed ones, linear and recurrent layers and attention's projections become
    their binary or integer counterparts, subclasses of them included; neurons of the hosts become
    quantized neurons. Parameters, hooks, names, devices, dtypes, training and step modes and
    ``state_dict`` keys stay, so optimizers built before stay valid. A second run changes nothing,
    even after training or calibration; another configuration exchanges the quantizers and keeps
    the latent weights. A compiled, data-parallel or averaged model is quantized inside its wrapper.

    Args:
        model: the model, changed in place; in evaluation or training mode.
        config: a :class:`QuantConfig`, a dictionary, a ``.toml`` or ``.yaml`` file, a shorthand
            such as ``"1w-2u"``, or the name of a preset.
        sample: an input; a tuple is positional, a dictionary named arguments. With it the model
            runs once, undisturbed, and its data are followed: a first weighted layer is one that
            sees the input itself, a last one that no other weights come after; neurons written by
            hand are found; operations and states are counted. Without it first and last are those
            defined first and last (or found by an earlier conversion).
        inplace: ``False`` leaves the model alone and returns a quantized copy; its report is
            :func:`conversion_report` of the copy.
        strict: make it an error that something with weights or spikes is left in floating point
            because it is not supported, and, with a sample, that what was asked for happens
            nowhere. What the configuration keeps is no error.
        forward: ``forward(model, sample)`` runs the model over all its time steps; by default it
            is called with the sample.
        replace: ``{cls: factory}``: each module of exactly that class is first replaced by
            ``factory(module)``, for instance a neuron written by hand by a host's.

    Returns:
        The report, or with ``inplace=False`` the copy.

    Raises:
        InputTypeError: ``model`` is not a module, or ``config`` or ``replace`` of no accepted kind.
        ConfigError: wrong configuration, or a rule that matches nothing, nothing it could act on,
            or only what earlier rules have already taken; a replaced class that is nowhere.
        ConversionError: NaN or infinite weights, parameters on the meta device, tied weights that
            would be quantized in two ways, the sample does not run, or ``strict``. The model is
            then as it was.

    Warns:
        UserWarning: what was asked for happened nowhere, or 1-bit weights change the scale of
            currents; ``report.warnings`` holds the words.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"quantize_ needs a module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConversionError("a scripted model cannot be quantized; quantize it before scripting.")
    parsed = QuantConfig.parse(config)
    changed = model
    if not inplace:
        # States inside a live graph cannot be copied; the copy starts from their values.
        memo = {id(t): t.detach().clone() for t in trace.graph_tensors(model)}
        changed = copy.deepcopy(model, memo)
    report = _quantize(unwrap(changed), parsed, sample, strict, forward, replace or {})
    for warning in report.warnings:
        warnings.warn(warning, stacklevel=2)
    if inplace:
        return report
    for host in hosts.adapters():
        host.adopt(changed, copied=True)
    return changed


def _quantize(
    model: nn.Module,
    config: QuantConfig,
    sample: Any,
    strict: bool,
    forward: Callable[[nn.Module, Any], Any] | None,
    replace: Replacements,
) -> ConversionReport:
    with all_or_nothing(model):
        _replace(model, replace)
        with working("quantize"):
            plan = Plan(model, config, sample, forward)
        if strict and plan.unsupported:
            raise ConversionError(
                f"strict: {len(plan.unsupported)} module(s) would stay in floating point: "
                f"{'; '.join(plan.unsupported)}. Keep them with a rule (Rule.keep), or drop strict."
            )
        if strict and plan.missing and sample is not None:
            raise ConversionError(
                f"strict: {'; '.join(plan.missing)}. Ask for what is there, or drop strict."
            )
        for unit in plan.units:
            if unit.target is not None:
                change_class(unit.module, unit.target)
        for host in hosts.adapters():
            host.adopt(model, copied=False)
        report = plan.report()
        setattr(model, REPORT_ATTRIBUTE, report)
    return report


def _replace(model: nn.Module, replace: Replacements) -> None:
    for kind, factory in replace.items():
        if not (isinstance(kind, type) and issubclass(kind, nn.Module) and callable(factory)):
            raise InputTypeError(
                f"replace maps module classes to functions of a module, got {kind!r}: {factory!r}."
            )
        found = [m for m in dict.fromkeys(model.modules()) if type(m) is kind]
        if not found or found == [model]:
            where = "is the model itself" if found else "matches no module"
            raise ConfigError(f"replace: {kind.__name__} {where}; name the class of a part of it.")
        for module in found:
            new = factory(module)
            if not isinstance(new, nn.Module):
                raise InputTypeError(
                    f"replace: the function for {kind.__name__} returned a {type(new).__name__}, "
                    "not a module."
                )
            replace_module(model, module, new.train(module.training))
