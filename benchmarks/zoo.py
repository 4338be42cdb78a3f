"""Convert, train, save and deploy models that others wrote; measured for ``docs/zoo.md``.

    python -m benchmarks.zoo            # all models: writes results/zoo.json
    python -m benchmarks.zoo --resume   # goes on where a run was interrupted
    python -m benchmarks.zoo vgg sew    # names that contain one of the words: only prints, unless
                                        # --resume is given too, which writes them anew

Each model is examined in a process of its own, which is ended when it takes too long; what it had
found by then stays. ``python docs/generate.py`` then writes the tables of the page. Inputs are
small and batches hold two samples: what is shown is that the tools work, not accuracy.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import multiprocessing
import pkgutil
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from spikingjelly.activation_based import functional, model, neuron, surrogate
from spikingjelly.activation_based.model import (
    sew_resnet,
    spiking_resnet,
    spiking_vgg,
    spiking_vggws_ottt,
)
from torch import Tensor, nn

from benchmarks import examine
from benchmarks.structures import Built, Replace, structures
from qsnn_ext.kernels import use_backend

RESULTS = Path(__file__).parent / "results" / "zoo.json"
#: Rows of a run that has not ended, one a line; not committed.
PARTIAL = RESULTS.with_suffix(".partial")
CONFIG = "1w-2u"
#: Seconds for one model, all stages.
LIMIT = 400


@dataclass(frozen=True)
class Entry:
    """One model of the page.

    Attributes:
        name: of the constructor or structure.
        family: module of SpikingJelly's zoo, or file of :mod:`benchmarks.structures`.
        build: makes the float model with its input.
        sample: makes another input.
        like: the public model whose structure it has; empty for a constructor of a host.
        scratch: its neurons that extend none of a host.
        replace: what ``quantize_`` is to put in their place.
        batches: inputs to calibrate and compare on.
        narrow: makes the model with fewer channels, for what takes long: training, saving,
            deploying; by default as ``build`` does.
    """

    name: str
    family: str
    build: Callable[[], Built]
    sample: Callable[[], Any]
    like: str = ""
    scratch: tuple[type[nn.Module], ...] = ()
    replace: Replace = field(default_factory=dict)
    batches: int = 8
    narrow: Callable[[], Built] | None = None


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
    (r"spiking_vggws_ottt\.OTTTSpikingVGG$",
     {"cfg": spiking_vggws_ottt.cfgs["A"]}, (2, 2, 3, 32, 32)),
    (r"spiking_vggws_ottt\.", {}, (1, 2, 3, 32, 32)),
    (r"masnn\.(MASNN|masnn)", {"T": 5}, (5, 2, 2, 32, 32)),
    (r"spikformer\.(Spikformer$|spikformer_s|spikformer_ti)",
     {"T": 2, "img_size_h": 32, "img_size_w": 32}, (2, 2, 3, 32, 32)),
    (r"former|transformer|masnn|ms_resnet", {"T": 2}, (2, 2, 3, 32, 32)),
    (r"", {}, (2, 2, 3, 32, 32)),
]  # fmt: skip


def _online_pass(net: nn.Module, x: Tensor) -> Tensor:
    """OTTT networks run step by step; in training they pass ``[spike, trace]`` pairs along."""
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
            yield _constructor_entry(name, info.name, constructor, arguments, shape)


def _constructor_entry(
    name: str, family: str, constructor: Any, arguments: dict[str, Any], shape: tuple[int, ...]
) -> Entry:
    online = family == "spiking_vggws_ottt"
    kind = {"parametric_lif_net": neuron.ParametricLIFNode}.get(
        family, neuron.OTTTLIFNode if online else neuron.LIFNode
    )

    def sample() -> Tensor:
        # Centred, as standardised weights need it for spikes to reach the last layer.
        return torch.randn(shape) if online else torch.rand(shape)

    def build() -> Built:
        net: nn.Module = constructor(spiking_neuron=kind, **arguments, **_NEURON)
        functional.set_step_mode(net, "s" if online else "m")
        return Built(net, sample(), _online_pass if online else None)

    return Entry(name, family, build, sample, batches=1)


# --------------------------------------------------------------------------- structures


def structure_entries(small: bool = False) -> Iterator[Entry]:
    """The networks of :mod:`benchmarks.structures`, at the published width unless ``small``.

    They are trained and deployed at a small width in any case.
    """
    for entry in structures().values():
        as_it_is = Entry(
            entry.name,
            entry.family,
            lambda build=entry.build: build(small),  # type: ignore[misc]
            lambda build=entry.build: build(True).sample,  # type: ignore[misc]
            entry.like,
            tuple(entry.replace),
            narrow=lambda build=entry.build: build(True),  # type: ignore[misc]
        )
        yield as_it_is
        if entry.replace:
            name = f"{entry.name}, neuron replaced"
            yield dataclasses.replace(as_it_is, name=name, replace=entry.replace)


def entries() -> dict[str, Entry]:
    """All models of the page by ``family.name``."""
    found = (*spikingjelly_entries(), *structure_entries())
    return {f"{e.family}.{e.name}": e for e in found}


# --------------------------------------------------------------------------- one model


def stages(entry: Entry) -> Iterator[examine.Findings]:
    """What is found of a model, after each stage of the examination."""
    narrow = entry.narrow or entry.build
    options = {"replace": entry.replace} if entry.replace else {}
    found = examine.Findings()
    try:
        x, forward, fresh = _prepared(entry.build)
        net, found = examine.convert(fresh, x, CONFIG, forward, entry.scratch, **options)
        yield found
        found.strict = examine.strict(fresh, x, CONFIG, forward, **options)
        found.operations = examine.operations(net, x, forward)
        yield found
        if entry.narrow is not None:
            x, forward, fresh = _prepared(narrow)
            net, checked = examine.convert(fresh, x, CONFIG, forward, entry.scratch, **options)
            found.checks |= {k: v and found.checks[k] for k, v in checked.checks.items()}
        found.checks |= examine.train(net, x, forward)
        yield found
        found.checks["state_dict round trip"] = examine.round_trip(
            net, fresh, x, CONFIG, forward, **options
        )
        yield found
    except Exception as error:
        found.error = examine.line(error)
        yield found
        return
    samples = [x, *(entry.sample() for _ in range(entry.batches - 1))]
    found.deploys = f"no answer within {LIMIT} s"
    yield found
    try:
        vars(found).update(examine.agreement(net, samples, forward))
        found.deploys = ""
    except Exception as error:
        found.deploys = examine.line(error)
    yield found


def _prepared(build: Callable[[], Built]) -> tuple[Any, Any, Callable[[], nn.Module]]:
    """Input, how the model is run, and what builds it from one seed."""

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build().model

    torch.manual_seed(0)
    _, x, forward = build()
    return x, forward, fresh


def _examine(key: str, sender: Connection) -> None:
    """Send the findings of one model after each stage."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with use_backend("function"):
        for found in stages(entries()[key]):
            sender.send(found.to_dict())


def in_a_process(key: str, limit: float = LIMIT) -> dict[str, Any]:
    """Findings of one model, examined in a process that is ended after ``limit`` seconds.

    The process starts as a copy of one that has imported the hosts and run nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.examine", "benchmarks.structures"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_examine, args=(key, sender), daemon=True)
    process.start()
    sender.close()
    end = time.monotonic() + limit
    found = examine.Findings().to_dict()
    trouble = "the process died"
    while True:
        if not receiver.poll(max(end - time.monotonic(), 0)):
            trouble = f"no answer within {limit:.0f} s"
            break
        try:
            found = receiver.recv()
        except EOFError:  # it has ended, and if not by itself then before the last stage
            break
    process.kill()
    process.join()
    unfinished = found["deploys"] is None and not found["error"]
    return {**found, "error": trouble} if unfinished else found


def main(words: list[str]) -> None:
    """Examine the models; all of them are written, a choice only with ``--resume``, anew."""
    resume = "--resume" in words
    words = [word for word in words if not word.startswith("--")]
    known = entries()
    chosen = [k for k in known if not words or any(word in k for word in words)]
    rows = _examined() if resume else {}
    if not words and not resume:
        PARTIAL.unlink(missing_ok=True)
    for key in chosen:
        if key in rows and not words:
            continue
        start = time.perf_counter()
        found = in_a_process(key)
        entry = known[key]
        rows[key] = {"family": entry.family, "name": entry.name, "like": entry.like, **found}
        if resume or not words:
            with PARTIAL.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, rows[key]], allow_nan=False, default=str) + "\n")
        print(f"{key}: {summary(found)} ({time.perf_counter() - start:.0f} s)", flush=True)
    if resume or not words:
        write(known, rows)


def _examined() -> dict[str, dict[str, Any]]:
    """Rows of an interrupted run, and of the last one that was written."""
    rows: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        models = json.loads(RESULTS.read_text(encoding="utf-8"))["models"]
        rows = {f"{row['family']}.{row['name']}": row for row in models}
    if PARTIAL.exists():
        rows |= dict(json.loads(line) for line in PARTIAL.read_text("utf-8").splitlines())
    return rows


def write(known: dict[str, Entry], rows: dict[str, dict[str, Any]]) -> None:
    """The results of the models that have been examined, and the names of the others."""
    versions = {name: version(name) for name in ("torch", "spikingjelly", "snntorch")}
    content = {
        "config": CONFIG,
        "versions": versions,
        "not_examined": [key for key in known if key not in rows],
        "models": [rows[key] for key in known if key in rows],
    }
    text = json.dumps(content, indent=1, allow_nan=False, default=str)
    RESULTS.write_text(text + "\n", encoding="utf-8")
    PARTIAL.unlink(missing_ok=True)


def summary(found: dict[str, Any]) -> str:
    """The findings in a line."""
    f = examine.Findings(**found)
    failed = f.error or ", ".join(name for name, held in f.checks.items() if not held)
    agreement = "" if f.predictions is None else f", predictions agree {f.predictions:.0%}"
    if f.spikes is not None and f.firing_rate is not None:
        agreement += f", spikes {f.spikes:.2%} at rate {f.firing_rate:.2%}"
    return (
        f"{'ok' if f.works else failed}; float {f.float_share:.1%}, neurons {f.quantized} of "
        f"{f.neurons}, strict {f.strict or 'passes'}, deploys {f.deploys or 'yes'}{agreement}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
