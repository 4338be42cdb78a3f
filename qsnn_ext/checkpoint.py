"""A quantized model in one safetensors file: weights, quantizers, frozen scales, configuration.

The file says of every quantized module which quantizer it has with which options, so the float
model's constructor is all that is needed to rebuild the model. A digest over everything in it
tells a damaged file from a good one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qsnn_ext
from qsnn_ext import hosts
from qsnn_ext.conversion.change import (
    Target,
    all_or_nothing,
    change_class,
    quantized_neuron,
    replace_module,
)
from qsnn_ext.conversion.report import REPORT_ATTRIBUTE, ConversionReport, conversion_report
from qsnn_ext.errors import CheckpointError, InputTypeError, MissingDependencyError
from qsnn_ext.files import ZIP, check_path, write_atomically
from qsnn_ext.folding import FoldedNorm
from qsnn_ext.layers import QuantizedWeight
from qsnn_ext.quantizers import KINDS, MembraneQuantizer, Quantizer
from qsnn_ext.wrapping import actual_keys, common_prefix, named_modules, plain_keys, unwrap

#: Version of the file's header; raised whenever an older reader would misread it.
SCHEMA = 1

_KEY = "qsnn_ext"


def save_checkpoint(model: nn.Module, path: str | Path) -> None:
    """Write a model to a safetensors file that :func:`load_checkpoint` reads.

    The file is written beside its place and then moved there, so a crash leaves no half a file and
    an older checkpoint of the name stays whole until the new one is.

    Args:
        model: quantized by :func:`~qsnn_ext.quantize_` or by hand, calibrated or not, folded or
            not; a float model works too. Tied weights are stored once. Of a compiled,
            data-parallel or averaged model the one inside is written, under its own names.
        path: of the file; its folder must exist.

    Raises:
        InputTypeError: ``model`` is not a module, or ``path`` is none.
        CheckpointError: the file cannot be written, the model's state is not all tensors, or a
            module of another class than ours has a membrane quantizer.
        MissingDependencyError: safetensors is not installed.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"save_checkpoint needs a module, got {type(model).__name__}.")
    check_path(path, "save_checkpoint")
    model = unwrap(model)
    states = _states(model)
    tensors, tied = _distinct({k: v for k, v in _named(model).items() if k not in states})
    header = {**structure(model), "tied": tied}
    text = json.dumps(header, sort_keys=True)
    try:
        content = _safetensors().torch.save(tensors, {_KEY: text, "sha256": _digest(text, tensors)})
    except Exception as error:
        raise CheckpointError(f"the model's tensors cannot be stored: {error}") from error
    write_atomically(Path(path), lambda file: file.write(content), CheckpointError)


def structure(model: nn.Module) -> dict[str, Any]:
    """What a ``state_dict`` does not say of a quantized model, as plain data ready for JSON.

    Args:
        model: quantized by :func:`~qsnn_ext.quantize_` or by hand, or not at all.

    Raises:
        CheckpointError: a module of another class than ours has a membrane quantizer.
    """
    report = conversion_report(model)
    return {
        "schema": SCHEMA,
        "version": qsnn_ext.__version__,
        "quantized": _describe(model),
        "folded_norms": [n for n, m in named_modules(model) if isinstance(m, FoldedNorm)],
        "folded_layers": [n for n, m in named_modules(model) if getattr(m, "folded", False)],
        "scaled_layers": [n for n, m in named_modules(model) if _is_scaled(m)],
        "report": report.to_dict() if report is not None else None,
    }


def restore_structure(
    model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> None:
    """Make a float model, in place, the quantized one that ``header`` and ``tensors`` are of.

    Args:
        model: of the same architecture; its parameters stay the objects that they are.
        header: from :func:`structure`.
        tensors: the quantized model's ``state_dict``.
        source: where they come from, for messages.

    Raises:
        CheckpointError: another architecture or version; the model is then as it was.
    """
    _fit(model, header, tensors, source)


def load_checkpoint(path: str | Path, model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a model from a file of :func:`save_checkpoint`.

    Args:
        path: of the file.
        model: the float model, or a function (or class) that builds it, wrapped or not. It is
            quantized as the file says, in place, and gets the file's weights.

    Returns:
        The model, in the training mode it was built in.

    Raises:
        CheckpointError: no such file, damaged, not written by :func:`save_checkpoint`, by a newer
            version, or of another architecture. The model given is then as it was.
        InputTypeError: ``model`` is, or builds, no module, or ``path`` is none.
        MissingDependencyError: safetensors is not installed.
    """
    check_path(path, "load_checkpoint")
    path = Path(path)
    header, tensors = _read(path)
    built = model if isinstance(model, nn.Module) else model() if callable(model) else model
    if not isinstance(built, nn.Module):
        given = "the function returned" if callable(model) else "got"
        raise InputTypeError(
            "load_checkpoint needs a model or a function that builds one; "
            f"{given} {type(built).__name__}."
        )
    # Its digest is right, so whoever wrote it wrote it so: another version, or ill will.
    remedy = "; write it anew with qsnn_ext.save_checkpoint"
    _fit(unwrap(built), header, tensors, repr(str(path)), remedy)
    return built


# --------------------------------------------------------------------------- writing


def _describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Quantizer and options of every quantized module, asked from the modules themselves."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in named_modules(model):
        quantizer = getattr(
            module, "quantizer" if isinstance(module, QuantizedWeight) else "membrane", None
        )
        if isinstance(quantizer, Quantizer):
            entry: dict[str, Any] = {
                "layer": _float_name(module),
                "quantizer": type(quantizer).__name__,
                "options": quantizer.options(),
            }
            if not isinstance(module, QuantizedWeight):
                if quantized_neuron(module) is not type(module):
                    raise CheckpointError(
                        f"{name!r} quantizes its membrane potential, but load_checkpoint cannot "
                        f"rebuild a {type(module).__name__}; save model.state_dict() instead."
                    )
                entry["order"] = module.order
                entry["preset"] = module.preset
            found[name] = entry
    return found


def _float_name(module: Any) -> str:
    kind = module.float_type() if hasattr(module, "float_type") else type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _distinct(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that share no memory, and which names stand for another name's tensor."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"the state {name!r} is a {type(value).__name__} and not a tensor, "
                "which this file cannot hold."
            )
        if value.is_meta:
            raise CheckpointError(f"{name!r} is on the meta device and has no values to store.")
        value = value.detach()
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        storage = value.untyped_storage().data_ptr()
        stored = value.cpu().contiguous()
        if storage in storages and stored.untyped_storage().data_ptr() == storage:
            stored = stored.clone()
        storages.add(storage)
        tensors[name] = stored
    return tensors, tied


def _digest(text: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --------------------------------------------------------------------------- reading


def _contents(path: Path) -> tuple[dict[str, Any], bytes]:
    """Metadata and all bytes of a safetensors file whose size is what its header says.

    Read once and here: the library opens the file twice, and between the two another process may
    put a newer checkpoint in its place.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        word = file.read(8)
        length = int.from_bytes(word, "little")
        if word[:4] == ZIP:
            raise CheckpointError(
                f"{str(path)!r} is a zip archive, which torch.save writes; load it with "
                "torch.load(path, weights_only=True) and model.load_state_dict."
            )
        if not 0 < length <= size - 8:
            raise CheckpointError(f"{str(path)!r} is damaged: its header does not fit into it.")
        header = file.read(length)
        entries = json.loads(header)
        metadata = entries.pop("__metadata__", None) or {}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if end != size - 8 - length:
            raise CheckpointError(f"{str(path)!r} is damaged: it is not as long as it says.")
        return metadata, word + header + file.read()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that has been found whole."""
    library = _safetensors()
    try:
        metadata, content = _contents(path)
        tensors = library.torch.load(content)
        text = metadata.get(_KEY)
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {str(path)!r}.") from error
    except (
        library.SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError,
        RuntimeError,
    ) as error:  # fmt: skip
        raise CheckpointError(
            f"{str(path)!r} is damaged or no safetensors file: {error!s:.300}"
        ) from error
    if text is None:
        raise CheckpointError(
            f"{str(path)!r} holds tensors but was not written by qsnn_ext.save_checkpoint; "
            "load it with safetensors and model.load_state_dict."
        )
    if not isinstance(text, str) or metadata.get("sha256") != _digest(text, tensors):
        raise CheckpointError(f"{str(path)!r} is damaged: its contents do not match its digest.")
    try:
        header = json.loads(text)
        schema = header["schema"]
        if schema == SCHEMA:
            for name, source in header["tied"].items():
                tensors[name] = tensors[source]
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} has a malformed header ({type(error).__name__}: {error!s:.300}); "
            "write it anew with qsnn_ext.save_checkpoint."
        ) from error
    _check_schema(schema, repr(str(path)))
    return header, tensors


def _check_schema(schema: Any, source: str) -> None:
    if schema != SCHEMA:
        raise CheckpointError(
            f"{source} has schema {schema!s:.20} and this version of qsnn_ext reads "
            f"schema {SCHEMA}; upgrade qsnn_ext."
        )


def _fit(
    model: nn.Module,
    header: dict[str, Any],
    tensors: dict[str, Tensor],
    source: str,
    remedy: str = "",
) -> None:
    """:func:`_restore`, of whatever somebody wrote.

    Raises:
        CheckpointError: it does not fit the model.
    """
    try:
        _check_schema(header["schema"], source)
        _restore(model, header, tensors, source)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{source} does not fit the model ({type(error).__name__}: {error!s:.300}){remedy}."
        ) from error


def _restore(
    model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor], source: str
) -> None:
    modules = dict(named_modules(model))
    header, tensors = _without_wrapper(model, header, tensors)
    problems = _differences(model, modules, header, tensors)
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise CheckpointError(
            f"{source} is of another architecture than {type(model).__name__}: {shown}."
        )
    changes = []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, module in modules.items():
        device = next((p.device for p in module._parameters.values() if p is not None), device)
        entry = header["quantized"].get(name)
        is_quantized = isinstance(module, QuantizedWeight) or (
            quantized_neuron(module) is type(module)
        )
        if entry is not None:
            quantizer = KINDS[entry["quantizer"]](**entry["options"])
            target = Target(quantizer, entry.get("order"), device, entry.get("preset", "paper"))
            changes.append((module, target))
        elif is_quantized:
            changes.append((module, Target(None)))
    report = header["report"] and ConversionReport.from_dict(header["report"])
    with all_or_nothing(model):
        for module, target in changes:
            change_class(module, target)
        for name in header["folded_norms"]:
            replace_module(model, modules[name], FoldedNorm())
        for name in header["folded_layers"]:
            _make_room(modules[name])
        for name in header.get("scaled_layers", ()):
            _make_room_for_scale(modules[name])
        _check_shapes(model, tensors, source)
        for host in hosts.adapters():
            host.adopt(model, copied=False)
        if report is not None:
            setattr(model, REPORT_ATTRIBUTE, report)
        own = _named(model)
        tensors = {**{name: own[name] for name in _states(model) if name in own}, **tensors}
        keys = actual_keys(model, tensors)
        model.load_state_dict({keys[k]: v for k, v in tensors.items()}, strict=True)


def _named(model: nn.Module) -> dict[str, Any]:
    """The ``state_dict`` by the names that the model's own modules have, whatever wraps them."""
    keys = plain_keys(model)
    return {keys[key]: value for key, value in model.state_dict().items()}


def _states(model: nn.Module) -> set[str]:
    """Names of what neurons carry from step to step, which some hosts count among the buffers."""
    described = ((name, hosts.describe(module)) for name, module in named_modules(model))
    return {
        f"{name}.{state.name}".lstrip(".")
        for name, neuron in described
        if neuron is not None
        for state in neuron.states
    }


def _without_wrapper(
    model: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Earlier versions wrote a wrapped model under the names that the wrapper gave it."""
    prefix = common_prefix(tensors)
    if not prefix or common_prefix(plain_keys(model).values()) == prefix:
        return header, tensors

    def plain(name: str) -> str:
        return (name + ".").removeprefix(prefix).removesuffix(".")

    renamed = {
        **header,
        "quantized": {plain(name): entry for name, entry in header["quantized"].items()},
        "folded_norms": [plain(name) for name in header["folded_norms"]],
        "folded_layers": [plain(name) for name in header["folded_layers"]],
        "scaled_layers": [plain(name) for name in header.get("scaled_layers", ())],
        "report": None,  # it was the wrapper's
    }
    return renamed, {plain(name): tensor for name, tensor in tensors.items()}


def _check_shapes(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Loading copies into the model's tensors one by one and cannot be undone: ask first."""
    ours = {name: tensor.shape for name, tensor in _named(model).items()}
    for name, module in named_modules(model):
        if isinstance(module, MembraneQuantizer):
            ours[f"{name}.alpha"] = module.alpha.shape  # in the state only when calibrated
    for key, tensor in tensors.items():
        if ours.get(key) != tensor.shape:
            raise CheckpointError(
                f"{source} does not fit the model: {key!r} has shape {tuple(tensor.shape)} in "
                "it; write it anew with qsnn_ext.save_checkpoint."
            )


def _is_scaled(module: nn.Module) -> bool:
    """Whether ``calibrate_scales`` has given the layer an output scale, and no batch norm has."""
    return "output_scale" in module._buffers and not getattr(module, "folded", False)


def _make_room_for_scale(layer: Any) -> None:
    channels = layer.rows(layer.latent()).shape[0]
    layer.register_buffer("output_scale", layer.latent().new_ones(channels))


def _make_room(layer: Any) -> None:
    """The parameters that folding leaves in a layer, for the file's values."""
    transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    channels = layer.out_channels if transposed else layer.weight.shape[0]
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(channels))
    if hasattr(layer, "quantizer"):
        layer.register_buffer("output_scale", layer.weight.new_ones(channels))
    layer.folded = True


def _differences(
    model: nn.Module,
    modules: dict[str, nn.Module],
    header: dict[str, Any],
    tensors: dict[str, Tensor],
) -> list[str]:
    """What keeps the file from being one of this model, found before anything is changed."""
    problems = []
    for name, entry in header["quantized"].items():
        if name not in modules:
            problems.append(f"the model has no module {name!r}")
        elif _float_name(modules[name]) != entry["layer"]:
            problems.append(
                f"{name!r} is a {_float_name(modules[name])} and not a {entry['layer']}"
            )
    problems += [
        f"the model has no module {name!r}"
        for name in (
            *header["folded_norms"],
            *header["folded_layers"],
            *header.get("scaled_layers", ()),
        )
        if name not in modules
    ]
    if problems:
        return problems
    added = {f"{n}.{part}".lstrip(".") for n in header["folded_layers"] for part in _FOLDED}
    added |= {f"{n}.output_scale".lstrip(".") for n in header.get("scaled_layers", ())}
    removed = tuple(f"{n}." for n in header["folded_norms"])
    alphas = {f"{name}.membrane.alpha".lstrip(".") for name in modules}
    for key in (*tensors, *plain_keys(model).values()):
        further = _FURTHER_SCALE.fullmatch(key)
        if further is not None and (further[1] or "") in header["quantized"]:
            alphas.add(key)
    states = _states(model)
    has = {
        name: value.shape
        for name, value in _named(model).items()
        if isinstance(value, Tensor)
        and name not in alphas
        and name not in states
        and not (removed and name.startswith(removed))
    }
    # A file's tensors come in no particular order; people read the model's.
    place = {key: number for number, key in enumerate(has)}
    for key in sorted(tensors, key=lambda k: (place.get(k, len(place)), k)):
        tensor = tensors[key]
        if key in alphas or (key in added and key not in has):
            continue
        if key not in has:
            problems.append(f"the model has no {key!r}")
        elif has[key] != tensor.shape:
            problems.append(
                f"{key!r} has shape {tuple(has[key])} in the model "
                f"and {tuple(tensor.shape)} in the file"
            )
    problems += [f"the file has no {key!r}" for key in has if key not in tensors]
    return problems


_FOLDED = ("bias", "output_scale")

#: The frozen scale of a neuron's state besides its membrane potential.
_FURTHER_SCALE = re.compile(r"(?:(.*)\.)?carried\.\w+\.alpha")


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise MissingDependencyError(
            "checkpoints need safetensors; install it with: pip install 'qsnn_ext[deploy]'."
        ) from error
    return safetensors
