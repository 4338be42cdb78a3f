"""What a network is and what it costs: one real forward pass, measured layer by layer."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd

from qsnn_ext import functional as F
from qsnn_ext import hosts
from qsnn_ext.energy import OPERATIONS, EnergyTable, operation
from qsnn_ext.errors import InputError, InputTypeError
from qsnn_ext.footprint import (
    LayerBytes,
    layer_footprint,
    membrane_quantizer_of,
    rows_of,
    weight_bits,
)
from qsnn_ext.layers import QuantizedWeight, is_synaptic
from qsnn_ext.membranes import Membrane
from qsnn_ext.plotting import figure, name_bars
from qsnn_ext.progress import working
from qsnn_ext.quantizers import BinaryWeight, MembraneQuantizer
from qsnn_ext.text import columns, html_table, printable
from qsnn_ext.trace import call, check_model, untouched, watching


@dataclass(frozen=True)
class LayerSummary:
    """One layer, or the whole network. What does not apply to it is ``None``.

    Attributes:
        name: module name.
        kind: class name.
        weight_bits: bits of one weight.
        membrane_bits: bits of one membrane potential.
        parameters: number of parameters.
        bytes_now: parameters, buffers and the sample's membrane potentials as they lie in memory
            while training (latent float weights).
        bytes_logical: parameters and membrane potentials at their bits.
        bytes_packed: the same with scale factors and the padding of packed words, batch norm
            folded (:func:`qsnn_ext.footprint`, resident accounting).
        calls: how often the layer ran in the pass.
        firing_rate: p_s, the share of outputs that are not zero, over neurons, samples and steps.
        spike_entropy: Eq. 14 of ``firing_rate``, nats.
        sign_probability: p_w, the share of weights whose sign is +1.
        weight_entropy: Eq. 14 of ``sign_probability``, nats.
        rounded_to_zero: share of membrane potentials whose code is 0.
        clipped: share of membrane potentials beyond the largest level.
        input_rate: share of inputs that are not zero.
        input_spikes: whether the inputs were binary in every call.
        operations: synaptic operations of the pass by kind (:mod:`qsnn_ext.energy`), batch and
            time steps included.
        picojoules: their energy.
    """

    name: str
    kind: str
    weight_bits: int | None
    membrane_bits: int | None
    parameters: int
    bytes_now: int
    bytes_logical: float
    bytes_packed: float
    calls: int
    firing_rate: float | None
    spike_entropy: float | None
    sign_probability: float | None
    weight_entropy: float | None
    rounded_to_zero: float | None
    clipped: float | None
    input_rate: float | None
    input_spikes: bool | None
    operations: Mapping[str, int]
    picojoules: float


@dataclass(frozen=True)
class Summary:
    """What :func:`summarize` measured; ``str()`` gives a table.

    Attributes:
        layers: in running order; layers that did not run come last.
        total: the whole network. Rates and shares are over all neurons or weights together, and
            its entropies are those of these rates.
        energy: costs of the operations.
        training: whether the pass ran in training mode.
        uncounted: layers with weights whose operations are not counted.
    """

    layers: tuple[LayerSummary, ...]
    total: LayerSummary
    energy: EnergyTable
    training: bool
    uncounted: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""
        return {
            "training": self.training,
            "energy": asdict(self.energy),
            "uncounted": list(self.uncounted),
            "total": asdict(self.total),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def to_csv(self, path: str | PathLike[str] | None = None) -> str:
        """One line per layer and one for the total; the operations have a column per kind.

        Args:
            path: file to write; nothing is written without it.

        Returns:
            The text.
        """
        plain = [item.name for item in fields(LayerSummary) if item.name != "operations"]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, [*plain, *OPERATIONS], lineterminator="\n")
        writer.writeheader()
        for layer in (*self.layers, self.total):
            values = asdict(layer)
            operations = {kind: layer.operations.get(kind, 0) for kind in OPERATIONS}
            writer.writerow({**{name: values[name] for name in plain}, **operations})
        if path is not None:
            Path(path).write_text(text.getvalue(), encoding="utf-8")
        return text.getvalue()

    def __str__(self) -> str:
        """The table, with the costs used beneath it."""
        return "\n".join([columns(list(_COLUMNS), self._rows()), *self._notes()])

    def _repr_html_(self) -> str:
        """The same for a notebook, whose lines would wrap the table."""
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self._notes())
        return f"{html_table(list(_COLUMNS), self._rows())}<ul>{notes}</ul>"

    def _rows(self) -> list[tuple[str, ...]]:
        return [_row(layer) for layer in (*self.layers, self.total)]

    def _notes(self) -> list[str]:
        counts = [
            f"{_short(count)} {kind} ({getattr(self.energy, kind)} pJ)"
            for kind, count in self.total.operations.items()
        ]
        lines = [
            "bytes: now = latent weights, buffers and membrane potentials as held in training; "
            "logical = at their bits; packed = with padding and scale factors",
            "p_s firing rate, p_w share of positive weights, H their entropy in nats; "
            "zero, clip: share of membrane potentials rounded to 0, clipped",
            f"one pass in {'training' if self.training else 'evaluation'} mode: "
            + (", ".join(counts) or "no synaptic operation counted"),
        ]
        if self.total.operations:
            lines.append(
                "counted: every tap of a kernel, also on padding and zero weights, of the whole "
                "batch (NeuroBench's effective counts leave both out, per sample)"
            )
        lines.append(
            f"energy {_short(self.total.picojoules * 1e-12, 'J')}, arithmetic only "
            f"({self.energy.source})"
        )
        if self.uncounted:
            lines.append(
                f"operations are not counted in: {', '.join(map(printable, self.uncounted))}"
            )
        return lines

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Rates, membrane shares, bytes and energy of every layer.

        Args:
            path: file to write (its suffix tells the format); nothing is written without it.

        Returns:
            The ``matplotlib.figure.Figure``, which belongs to no window.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return figure("Summary.plot", lambda axes: _plot(self, axes), (2, 2), (13, 9), path)


# --------------------------------------------------------------------------- measuring


@dataclass
class _Tally:
    """What the pass has seen of one layer."""

    calls: int = 0
    membrane: Membrane | None = None
    # Sums stay on the device until the pass is over.
    spikes: Tensor | int = 0
    outputs: int = 0
    zeros: Tensor | int = 0
    clipped: Tensor | int = 0
    potentials: int = 0
    active: Tensor | int = 0
    inputs: int = 0
    #: Per call: kind of input (binary or not), its rate, and the operations of a dense input.
    meetings: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

    def fired(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        spikes = hosts.spikes(output)
        if isinstance(spikes, Tensor):
            self.spikes = self.spikes + torch.count_nonzero(spikes)
            self.outputs += spikes.numel()
        assert self.membrane is not None
        self.membrane.observe(module, args, kwargs, output)

    def rounded(self, quantizer: MembraneQuantizer, v: Tensor) -> None:
        """The quantizer is about to round ``v``, the (squashed) potentials of one time step."""
        alpha = quantizer.alpha_for(v)
        codes, _ = F.symmetric_codes(v, alpha, quantizer.bits)
        self.zeros = self.zeros + torch.count_nonzero(codes == 0)
        # A scale of 0 or below makes every state 0 and clips nothing.
        self.clipped = self.clipped + torch.count_nonzero((v.abs() > alpha) & (alpha > 0))
        self.potentials += v.numel()

    def met(self, module: nn.Module, x: Any, output: Any) -> None:
        """A layer of synapses was given ``x``."""
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)) or x.numel() == 0:
            return
        active = torch.count_nonzero(x)
        self.active = self.active + active
        self.inputs += x.numel()
        magnitude = x.abs()
        binary = ((x == 0) | (magnitude == magnitude.amax())).all()
        weight = module.weight
        assert isinstance(weight, Tensor)
        # Transposed convolutions spread each input; the others gather for each output.
        per = x.numel() if isinstance(module, _ConvTransposeNd) else output.numel()
        dense = per * weight[0].numel()
        self.meetings.append((binary, active / x.numel(), dense))

    def operations(self, bits: int | None) -> dict[str, int]:
        """Operations by kind: all of a dense input's, or with spikes the share that is active."""
        counts: dict[str, float] = {}
        for binary, rate, dense in self.meetings:
            spikes = bool(binary)
            kind = operation(bits, spikes)
            counts[kind] = counts.get(kind, 0.0) + (dense * rate.item() if spikes else dense)
        return {kind: round(count) for kind, count in counts.items()}


def summarize(
    model: nn.Module,
    sample: Any,
    *,
    energy: EnergyTable | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
) -> Summary:
    """Bits, bytes, rates, entropies, operations and energy of every layer, by one forward pass.

    The pass starts from reset membrane potentials, runs in the mode the model is in (training or
    evaluation), without gradients, and leaves the model as it was: parameters, buffers, membrane
    potentials, frozen scales, hooks and random generators.

    Operations are those of convolutions and linear layers. A layer whose inputs are binary (zero,
    or one common magnitude) in a call does ``input rate * dense`` operations in it, where
    ``dense`` is what a dense input takes; any other input takes all of them. Products of two
    activations, as in attention, are not seen.

    Args:
        model: SpikingJelly or snnTorch network, quantized or not, built or converted.
        sample: its input: a tensor, a tuple or list of positional arguments, or a dictionary of
            keyword arguments.
        energy: costs of the operations.
        forward: ``forward(model, sample)`` for models that are called in another way, for example
            ``lambda model, x: [model(x_t) for x_t in x]`` for one call per time step.

    Raises:
        InputTypeError: ``model`` is not a module, or ``energy`` not an :class:`EnergyTable`.
        InputError: a lazy layer has no weights yet.
        StateError: a frozen membrane scale has no value yet and the model is in evaluation mode.
    """
    model = check_model(model, "summarize")
    energy = EnergyTable() if energy is None else energy
    if not isinstance(energy, EnergyTable):
        raise InputTypeError(f"energy must be an EnergyTable, got {type(energy).__name__}.")
    modules = rows_of(model)
    with working("summarize"):
        ran = _measure(model, modules, sample, forward)
    counter = LayerBytes()
    parameters = {name: counter.parameters(module) for name, module in modules.items()}
    signs = {name: _positive(module, parameters[name]) for name, module in modules.items()}
    layers = {
        name: _summary(
            name, module, ran.get(name, _Tally()), parameters[name], signs[name], counter, energy
        )
        for name, module in modules.items()
    }
    order = [*ran, *(name for name in modules if name not in ran)]
    return Summary(
        layers=tuple(layers[name] for name in order),
        total=_total(model, list(ran.values()), list(signs.values()), [*layers.values()], energy),
        energy=energy,
        training=model.training,
        uncounted=tuple(name for name in order if _has_uncounted(modules[name])),
    )


def _has_uncounted(module: nn.Module) -> bool:
    if is_synaptic(module) or isinstance(module, (_NormBase, nn.Embedding)):
        return False
    return any(p is not None and p.dim() > 1 for p in module._parameters.values())


def _measure(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sample: Any,
    forward: Callable[[nn.Module, Any], Any] | None,
) -> dict[str, _Tally]:
    """Tallies of the layers that ran, in running order."""
    ran: dict[str, _Tally] = {}

    def watch(name: str, module: nn.Module) -> Callable[..., None] | None:
        if modules.get(name) is not module:
            return None
        spiking = hosts.adapter_of(module) is not None

        def after(
            called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            tally = ran.setdefault(name, tallies[name])
            tally.calls += 1
            if spiking:
                tally.fired(module, args, kwargs, output)
            elif is_synaptic(module):
                tally.met(module, args[0] if args else next(iter(kwargs.values()), None), output)

        return after

    tallies = {name: _Tally() for name in modules}
    with untouched(model):
        for name, module in modules.items():
            if hosts.adapter_of(module) is not None:
                tallies[name].membrane = Membrane()
            quantizer = membrane_quantizer_of(module)
            if quantizer is not None:
                _listen(quantizer, tallies[name])
        with watching(model, watch):
            call(model, sample, forward)
    return ran


def _listen(quantizer: MembraneQuantizer, tally: _Tally) -> None:
    theirs = quantizer.observer

    def observe(v: Tensor) -> None:
        tally.rounded(quantizer, v)
        if theirs is not None:
            theirs(v)

    # Taken away again with everything else that the pass changes.
    quantizer.observer = observe


def _positive(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> tuple[int, int]:
    """How many weights have sign +1, with sign(0) = +1 (Eq. 6), and how many there are."""
    weight = parameters.get("weight")
    if weight is None or weight.dim() < 2:
        return 0, 0
    if isinstance(module, QuantizedWeight) and isinstance(module.quantizer, BinaryWeight):
        with torch.no_grad():
            # The signs it computes with, not the latent weights': standardising moves them.
            try:
                codes, _ = module.codes()
            except InputError:  # NaN has no sign
                return 0, 0
            return int(torch.count_nonzero(codes > 0)), weight.numel()
    return int(torch.count_nonzero(weight >= 0)), weight.numel()


def _share(part: Tensor | int, whole: int) -> float | None:
    return int(part) / whole if whole else None


def _entropy(p: float | None) -> float | None:
    # Adding 0 turns the -0.0 of a certain outcome into 0.0.
    return None if p is None else F.entropy(torch.tensor(p, dtype=torch.float64)).item() + 0.0


def _bits(module: nn.Module) -> int | None:
    """Bits of the weights for the kind of operation; ``None`` in floating point."""
    return module.bits if isinstance(module, QuantizedWeight) else None


def _summary(
    name: str,
    module: nn.Module,
    tally: _Tally,
    parameters: Mapping[str, nn.Parameter],
    signs: tuple[int, int],
    counter: LayerBytes,
    energy: EnergyTable,
) -> LayerSummary:
    persistent = counter.buffers(module, persistent=True)
    transient = counter.buffers(module)
    constants = sum(b.numel() * b.element_size() for b in persistent)
    now = constants + sum(b.numel() * b.element_size() for b in transient)
    now += sum(p.numel() * p.element_size() for p in parameters.values())
    membrane = tally.membrane if tally.calls else None
    if membrane is not None:
        now += membrane.elements * membrane.itemsize
    logical = layer_footprint(name, module, parameters, constants, membrane, "paper")
    packed = layer_footprint(name, module, parameters, constants, membrane, "resident")
    rate = _share(tally.spikes, tally.outputs)
    positive = _share(*signs)
    operations = tally.operations(_bits(module))
    quantizer = membrane_quantizer_of(module)
    return LayerSummary(
        name=logical.name,
        kind=logical.kind,
        weight_bits=weight_bits(module),
        # A neuron that never ran has not shown its precision, unless it has a quantizer.
        membrane_bits=logical.membrane_bits if quantizer is None else quantizer.bits,
        parameters=sum(p.numel() for p in parameters.values()),
        bytes_now=now,
        bytes_logical=logical.weights + logical.others + logical.membrane,
        bytes_packed=packed.weights + packed.scales + packed.others + packed.membrane,
        calls=tally.calls,
        firing_rate=rate,
        spike_entropy=_entropy(rate),
        sign_probability=positive,
        weight_entropy=_entropy(positive),
        rounded_to_zero=_share(tally.zeros, tally.potentials),
        clipped=_share(tally.clipped, tally.potentials),
        input_rate=_share(tally.active, tally.inputs),
        input_spikes=all(bool(m[0]) for m in tally.meetings) if tally.meetings else None,
        operations=operations,
        picojoules=energy.picojoules(operations),
    )


def _total(
    model: nn.Module,
    tallies: list[_Tally],
    signs: list[tuple[int, int]],
    layers: list[LayerSummary],
    energy: EnergyTable,
) -> LayerSummary:
    operations = {
        kind: count
        for kind in OPERATIONS
        if (count := sum(layer.operations.get(kind, 0) for layer in layers))
    }
    rate = _share(sum(int(t.spikes) for t in tallies), sum(t.outputs for t in tallies))
    positive = _share(sum(s[0] for s in signs), sum(s[1] for s in signs))
    potentials = sum(t.potentials for t in tallies)
    return LayerSummary(
        name="total",
        kind=type(model).__name__,
        weight_bits=None,
        membrane_bits=None,
        parameters=sum(layer.parameters for layer in layers),
        bytes_now=sum(layer.bytes_now for layer in layers),
        bytes_logical=sum(layer.bytes_logical for layer in layers),
        bytes_packed=sum(layer.bytes_packed for layer in layers),
        calls=1,
        firing_rate=rate,
        spike_entropy=_entropy(rate),
        sign_probability=positive,
        weight_entropy=_entropy(positive),
        rounded_to_zero=_share(sum(int(t.zeros) for t in tallies), potentials),
        clipped=_share(sum(int(t.clipped) for t in tallies), potentials),
        input_rate=_share(sum(int(t.active) for t in tallies), sum(t.inputs for t in tallies)),
        input_spikes=None,
        operations=operations,
        picojoules=energy.picojoules(operations),
    )


# --------------------------------------------------------------------------- printing

_COLUMNS = (
    "layer", "kind", "w", "u", "params", "now", "logical", "packed",
    "p_s", "H(p_s)", "p_w", "H(p_w)", "zero", "clip", "operations", "energy",
)  # fmt: skip


def _short(value: float, unit: str = "") -> str:
    """A number to three digits with an SI prefix: 12.6M, 831 nJ."""
    gap = " " if unit else ""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)) if not unit else (
        ("", 1.0), ("m", 1e-3), ("µ", 1e-6), ("n", 1e-9), ("p", 1e-12),
    ):  # fmt: skip
        if abs(value) >= size:
            return f"{value / size:.3g}{gap}{prefix}{unit}"
    return f"{value:.3g}{gap}{unit}"


def _optional(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


def _row(layer: LayerSummary) -> tuple[str, ...]:
    operations = " + ".join(f"{_short(n)} {kind}" for kind, n in layer.operations.items())
    return (
        layer.name,
        layer.kind,
        _optional(layer.weight_bits, "d"),
        _optional(layer.membrane_bits, "d"),
        f"{layer.parameters:,}",
        _short(layer.bytes_now),
        _short(layer.bytes_logical),
        _short(layer.bytes_packed),
        _optional(layer.firing_rate),
        _optional(layer.spike_entropy),
        _optional(layer.sign_probability),
        _optional(layer.weight_entropy),
        _optional(layer.rounded_to_zero),
        _optional(layer.clipped),
        operations or "-",
        _short(layer.picojoules * 1e-12, "J") if layer.operations else "-",
    )


def _plot(summary: Summary, axes: Any) -> None:
    rates, shares, memory, energy = axes.flat
    neurons = [layer for layer in summary.layers if layer.firing_rate is not None]
    weights = [layer for layer in summary.layers if layer.sign_probability is not None]

    p_s = [layer.firing_rate for layer in neurons]
    p_w = [layer.sign_probability for layer in weights]
    rates.plot(range(1, len(p_s) + 1), p_s, "o-", label="firing rate p_s of neurons")
    rates.plot(range(1, len(p_w) + 1), p_w, "s-", label="sign probability p_w of weights")
    entropies = [layer.spike_entropy for layer in neurons]
    rates.plot(range(1, len(p_s) + 1), entropies, "o:", color="C0", label="its entropy (nats)")
    rates.axhline(0.5, color="gray", linewidth=1, linestyle=":", label="greatest entropy")
    rates.set(ylim=(0, 1), ylabel="probability", xlabel="n-th layer of its kind, in running order")
    rates.locator_params(axis="x", integer=True)
    rates.set_title("Spikes and weights")

    quantized = [layer for layer in neurons if layer.rounded_to_zero is not None]
    places = range(len(quantized))
    shares.bar(
        [i - 0.2 for i in places], [n.rounded_to_zero for n in quantized], 0.4, label="code is 0"
    )
    shares.bar([i + 0.2 for i in places], [n.clipped for n in quantized], 0.4, label="clipped")
    shares.set(ylim=(0, 1), ylabel="share of membrane potentials")
    shares.set_title("Membrane potentials" if quantized else "Membrane potentials: none quantized")
    name_bars(shares, [layer.name for layer in quantized])

    groups = {
        "weights and the rest": [n for n in summary.layers if n.membrane_bits is None],
        "neurons": [n for n in summary.layers if n.membrane_bits is not None],
        "total": [summary.total],
    }
    for place, attribute in enumerate(("now", "packed", "logical")):
        sizes = [
            sum(getattr(n, f"bytes_{attribute}") for n in layers) / 1e6
            for layers in groups.values()
        ]
        at = [i + 0.28 * (place - 1) for i in range(len(groups))]
        memory.bar_label(memory.bar(at, sizes, 0.26, label=attribute), fmt="%.3g", fontsize=8)
    memory.set_xticks(range(len(groups)), list(groups))
    memory.set(ylabel="MB (10^6 bytes)")
    memory.set_title("Memory for this sample")

    working = [layer for layer in summary.layers if layer.operations]
    floor = [0.0] * len(working)
    for kind in OPERATIONS:
        cost = [n.operations.get(kind, 0) * getattr(summary.energy, kind) / 1e3 for n in working]
        if any(cost):
            energy.bar(range(len(working)), cost, bottom=floor, label=kind)
            floor = [a + b for a, b in zip(floor, cost, strict=True)]
    energy.set(ylabel="nJ")
    energy.set_title(f"Energy of arithmetic: {_short(summary.total.picojoules * 1e-12, 'J')}")
    name_bars(energy, [layer.name for layer in working])
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
