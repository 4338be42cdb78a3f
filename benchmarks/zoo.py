"""Quantize every model of SpikingJelly's zoo and train it for two steps; write ``docs/zoo.md``.

    python -m benchmarks.zoo            # all models, some minutes; writes docs/zoo.md
    python -m benchmarks.zoo vgg sew    # only models whose name contains one of the words; prints

Inputs are small and batches hold two samples: what is shown is that conversion, forward, backward
and optimizer work, not accuracy.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import pkgutil
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import snntorch as snn
import torch
from snntorch import utils
from spikingjelly.activation_based import functional, model, neuron, surrogate
from spikingjelly.activation_based.model import (
    sew_resnet,
    spiking_resnet,
    spiking_vgg,
    spiking_vggws_ottt,
)
from torch import Tensor, nn

from qsnn_ext import ConversionReport, quantize_
from qsnn_ext.layers import QuantizedWeight

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
CONFIG = "1w-2u"


@dataclass
class Entry:
    """One model of the table.

    Attributes:
        name: of the constructor.
        family: module of the zoo, or ``snntorch``.
        build: makes the float model.
        sample: makes an input.
        run: one training pass from reset states to an output.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    sample: Callable[[], Tensor]
    run: Callable[[nn.Module, Tensor], Tensor]


@dataclass
class Outcome:
    """What became of one model."""

    name: str
    family: str
    report: ConversionReport | None = None
    error: str = ""
    seconds: float = 0.0
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Converted, trained for two steps, and every check held."""
        return not self.error and all(self.checks.values())

    def reasons(self) -> str:
        """Why modules stayed in floating point, each reason once."""
        assert self.report is not None
        counts: dict[str, int] = {}
        for row in self.report.of("unsupported"):
            counts[row.reason] = counts.get(row.reason, 0) + 1
        return "; ".join(f"{n} x {reason}" for reason, n in counts.items())


# --------------------------------------------------------------------------- SpikingJelly

_NEURON: dict[str, Any] = {"surrogate_function": surrogate.ATan(), "detach_reset": True}

#: Extra arguments and the input ``[T, N, C, H, W]``, by pattern over ``module.constructor``.
_SETTINGS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    (r"parametric_lif_net\.(Fashion)?MNISTNet", {"channels": 8}, (2, 2, 1, 28, 28)),
    (r"parametric_lif_net\.NMNISTNet", {"channels": 8}, (2, 2, 2, 34, 34)),
    (r"parametric_lif_net\.CIFAR10Net", {"channels": 8}, (2, 2, 3, 32, 32)),
    (r"parametric_lif_net\.", {"channels": 8}, (2, 2, 2, 128, 128)),
    (r"sew_resnet\.SEWResNet$", {"block": sew_resnet.BasicBlock, "layers": [1] * 4, "cnf": "ADD"},
     (2, 2, 3, 32, 32)),
    (r"sew_resnet\.", {"cnf": "ADD"}, (2, 2, 3, 32, 32)),
    (r"spiking_resnet\.SpikingResNet$", {"block": spiking_resnet.BasicBlock, "layers": [1] * 4},
     (2, 2, 3, 32, 32)),
    (r"spiking_vgg\.SpikingVGG$", {"cfg": spiking_vgg.cfgs["A"]}, (2, 2, 3, 32, 32)),
    (r"spiking_vggws_ottt\.(OTTTSpikingVGG|ottt_spiking_vggws)$",
     {"cfg": spiking_vggws_ottt.cfgs["A"]}, (2, 2, 3, 32, 32)),
    (r"masnn\.(MASNN|masnn)", {"T": 5}, (5, 2, 2, 32, 32)),
    (r"spikformer\.(Spikformer$|spikformer_s|spikformer_ti)",
     {"T": 2, "img_size_h": 32, "img_size_w": 32}, (2, 2, 3, 32, 32)),
    (r"former|transformer|masnn|ms_resnet", {"T": 2}, (2, 2, 3, 32, 32)),
    (r"", {}, (2, 2, 3, 32, 32)),
]  # fmt: skip


def _train_pass(net: nn.Module, x: Tensor) -> Tensor:
    functional.reset_net(net)
    out: Tensor = net(x)
    return out


def _online_pass(net: nn.Module, x: Tensor) -> Tensor:
    """OTTT networks run step by step; in training they pass ``[spike, trace]`` pairs along."""
    functional.reset_net(net)
    return torch.stack([net(step) for step in x])


def spikingjelly_entries() -> Iterator[Entry]:
    """Every public constructor of SpikingJelly's models that takes ``spiking_neuron``."""
    for info in pkgutil.iter_modules(model.__path__):
        module = importlib.import_module(f"{model.__name__}.{info.name}")
        for name in getattr(module, "__all__", ()):
            constructor = getattr(module, name)
            if "spiking_neuron" not in inspect.signature(constructor).parameters:
                continue
            path = f"{info.name}.{name}"
            arguments, shape = next(
                (kwargs, shape) for pattern, kwargs, shape in _SETTINGS if re.search(pattern, path)
            )
            online = info.name == "spiking_vggws_ottt"
            kind: Any = neuron.LIFNode
            if info.name == "parametric_lif_net":
                kind = neuron.ParametricLIFNode
            elif online:
                kind = neuron.OTTTLIFNode

            def build(
                constructor: Any = constructor,
                kind: Any = kind,
                arguments: dict[str, Any] = arguments,
                online: bool = online,
            ) -> nn.Module:
                net: nn.Module = constructor(spiking_neuron=kind, **arguments, **_NEURON)
                functional.set_step_mode(net, "s" if online else "m")
                return net

            yield Entry(
                name=name,
                family=info.name,
                build=build,
                # Strong enough that spikes reach the last layer of an untrained OTTT network.
                sample=lambda shape=shape, gain=10.0 if online else 1.0: gain * torch.rand(shape),
                run=_online_pass if online else _train_pass,
            )


# --------------------------------------------------------------------------- snnTorch


class Explicit(nn.Module):
    """A class that carries its membrane potentials by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.lif1 = snn.Leaky(beta=0.9, learn_beta=True)
        self.fc2 = nn.Linear(16, 16)
        self.lif2 = snn.Leaky(beta=0.8, reset_mechanism="zero")
        self.fc3 = nn.Linear(16, 4)
        self.readout = snn.Leaky(beta=0.95, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 12]`` to ``[T, N, 4]``."""
        mem1 = self.lif1.reset_mem()
        mem2 = self.lif2.reset_mem()
        mem3 = self.readout.reset_mem()
        out = []
        for step in x:
            spk1, mem1 = self.lif1(self.fc1(step), mem1)
            spk2, mem2 = self.lif2(self.fc2(spk1), mem2)
            _, mem3 = self.readout(self.fc3(spk2), mem3)
            out.append(mem3)
        return torch.stack(out)


class ResetMem(nn.Module):
    """``reset_mem()`` at the start, then calls without a membrane potential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.lif1 = snn.Leaky(beta=0.9)
        self.fc2 = nn.Linear(16, 4)
        self.lif2 = snn.Leaky(beta=0.9, learn_threshold=True)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 12]`` to ``[T, N, 4]``."""
        self.lif1.reset_mem()
        self.lif2.reset_mem()
        out = []
        for step in x:
            spk1, _ = self.lif1(self.fc1(step))
            spk2, _ = self.lif2(self.fc2(spk1))
            out.append(spk2)
        return torch.stack(out)


class UsedTwice(nn.Module):
    """One neuron called with two membrane potentials in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 16)
        self.lif = snn.Leaky(beta=0.9)
        self.fc3 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 12]`` to ``[T, N, 4]``."""
        mem1 = mem2 = self.lif.reset_mem()
        out = []
        for step in x:
            spk1, mem1 = self.lif(self.fc1(step), mem1)
            spk2, mem2 = self.lif(self.fc2(spk1), mem2)
            out.append(self.fc3(spk2))
        return torch.stack(out)


def sequential() -> nn.Sequential:
    """``init_hidden`` neurons in a Sequential, the last with ``output=True``."""
    return nn.Sequential(
        nn.Linear(12, 16),
        snn.Leaky(beta=0.9, init_hidden=True),
        nn.Linear(16, 4),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )


def nested() -> nn.Sequential:
    """Sequentials within a Sequential, learnable beta."""
    return nn.Sequential(
        nn.Sequential(nn.Linear(12, 16), snn.Leaky(beta=0.9, init_hidden=True, learn_beta=True)),
        nn.Sequential(nn.Linear(16, 16), nn.Sequential(snn.Leaky(beta=0.5, init_hidden=True))),
        nn.Linear(16, 4),
        snn.Leaky(beta=0.9, init_hidden=True, output=True),
    )


def _loop(net: nn.Module, x: Tensor) -> Tensor:
    """A ``backprop``-style loop: reset once, one call a step, membrane potential of the last."""
    utils.reset(net)
    if isinstance(net[0], nn.Sequential):  # type: ignore[index]
        # utils.reset looks at direct children only, then resets every neuron there is.
        snn.Leaky.reset_hidden()
        snn.Leaky.detach_hidden()
    return torch.stack([net(step)[1] for step in x])


def snntorch_entries() -> Iterator[Entry]:
    """The five ways in which snnTorch models are written."""
    styles: list[tuple[str, Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = [
        ("Sequential with init_hidden, utils.reset", sequential, _loop),
        ("class with explicit mem, read-out, learnable beta", Explicit, lambda net, x: net(x)),
        ("reset_mem(), then calls without mem", ResetMem, lambda net, x: net(x)),
        ("nested Sequentials, learnable beta", nested, _loop),
        ("one neuron used twice per step", UsedTwice, lambda net, x: net(x)),
    ]
    for name, build, run in styles:
        yield Entry(name, "snntorch", build, lambda: torch.rand(3, 2, 12) * 3, run)


# --------------------------------------------------------------------------- one model


def try_out(entry: Entry, config: Any = CONFIG) -> Outcome:
    """Convert a model by a traced run, train it for two steps, and check what must hold."""
    outcome = Outcome(entry.name, entry.family)
    start = time.perf_counter()
    try:
        torch.manual_seed(0)
        net, x = entry.build(), entry.sample()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        keys = list(net.state_dict())
        single_step = entry.run is not _train_pass and isinstance(net, nn.Sequential)
        sample = x[0] if single_step or entry.run is _online_pass else x
        outcome.report = quantize_(net, config, sample)
        layers = {n: m for n, m in net.named_modules() if isinstance(m, QuantizedWeight)}
        called: set[str] = set()
        for name, module in layers.items():
            module.register_forward_hook(lambda *_, name=name: called.add(name))  # type: ignore[attr-defined]
        before = [_fingerprint(m) for m in layers.values()]
        finite = True
        for _ in range(2):
            optimizer.zero_grad()
            out = entry.run(net, x)
            finite &= bool(torch.isfinite(out).all())
            (out - 1).square().mean().backward()
            optimizer.step()
        gradients = [m.weight.grad for m in layers.values()]  # type: ignore[attr-defined]
        outcome.checks = {
            "state_dict keys kept": list(net.state_dict()) == keys,
            "outputs finite": finite,
            "every quantized layer ran": called == set(layers),
            "gradients finite": all(g is not None and g.isfinite().all() for g in gradients),
            "weights trained": before != [_fingerprint(m) for m in layers.values()],
            "second run changes nothing": not quantize_(net, config).changed,
        }
    except Exception as error:
        outcome.error = f"{type(error).__name__}: {error}".splitlines()[0]
    outcome.seconds = time.perf_counter() - start
    return outcome


def _fingerprint(layer: Any) -> float:
    """Changes when the weights do; a copy of the largest models' weights would not fit."""
    total: float = layer.weight.detach().double().norm().item()
    return total


# --------------------------------------------------------------------------- the page


def page(outcomes: list[Outcome]) -> str:
    """The Markdown page."""
    works = sum(o.works for o in outcomes)
    lines = [
        "# Models that have been converted",
        "",
        "Written by `python -m benchmarks.zoo`. Every public constructor of SpikingJelly "
        f"{_version('spikingjelly')}'s `activation_based.model` that takes `spiking_neuron`, and "
        f"the five ways of writing a snnTorch {_version('snntorch')} model, converted by "
        f'`quantize_(model, "{CONFIG}", sample)` and trained for two optimizer steps on a batch '
        "of two small random inputs. A model works if all outputs and gradients are finite, every "
        "quantized layer ran, weights moved, the `state_dict` keys are those of the float model, "
        "and a second conversion changes nothing. The numbers count weighted layers by bits and "
        "neurons with a quantized membrane potential. The last column says what stays in floating "
        "point because nothing here can quantize it.",
        "",
        f"{works} of {len(outcomes)} work.",
        "",
        "| family | model | works | 1 bit | 8 bit | neurons | stays in floating point |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for o in outcomes:
        if o.report is None:
            lines.append(f"| {o.family} | {o.name} | no: {o.error} | | | | |")
            continue
        rows = o.report.modules
        failed = o.error or ", ".join(name for name, held in o.checks.items() if not held)
        cells = [
            o.family,
            o.name,
            "yes" if o.works else f"no: {failed}",
            str(sum(r.weight_bits == 1 for r in rows)),
            str(sum(r.weight_bits == 8 for r in rows)),
            str(sum(r.membrane_bits is not None for r in rows)),
            o.reasons(),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main(words: list[str]) -> None:
    outcomes = []
    for entry in (*spikingjelly_entries(), *snntorch_entries()):
        if words and not any(word in f"{entry.family}.{entry.name}" for word in words):
            continue
        outcome = try_out(entry)
        outcomes.append(outcome)
        state = "ok" if outcome.works else outcome.error or outcome.checks
        print(f"{entry.family}.{entry.name}: {state} ({outcome.seconds:.1f} s)", flush=True)
        gc.collect()
    if words:
        print(page(outcomes))
    else:
        PAGE.write_text(page(outcomes), encoding="utf-8")
        print(f"wrote {PAGE}")


if __name__ == "__main__":
    main(sys.argv[1:])
