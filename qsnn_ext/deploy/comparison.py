"""How well a program agrees with the float simulation of the model it came from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.batches import check_batches
from qsnn_ext.deploy import checks
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.deploy.program import IntArray, Program
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import InputError, InputTypeError, StateError
from qsnn_ext.plotting import figure, name_bars
from qsnn_ext.progress import tracking
from qsnn_ext.text import columns
from qsnn_ext.trace import check_model


@dataclass(frozen=True)
class LayerAgreement:
    """One neuron layer.

    Args:
        name: Module path.
        spikes: Number of spikes compared.
        agreement: Share of equal spikes.
        rate_model, rate_program: Firing rates.
        membrane_error: Mean absolute difference of the carried membrane potentials, where the
            simulation keeps one that can be read (else NaN).
    """

    name: str
    spikes: int
    agreement: float
    rate_model: float
    rate_program: float
    membrane_error: float


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`.

    Args:
        layers: Agreement of every neuron layer, in order.
        samples: Number of samples.
        predictions: Share of samples with the same predicted class (mean over time steps). Where
            the answer is a single real number per sample, that with answers that differ by less
            than a thousandth of the largest.
        accuracy_model, accuracy_program: Share of right predictions, or NaN without labels.
        output_error: Largest absolute difference of the outputs.
        at_the_ends: Share of input values whose codes are the least or the largest there is, and
            may have been clipped to it.
    """

    layers: list[LayerAgreement]
    samples: int
    predictions: float
    accuracy_model: float
    accuracy_program: float
    output_error: float
    at_the_ends: float = 0.0

    def __str__(self) -> str:
        rows = [
            (
                layer.name,
                f"{layer.agreement:.5f}",
                f"{layer.rate_model:.4f}",
                f"{layer.rate_program:.4f}",
                "-" if math.isnan(layer.membrane_error) else f"{layer.membrane_error:.2e}",
            )
            for layer in self.layers
        ]
        lines = [columns(("layer", "agree", "rate", "program", "membrane"), rows, left=1)]
        said = [f"{self.samples} samples: predictions agree on {self.predictions:.4%}"]
        if not math.isnan(self.accuracy_model):  # there were labels
            said.append(f"accuracy {self.accuracy_model:.4f} and {self.accuracy_program:.4f}")
        said.append(f"largest output difference {self.output_error:.3g}")
        lines.append(", ".join(said))
        if self.at_the_ends:
            lines.append(f"input codes at the ends of their range: {self.at_the_ends:.3%}")
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Share of equal spikes and both firing rates of every layer.

        Args:
            path: File to write (its suffix tells the format); nothing is written without it.

        Returns:
            The ``matplotlib.figure.Figure``, which belongs to no window.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        return figure("Comparison.plot", lambda axes: _plot(self, axes), (1, 2), (11, 4.5), path)


def _plot(comparison: Comparison, axes: Any) -> None:
    agreement, rates = axes
    places = range(len(comparison.layers))
    agreement.bar(places, [100 * layer.agreement for layer in comparison.layers])
    low = min((layer.agreement for layer in comparison.layers), default=1.0)
    agreement.set(ylabel="equal spikes (%)", ylim=(min(99.0, 100 * low - 1), 100))
    agreement.set_title(
        f"{comparison.samples} samples, {comparison.predictions:.2%} answered alike"
    )
    for shift, of, values in (
        (-0.2, "simulation", [layer.rate_model for layer in comparison.layers]),
        (0.2, "program", [layer.rate_program for layer in comparison.layers]),
    ):
        rates.bar([i + shift for i in places], values, 0.4, label=of)
    rates.set(ylabel="firing rate")
    rates.set_title("Firing rates")
    rates.legend()
    for axis in axes:
        name_bars(axis, [layer.name for layer in comparison.layers])


class _Recorder:
    """Collects the spikes of every neuron layer of a model, over all its calls."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        self.spikes: dict[str, list[Tensor]] = {}
        self.handles = [
            module.register_forward_hook(self._hook(name))
            for name, module in model.named_modules()
            if name in names
        ]

    def _hook(self, name: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            spikes = hosts.spikes(output)
            if isinstance(spikes, Tensor):
                self.spikes.setdefault(name, []).append(spikes.detach())

        return record

    def take(self) -> dict[str, list[Tensor]]:
        taken, self.spikes = self.spikes, {}
        return taken

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _first(x: Any) -> Any:
    """The first tensor of an answer."""
    while isinstance(x, tuple | list | dict):
        x = next(iter(x.values())) if isinstance(x, dict) else x[0]
    return x


def compare(
    model: nn.Module,
    program: Program,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    quantize_input: bool = False,
) -> Comparison:
    """Run a model and its program on the same data.

    Args:
        model: The model the program was lowered from; run in evaluation mode, its states are reset.
        program: The program.
        batches: Inputs, or pairs of inputs and labels.
        forward: ``forward(model, x)`` runs one batch over all its time steps and returns the
            answer, or a list of the answers of all steps, for models that are called in another
            way than ``model(x)``. A model that takes one step at a time is given ``[T, N, ...]``
            step by step.
        quantize_input: Give the model the rounded input of the program, to see what remains.

    Returns:
        Agreement per layer and of the predictions.

    Raises:
        StateError: If there are no batches.
        InputError: If the model and its program give answers of different shapes, or the labels
            are not one a sample.
        InputTypeError: If ``model`` is not a module, ``program`` none, ``batches`` a tensor, or an
            input none.
    """
    model = check_model(model, "compare")
    deployed = DeployedModel(checks.program(program, "compare"), "auto")
    check_batches(batches)
    names = {n.name for n in program.neurons}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    recorder = _Recorder(model, names)
    counts: dict[str, np.ndarray[Any, Any]] = {}
    errors: dict[str, list[float]] = {}
    same = right_model = right_program = samples = clipped = values = 0
    labelled = False
    worst = 0.0
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
    try:
        with tracking(batches, "compare") as shown_batches:
            for batch in shown_batches:
                x, y = batch if isinstance(batch, tuple | list) else (batch, None)
                if not isinstance(x, Tensor):
                    raise InputTypeError(
                        f"compare: the input of a batch is a {type(x).__name__}; give tensors, or "
                        "pairs of a tensor and labels"
                    )
                codes = deployed.codes(x)
                clipped += int(np.isin(codes, program.input_range).sum())
                values += codes.size
                if quantize_input:
                    x = torch.from_numpy(deployed.inputs(codes)).to(torch.float32)
                hosts.reset(model)
                run = forward
                steps = x.dim() == len(deployed.input_shape) + 2
                if run is None and steps and program.metadata.get("time") == "step":
                    run = _step_by_step
                with torch.no_grad():
                    shown = x.to(like.device, like.dtype)
                    result = run(model, shown) if run is not None else model(shown)
                if run is not None and isinstance(result, tuple | list):
                    result = torch.stack([_first(step) for step in result])
                expected = _first(result).double().cpu().numpy()
                recorded = recorder.take()
                got = np.asarray(_first(deployed(x)))
                if got.shape != expected.shape:
                    raise InputError(
                        f"the model answers with shape {expected.shape}, its program with "
                        f"{got.shape}; "
                        "a model that is called in another way than model(x) needs forward="
                    )
                worst = max(worst, float(np.abs(expected - got).max()))
                states = _layers(program, codes, recorded, counts)
                _membranes(model, program, states, errors)
                a, b = (_predicted(v, codes.shape[-4]) for v in (expected, got))
                same += int(_agree(a, b).sum())
                samples += len(a)
                if y is not None:
                    labelled = True
                    labels = np.asarray(y)
                    if labels.shape != a.shape:
                        raise InputError(
                            f"labels of shape {labels.shape} for {len(a)} samples; give the index "
                            "of the right class for each"
                        )
                    right_model += int((a == labels).sum())
                    right_program += int((b == labels).sum())
    finally:
        recorder.close()
        hosts.reset(model)
        for module, training in modes.items():  # parts may be frozen in evaluation mode
            module.training = training
    if not samples:
        raise StateError("compare() was given no batches")
    layers = [
        LayerAgreement(
            name, int(c[0]), float(c[1] / c[0]), float(c[2] / c[0]), float(c[3] / c[0]),
            float(np.mean(errors.get(name, [float("nan")]))),
        )
        for name, c in counts.items()
    ]  # fmt: skip
    nan = float("nan")
    return Comparison(
        layers, samples, same / samples, right_model / samples if labelled else nan,
        right_program / samples if labelled else nan, worst, clipped / values,
    )  # fmt: skip


def _step_by_step(model: nn.Module, x: Tensor) -> list[Any]:
    return [model(step) for step in x]


def _predicted(answer: np.ndarray[Any, Any], batch: int) -> np.ndarray[Any, Any]:
    """The class of every sample, from an answer ``[N, ...]``, ``[T, N, ...]`` or of classes."""
    if (answer.ndim > 1 and answer.shape[0] != batch) or answer.ndim in (3, 5):
        answer = answer.mean(axis=1 if answer.shape[0] == batch != answer.shape[1] else 0)
    flat = answer.reshape(batch, -1)
    return flat[:, 0] if flat.shape[1] == 1 else flat.argmax(axis=1)


def _agree(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Which samples have the same class, or nearly the same number."""
    if a.dtype.kind == "f":
        close: np.ndarray[Any, Any] = np.abs(a - b) <= 1e-3 * max(float(np.abs(a).max()), 1e-12)
        return close
    return np.asarray(a == b)


def _steps(program: Program, codes: IntArray) -> list[IntArray]:
    return [codes] * program.timesteps if codes.ndim == 4 else list(codes)


def _layers(
    program: Program,
    codes: IntArray,
    recorded: dict[str, list[Tensor]],
    counts: dict[str, np.ndarray[Any, Any]],
) -> dict[str, IntArray]:
    """Add spikes, agreements and rates of one batch to ``counts``; return the last states."""
    steps = _steps(program, codes)
    session = ReferenceSession(program, steps[0].shape[0])
    ours: dict[str, list[IntArray]] = {}
    for step in steps:
        session.step(step)
        for n in program.neurons:
            ours.setdefault(n.name, []).append(session.trace[n.target])
    for name, spikes in ours.items():
        if name not in recorded:
            continue
        mine = np.stack([as_the_model(program, name, s) for s in spikes])
        theirs = np.concatenate([t.reshape(-1).float().numpy(force=True) for t in recorded[name]])
        flat = mine.reshape(-1)
        if theirs.size != flat.size or not np.isin(theirs, (0, 1)).all():  # a read-out
            continue
        total = counts.setdefault(name, np.zeros(4))
        total += [flat.size, (theirs == flat).sum(), theirs.sum(), flat.sum()]
    return session.state()


def _membranes(
    model: nn.Module,
    program: Program,
    states: dict[str, IntArray],
    errors: dict[str, list[float]],
) -> None:
    """Difference of the last membrane potentials, where both sides keep k-bit codes of them."""
    modules = dict(model.named_modules())
    for n in program.neurons:
        described = hosts.describe(modules[n.name]) if n.name in modules else None
        if described is None or described.passed or n.order != "fire_first":
            continue  # a potential that calls hand on need not be what the neuron keeps
        quantizer = described.quantizer
        potential = getattr(modules[n.name], described.potential or "", None)
        if quantizer is None or not isinstance(potential, Tensor):
            continue
        word = states[n.name].astype(np.int64) & (2**n.bits - 1)
        code = np.where(word >= 2 ** (n.bits - 1), word - 2**n.bits, word)
        code = as_the_model(program, n.name, code)
        value = code * (max(float(quantizer.alpha.detach()), 0.0) / n.levels)
        theirs = potential.detach().float().cpu().numpy()
        if theirs.size == value.size:
            errors.setdefault(n.name, []).append(
                float(np.abs(value.reshape(-1) - theirs.reshape(-1)).mean())
            )


def as_the_model(program: Program, neuron: str, x: IntArray) -> IntArray:
    """A neuron's values ``[N, C, H, W]`` in the order in which the model holds them, flat.

    A model may keep its tensors in another order than a program (tokens before channels, say);
    ``metadata["views"]`` then holds the loops over the program's elements, outermost first.
    """
    views = json.loads(program.metadata.get("views", "{}"))
    if neuron not in views:
        return x.reshape(x.shape[0], -1)
    place = np.zeros(1, np.int64)
    for size, stride in views[neuron]:
        place = np.add.outer(place, np.arange(size) * stride).reshape(-1)
    flat: IntArray = x.reshape(x.shape[0], -1)[:, place]
    return flat
