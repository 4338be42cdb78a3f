"""What becomes of one float model: converted, trained, saved, deployed, each looked at.

Shares and counts are taken here from the modules themselves, not from the report of the
conversion, so that the report can be held against them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import snntorch as snn
import torch
from spikingjelly.activation_based import base, functional, layer, neuron, rnn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from qsnn_ext import ConversionReport, calibrate, deploy, quantize_, summarize
from qsnn_ext.errors import ConversionError, QSNNError
from qsnn_ext.layers import QuantizedWeight, is_synaptic

#: How a model is run on an input, from reset states.
Forward = Callable[[nn.Module, Any], Any]

#: What carries a state from one time step to the next.
NEURONS = (
    neuron.BaseNode,
    neuron.SimpleBaseNode,
    neuron.NonSpikingBaseNode,
    rnn.SpikingRNNCellBase,
    layer.SynapseFilter,
    snn.SpikingNeuron,
)

#: Weights of batch norm and the like, biases and the constants of neurons are no synapses.
Shares = dict[str, float]


@dataclass
class Findings:
    """What was found of one model.

    Attributes:
        parameters: all of them.
        vectors: how many of these are biases, factors of norms, constants of neurons.
        weights: the others, by bits: ``"1"``, ``"8"``, ``"float"``.
        float_weights: parameters that hold synapses and stay in floating point.
        operations: shares of the synaptic operations of one sample, by bits.
        neurons: modules that carry a state.
        quantized: how many of these carry it quantized.
        float_neurons: the others, by name, and the report's reason.
        reasons: why modules stayed in floating point, by number of modules.
        strict: empty if ``strict=True`` converts, else its message.
        checks: what must hold after conversion and training.
        deploys: empty if there is an integer program, else why not; ``None``: not tried.
        predictions: share of samples whose class is the same in the program.
        spikes: share of spikes that are; ``None`` where no neuron of the program is one layer's.
        rounded: the same share where the simulation, too, reads the input as rounded to codes.
        firing_rate: share of neurons and steps that fire, in the compared samples.
        error: the first thing that failed.
    """

    parameters: int = 0
    vectors: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    float_weights: list[str] = field(default_factory=list)
    operations: Shares = field(default_factory=dict)
    neurons: int = 0
    quantized: int = 0
    float_neurons: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)
    strict: str | None = None
    checks: dict[str, bool] = field(default_factory=dict)
    deploys: str | None = None
    predictions: float | None = None
    spikes: float | None = None
    rounded: float | None = None
    firing_rate: float | None = None
    error: str = ""

    @property
    def works(self) -> bool:
        """Converted, trained for two steps, and every check held."""
        return not self.error and all(self.checks.values())

    @property
    def float_share(self) -> float:
        """Share of the weights, vectors aside, that stays in floating point."""
        return self.weights.get("float", 0) / max(sum(self.weights.values()), 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


# --------------------------------------------------------------------------- stages


def convert(
    build: Callable[[], nn.Module],
    sample: Any,
    config: Any,
    forward: Forward | None = None,
    scratch: tuple[type[nn.Module], ...] = (),
    **options: Any,
) -> tuple[nn.Module, Findings]:
    """Build a model, quantize it, and count what became of its weights and neurons.

    Args:
        build: makes the float model.
        sample: what ``quantize_`` is given.
        config: likewise.
        forward: likewise.
        scratch: classes of the model that are neurons and extend none of a host.
        options: further arguments of ``quantize_``.

    Returns:
        The quantized model and the findings.
    """
    net = build()
    optimizer_keys = list(net.state_dict())
    found = Findings(parameters=sum(p.numel() for p in net.parameters()))
    states = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, (*NEURONS, *scratch))
    }
    parts = {id(module) for module in net.modules()}
    report = quantize_(net, config, sample=sample, forward=forward, **options)
    if parts != {id(module) for module in net.modules()}:  # neurons may have been replaced
        kept = {id(module) for module in net.modules()}
        states = {name: module for name, module in states.items() if id(module) in kept}
        states |= {n: m for n, m in net.named_modules() if isinstance(m, NEURONS)}
    found.weights = {"1": 0, "8": 0, "float": 0}
    for name, weight, bits in synapses(net):
        found.weights["float" if bits is None else str(bits)] += weight.numel()
        if bits is None:
            found.float_weights.append(name)
    found.vectors = found.parameters - sum(found.weights.values())
    found.neurons = len(states)
    for name in states:
        row = report[name]
        if row.membrane_bits is None:
            found.float_neurons[name] = f"{row.action}: {row.reason}"
        else:
            found.quantized += 1
    found.reasons = _reasons(report)
    found.checks["state_dict keys kept"] = list(net.state_dict()) == optimizer_keys
    found.checks["second run changes nothing"] = not quantize_(net, config).changed
    return net, found


def strict(
    build: Callable[[], nn.Module],
    sample: Any,
    config: Any,
    forward: Forward | None = None,
    **options: Any,
) -> str:
    """Empty if a strict conversion passes, else what it says."""
    try:
        quantize_(build(), config, sample, strict=True, forward=forward, **options)
    except ConversionError as error:
        return line(error)
    return ""


def operations(net: nn.Module, sample: Any, forward: Forward | None = None) -> Shares:
    """Shares of the synaptic operations of one pass, by bits of the weights."""
    counted = {"1": 0.0, "8": 0.0, "float": 0.0}
    for row in summarize(net, sample, forward=forward).layers:
        bits = str(row.weight_bits) if row.weight_bits in (1, 8) else "float"
        counted[bits] += sum(row.operations.values())
    total = sum(counted.values())
    return {bits: count / total if total else 0.0 for bits, count in counted.items()}


def train(
    net: nn.Module, sample: Any, forward: Forward | None = None, steps: int = 2
) -> dict[str, bool]:
    """Optimizer steps towards ones; whether outputs, gradients and parameters are as they must.

    Returns:
        Checks by name.
    """
    net.train()
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    layers = {n: m for n, m in net.named_modules() if isinstance(m, QuantizedWeight)}
    called: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in layers.items()
    ]
    for name, module in net.named_modules():  # it computes with its output layer, uncalled
        if isinstance(module, nn.MultiheadAttention):
            output = f"{name}.out_proj".lstrip(".")
            handles.append(module.register_forward_hook(lambda *_, n=output: called.add(n)))
    before = [_fingerprint(module) for module in layers.values()]
    finite = True
    for _ in range(steps):
        reset(net)
        optimizer.zero_grad()
        outputs = [y for y in tensors(run(net, sample, forward)) if y.requires_grad]
        finite &= all(bool(torch.isfinite(y).all()) for y in outputs)
        sum((y - 1).square().mean() for y in outputs).backward()  # type: ignore[union-attr]
        # Through a hundred untrained layers gradients grow without bound, in float too.
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    for handle in handles:
        handle.remove()
    reset(net)
    trained = {n: m for n, m in layers.items() if any(p.requires_grad for p in m.parameters())}
    weights = [
        p
        for m in trained.values()
        for n, p in m.named_parameters()
        if "weight" in n and p.requires_grad
    ]
    gradients = [p.grad for p in weights]
    after = [_fingerprint(module) for module in layers.values()]
    moved = dict(zip(layers, (a != b for a, b in zip(after, before, strict=True)), strict=True))
    return {
        "outputs finite": finite,
        "every quantized layer ran": called >= set(layers),
        "gradients finite": all(g is not None and bool(g.isfinite().all()) for g in gradients),
        "parameters trained": any(moved[name] for name in trained) or not trained,
    }


def round_trip(
    net: nn.Module,
    build: Callable[[], nn.Module],
    sample: Any,
    config: Any,
    forward: Forward | None = None,
    **options: Any,
) -> bool:
    """Whether the trained weights, in a model built and quantized anew, give the same outputs.

    Args:
        net: the trained model.
        build: makes a float one.
        sample: what is run.
        config: what ``net`` was quantized by.
        forward: how it is run.
        options: further arguments of ``quantize_``.
    """
    other = build()
    quantize_(other, config, sample=sample, forward=forward, **options)
    other.load_state_dict(copy.deepcopy(net.state_dict()), strict=True)
    outputs = []
    for model in (net, other):
        mode = model.training
        model.eval()
        reset(model)
        with torch.no_grad():
            outputs.append([y.clone() for y in tensors(run(model, sample, forward))])
        reset(model)
        model.train(mode)
    return all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def agreement(
    net: nn.Module, samples: Sequence[Any], forward: Forward | None = None
) -> dict[str, float | None]:
    """Calibrate, lower, and compare the program with the simulation.

    Returns:
        ``predictions``, ``spikes``, ``rounded`` and ``firing_rate`` of :class:`Findings`.

    Raises:
        QSNNError: calibration or lowering refuses the model.
    """
    settle(net, samples, forward)
    net.eval()
    reset(net)
    calibrate(net, [(x,) for x in samples], forward=_unpacked(forward))
    options = {} if forward is None else {"forward": forward}
    program = deploy.lower(net, samples[0], **options)
    report = deploy.compare(net, program, list(samples), **options)
    spikes = rounded = _share(report, "agreement")
    if spikes is not None and spikes < 1:
        given = deploy.compare(net, program, list(samples), quantize_input=True, **options)
        rounded = _share(given, "agreement")
    return {
        "predictions": report.predictions,
        "spikes": spikes,
        "rounded": rounded,
        "firing_rate": _share(report, "rate_model"),
    }


def _share(report: deploy.Comparison, what: str) -> float | None:
    """A share of the layers' spikes, over all layers; none where no layer has any."""
    total = sum(a.spikes for a in report.layers)
    return sum(a.spikes * getattr(a, what) for a in report.layers) / total if total else None


# --------------------------------------------------------------------------- parts


def synapses(net: nn.Module) -> Iterator[tuple[str, nn.Parameter, int | None]]:
    """Every parameter that holds synapses, once: its name, itself, its bits.

    These are the weights of convolutions and linear layers, and every other parameter with two or
    more axes that are longer than one, but for those of norms.
    """
    seen: set[int] = set()
    for path, module in net.named_modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen or isinstance(module, _NormBase):
                continue
            is_weight = is_synaptic(module) and name == "weight"
            if not is_weight and sum(size > 1 for size in p.shape) < 2:
                continue
            seen.add(id(p))
            bits = module.quantizer.bits if isinstance(module, QuantizedWeight) else None
            yield f"{path}.{name}".lstrip("."), p, bits


def run(net: nn.Module, sample: Any, forward: Forward | None = None) -> Any:
    """The model on a sample: a tuple is positional arguments."""
    if forward is not None:
        return forward(net, sample)
    return net(*sample) if isinstance(sample, tuple) else net(sample)


def tensors(output: Any) -> list[Tensor]:
    """Every floating point tensor in what a model returned."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [y for item in output for y in tensors(item)]
    return []


def reset(net: nn.Module) -> None:
    """As users of SpikingJelly do between batches; snnTorch's models do it in their forward."""
    if any(isinstance(module, base.MemoryModule) for module in net.modules()):
        functional.reset_net(net)


@torch.no_grad()
def settle(net: nn.Module, samples: Sequence[Any], forward: Forward | None = None) -> None:
    """Give batch norms the statistics of the samples, as training would have."""
    norms = [m for m in net.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    net.train()
    for x in samples:
        reset(net)
        run(net, x, forward)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def line(error: BaseException) -> str:
    """The first line of an error, with its class unless it is one of this package's."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, QSNNError) else f"{type(error).__name__}: {text}"


def _unpacked(forward: Forward | None) -> Forward:
    """``calibrate`` takes the first of a tuple for the input, and gives the whole batch."""
    return lambda net, batch: run(net, batch[0], forward)


def _reasons(report: ConversionReport) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in report.of("unsupported"):
        counts[row.reason] = counts.get(row.reason, 0) + 1
    return counts


def _fingerprint(module: nn.Module) -> list[float]:
    """Changes when the layer is trained; a copy of the largest models' weights would not fit.

    Biases count too: the deepest untrained OTTT networks send no spike to the last layer, whose
    weights then have no gradient, in floating point either.
    """
    return [p.detach().double().norm().item() for p in module.parameters()]
