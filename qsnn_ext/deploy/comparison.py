"""How well a program agrees with the float simulation of the model it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qsnn_ext import hosts
from qsnn_ext.deploy.model import DeployedModel
from qsnn_ext.deploy.program import IntArray, Program
from qsnn_ext.deploy.reference import ReferenceSession
from qsnn_ext.errors import StateError


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
        predictions: Share of samples with the same predicted class (mean over time steps).
        accuracy_model, accuracy_program: Share of right predictions, or NaN without labels.
        output_error: Largest absolute difference of the outputs.
    """

    layers: list[LayerAgreement]
    samples: int
    predictions: float
    accuracy_model: float
    accuracy_program: float
    output_error: float

    def __str__(self) -> str:
        lines = [f"{'layer':<40} {'agree':>9} {'rate':>7} {'program':>7} {'membrane':>9}"]
        for a in self.layers:
            lines.append(
                f"{a.name[-40:]:<40} {a.agreement:>9.5f} {a.rate_model:>7.4f} "
                f"{a.rate_program:>7.4f} {a.membrane_error:>9.2e}"
            )
        lines.append(
            f"{self.samples} samples: predictions agree on {self.predictions:.4%}, accuracy "
            f"{self.accuracy_model:.4f} and {self.accuracy_program:.4f}, largest output "
            f"difference {self.output_error:.3g}"
        )
        return "\n".join(lines)


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
            self.spikes.setdefault(name, []).append(hosts.spikes(output).detach())

        return record

    def take(self) -> dict[str, list[Tensor]]:
        taken, self.spikes = self.spikes, {}
        return taken

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def _first(x: Any) -> Any:
    return x[0] if isinstance(x, tuple) else x


def compare(
    model: nn.Module,
    program: Program,
    batches: Iterable[Any],
    *,
    quantize_input: bool = False,
) -> Comparison:
    """Run a model and its program on the same data.

    Args:
        model: The model the program was lowered from; run in evaluation mode, its states are reset.
        program: The program.
        batches: Inputs, or pairs of inputs and labels.
        quantize_input: Give the model the rounded input of the program, to see what remains.

    Returns:
        Agreement per layer and of the predictions.

    Raises:
        StateError: If there are no batches.
    """
    deployed = DeployedModel(program, "auto")
    names = {n.name for n in program.neurons}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    recorder = _Recorder(model, names)
    counts: dict[str, np.ndarray[Any, Any]] = {}
    errors: dict[str, list[float]] = {}
    same = right_model = right_program = samples = 0
    labelled = False
    worst = 0.0
    device = next(model.parameters()).device
    try:
        for batch in batches:
            x, y = batch if isinstance(batch, tuple | list) else (batch, None)
            codes = deployed.codes(x)
            if quantize_input:
                rounded = torch.from_numpy(codes * program.input_scale).to(torch.float32)
                x = rounded.reshape(x.shape)
            hosts.reset(model)
            with torch.no_grad():
                expected = _first(model(x.to(device))).float().cpu().numpy()
            recorded = recorder.take()
            got = np.asarray(_first(deployed(x)))
            worst = max(worst, float(np.abs(expected - got).max()))
            states = _layers(program, codes, recorded, counts)
            _membranes(model, program, states, errors)
            time = got.ndim - (2 if deployed.output_ranks[0] == 1 else 4)
            a, b = (v.mean(axis=0) if time > 0 else v for v in (expected, got))
            a, b = (v.reshape(v.shape[0], -1).argmax(axis=1) for v in (a, b))
            same += int((a == b).sum())
            samples += len(a)
            if y is not None:
                labelled = True
                labels = np.asarray(y)
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
        right_program / samples if labelled else nan, worst,
    )  # fmt: skip


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
        mine = np.stack(spikes)
        theirs = np.concatenate([t.reshape(-1).numpy(force=True) for t in recorded[name]])
        flat = mine.reshape(-1)
        if theirs.size != flat.size:
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
        module: Any = modules.get(n.name)
        quantizer = getattr(module, "membrane", None)
        potential = getattr(module, "v", None)
        if quantizer is None or not isinstance(potential, Tensor) or n.order != "fire_first":
            continue
        word = states[n.name].astype(np.int64) & (2**n.bits - 1)
        code = np.where(word >= 2 ** (n.bits - 1), word - 2**n.bits, word)
        value = code * (max(float(quantizer.alpha), 0.0) / n.levels)
        theirs = potential.detach().cpu().numpy()
        if theirs.size == value.size:
            errors.setdefault(n.name, []).append(
                float(np.abs(value.reshape(-1) - theirs.reshape(-1)).mean())
            )
