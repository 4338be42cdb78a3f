"""Write what the documentation takes from the code and from committed data.

    python docs/generate.py

Tables stand between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in the pages and are
replaced; ``--figures`` also puts the drawings of ``docs/img`` in place. The tests
compare the tables with the pages.
"""

from __future__ import annotations

import csv
import inspect
import json
import re
import shutil
import statistics
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsnn_ext import PRESETS, errors

DOCS = Path(__file__).parent
ROOT = DOCS.parent

#: Pages with generated tables, seen from here.
PAGES = (
    "explanation/index.md", "devices.md", "errors.md", "neurons.md", "study.md", "zoo.md",
    "models.md", "integer-program.md", "performance.md", "../README.md",
)  # fmt: skip

_REGION = re.compile(r"(<!-- generated: ([\w-]+)[^>]*-->\n).*?(<!-- end -->)", re.S)


def table(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is the head."""
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    # A bar in a cell would end it.
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in lines)
    return "".join(f"| {' | '.join(row)} |\n" for row in escaped)


def presets() -> str:
    """How each option differs between the presets, from ``PRESETS``."""
    meaning = {
        "standardize": "mean and deviation of latent weights over",
        "scale": "scale",
        "gradient": "gradient of the sign",
        "squash": "function applied to the potential first",
    }
    rows = [["option of", "name", "what it is", *(f"`{name}`" for name in PRESETS)]]
    for part, owner in (("weight", "BinaryWeight"), ("membrane", "MembraneQuantizer")):
        names = dict.fromkeys(n for preset in PRESETS.values() for n in getattr(preset, part))
        for name in names:
            values = [f"`{getattr(preset, part)[name]!r}`" for preset in PRESETS.values()]
            what = meaning[name] + (
                " per output channel" if part == "weight" else " of a layer"
            ) * (name == "scale")
            rows.append([f"`{owner}`", f"`{name}`", what, *values])
    values = [f"`{preset.reduction!r}`" for preset in PRESETS.values()]
    rows.append(["`WSDRRegularizer`", "`reduction`", "over layers", *values])
    return table(rows)


def error_classes() -> str:
    """All error classes, what else they derive from, and their docstrings."""
    rows = [["error", "is also a", "meaning"]]
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, errors.QSNNError):
            also = [b.__name__ for b in kind.__bases__ if b is not errors.QSNNError]
            meaning = " ".join(inspect.getdoc(kind).split()).replace("``", "`")
            rows.append([f"`{name}`", ", ".join(f"`{b}`" for b in also), meaning])
    return table(rows)


def results() -> str:
    """Before and after, from the results that are committed; what was not measured has no row."""
    rows = [["", "float", "1w-2u", "", "from"]]
    rows += [*_sizes(), *_accuracies(), *_inference(), *_peers(), *_neuron()]
    return table(rows)


def _sizes() -> list[list[str]]:
    from qsnn_ext import footprint, models

    before, after = (
        footprint(models.resnet19(bits=bits)).megabytes for bits in ("32w-32u", "1w-2u")
    )
    return [[
        "ResNet19, size as the paper counts it",
        f"{before:.2f} MB", f"{after:.2f} MB", f"{before / after:.1f} times smaller",
        "`python -m recipes.table_2`",
    ]]  # fmt: skip


def _accuracies() -> list[list[str]]:
    """Accuracy after the last epoch of the demo's runs, over their seeds."""
    runs: dict[str, list[float]] = defaultdict(list)
    for path in sorted((ROOT / "recipes" / "results" / "demo").glob("*result.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[f"{run['config']['bits']} {run['variant']}"].append(run["last_accuracy"])
    full, quantized = runs["32w-32u plain"], runs["1w-2u wsdr"]
    if not full or not quantized:
        return []
    before, after = statistics.mean(full), statistics.mean(quantized)
    return [[
        f"handwritten digits, narrow ResNet19: test accuracy, {len(quantized)} seeds",
        f"{before:.2f} %", f"{after:.2f} %", f"{after - before:+.2f} points", "`make demo`",
    ]]  # fmt: skip


def _read(benchmark: str) -> list[dict[str, str]]:
    """Rows of the newest date in a benchmark's results."""
    path = ROOT / "benchmarks" / "results" / f"{benchmark}.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    newest = max((row["date"] for row in rows), default="")
    return [row for row in rows if row["date"] == newest]


@cache
def measured(name: str, of: str = "benchmarks") -> dict[str, Any]:
    """The committed results of a benchmark, or of the ``recipes``."""
    path = ROOT / of / "results" / f"{name}.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _inference() -> list[list[str]]:
    """The integer engine's fastest path against eager float32, batch 1, one thread."""
    times = {}
    for row in _read("inference"):
        case = (row["network"], row["batch"], row["threads"])
        if case == ("resnet19", "1", "1") and row["firing_rate"] in ("", "0.2"):
            times[row["contender"]] = (float(row["median_ms"]), row["processor"])
    found = next((c for c in ("avx512", "avx2", "portable") if c in times), None)
    if "eager" not in times or found is None:
        return []
    (before, processor), (after, _) = times["eager"], times[found]
    return [[
        f"ResNet19, one image, one thread of {processor}, firing rate 0.2",
        f"{before:.1f} ms", f"{after:.1f} ms", f"{before / after:.1f} times faster",
        "`python -m benchmarks.inference`",
    ]]  # fmt: skip


def _peers() -> list[list[str]]:
    """The integer engine against the fastest 8-bit form of another engine, one thread."""
    found = measured("peers")
    (times,) = (run["median_ms"] for run in found["runs"] if run["threads"] == 1)
    (after,) = (ms for name, ms in times.items() if name.startswith("qsnn_ext"))
    engine, before = min(
        ((name, ms) for name, ms in times.items() if "int8" in name), key=lambda pair: pair[1]
    )
    return [[
        f"the same, {found['processor']}, beside {engine}",
        f"{before:.1f} ms", f"{after:.1f} ms", f"{before / after:.1f} times faster",
        "`python -m benchmarks.peers`",
    ]]  # fmt: skip


def _neuron() -> list[list[str]]:
    """Training through one large layer of neurons, against the host's; medians."""
    times = {(row["case"], row["variant"]): float(row["median"]) for row in _read("neuron")}
    case = "fwd+bwd [4, 32, 128, 32, 32]"  # the others are the sweep's
    before, after = (times.get((case, name)) for name in ("LIFNode", "QuantLIFNode 2 bit"))
    if before is None or after is None:
        return []
    return [[
        "a layer of neurons, forward and backward, against `LIFNode`",
        f"{before:.0f} ms", f"{after:.0f} ms", f"{before / after:.1f} times faster",
        "`python benchmarks/neuron.py`",
    ]]  # fmt: skip


def study(data: str) -> dict[str, Any]:
    """The committed results of ``python -m recipes.ablation --data ...``."""
    return measured(f"ablation-{data}", "recipes")


def study_table(data: str) -> str:
    """Every variant at its own best setting and at the common one, against WS-DR."""
    from scipy import stats

    rows_of = defaultdict(dict)
    for row in study(data)["rows"]:
        rows_of[row["variant"]][row["tuned"]] = row
    reference = rows_of["ws-dr"][True]["accuracies"]
    rows = [["variant", "its setting", "accuracy (%)", "against WS-DR (points)", "common setting"]]
    for name, found in rows_of.items():
        tuned = found[True]
        untuned = found.get(False, tuned)  # the common setting may be the best
        difference = "-"
        if name != "ws-dr":
            test = stats.ttest_ind(tuned["accuracies"], reference, equal_var=False)
            low, high = test.confidence_interval(0.95)
            mean = tuned["mean"] - rows_of["ws-dr"][True]["mean"]
            difference = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
            if low > 0 or high < 0:
                difference = f"**{difference}**"
        rows.append([
            name, tuned["setting"].replace(":", " "), _spread(tuned),
            difference, _spread(untuned),
        ])  # fmt: skip
    return table(rows)


def tuning_table(data: str) -> str:
    """Accuracy of every variant at every setting tried, on the seed that is not counted."""
    tuning = study(data)["tuning"]
    settings = list(next(iter(tuning.values())))
    rows = [["variant", *(s.replace(":", " ") for s in settings)]]
    for name, accuracies in tuning.items():
        best = max(settings, key=accuracies.__getitem__)
        cells = [f"{accuracies[s]:.2f}" for s in settings]
        rows.append(
            [name, *(f"**{c}**" if s == best else c for s, c in zip(settings, cells, strict=True))]
        )
    return table(rows)


#: Data sets of :mod:`recipes.study`, in the order of the page.
REAL = ("nmnist", "fashionmnist", "cifar10")


def real_study(data: str) -> dict[str, Any]:
    """The committed results of ``python -m recipes.study --data ...``."""
    return measured(f"study-{data}", "recipes")


def real_protocol(data: str) -> str:
    """How the runs of a study were made: what stands in its JSON, and nothing else."""
    content = real_study(data)
    config, tuning, trials = (
        content[k] for k in ("config", "learning_rate_runs", "improvement_runs")
    )
    batches = tuning["batches_per_epoch"]
    epochs = "one epoch" if tuning["epochs"] == 1 else f"{tuning['epochs']} epochs"
    how = f"chosen on the held-out samples, in runs of {epochs}"
    if batches:
        how += f" of {batches} batches"
    rows = [
        ["what", "value"],
        ["network", f"{config['network']}, width {config['width']:g}, T = {config['steps']}"],
        ["epochs, batch", f"{config['epochs']}, {config['batch']}"],
        ["held-out training samples", f"{content['holdout']:,}"],
        ["learning rates", how if content["learning_rates"] else "not searched on these data"],
    ]
    if content["improvements"]:
        rows.append(["improvements", f"tried in runs of {trials['epochs']} epochs"])
    return table(rows)


def real_table(data: str) -> str:
    """Every variant that was trained: accuracy, rate, entropy, and what an epoch costs."""
    from recipes.engine.study_figure import mean_entropy

    rows = [[
        "variant", "its setting", "held out (%)", "test set (%)", "seeds",
        "firing rate", "entropy (nats)", "processor seconds per epoch",
    ]]  # fmt: skip
    for row in real_study(data)["rows"]:
        name = row["variant"]
        if row.get("with"):
            name += f" ({', '.join(row['with'])})"
        rate = spread = seconds = "-"
        if row["history"]:
            last = row["history"][-1]
            rate, spread = f"{last['firing_rate']:.3f}", f"{mean_entropy(last['layer_rates']):.3f}"
            taken = [e["cpu_seconds"] for e in row["history"] if e["cpu_seconds"]]
            seconds = f"{statistics.mean(taken):,.0f}" if taken else "-"
        held_out = statistics.mean(row["held_out"])
        rows.append([
            name, row["setting"].replace(":", " "), f"{held_out:.2f}", _spread(row),
            str(row["n"]), rate, spread, seconds,
        ])  # fmt: skip
    return table(rows)


def real_rates(data: str) -> str:
    """Held-out accuracy (%) of every variant at every learning rate tried."""
    return rates_table(real_study(data)["learning_rates"])


def rates_table(rates: dict[str, dict[str, float]]) -> str:
    """A row for every variant, the best of its settings in bold."""
    settings = sorted({s for found in rates.values() for s in found}, reverse=True)
    rows = [["variant", *(s.replace(":", " ") for s in settings)]]
    for name, found in rates.items():
        best = max(found, key=found.__getitem__)
        cells = [f"{found[s]:.2f}" if s in found else "not tried" for s in settings]
        rows.append(
            [name, *(f"**{c}**" if s == best else c for s, c in zip(settings, cells, strict=True))]
        )
    return table(rows)


def real_trials(data: str) -> str:
    """Held-out accuracy (%) of WS-DR with one improvement at a time."""
    content = real_study(data)
    found = content["improvement_runs"]["accuracies"]
    rows = [["improvement", "held out (%)", "against none (points)"]]
    for name, accuracy in found.items():
        gain = "-" if name == "none" else f"{content['improvements'][name]:+.2f}"
        rows.append([name, f"{accuracy:.2f}", gain])
    return table(rows)


#: Epochs of the runs that were stopped at which they are shown: all of them came to the last.
SHOWN = (1, 3, 6, 10)


def gpu_results(name: str) -> dict[str, Any]:
    """Committed results of the runs on a GPU: ``full-width``, ``stopped`` or ``continued``."""
    return measured(f"cifar10-{name}", "recipes")


def full_width() -> str:
    """The runs at full width: accuracy, rate, bytes of the weights, seconds of an epoch."""
    rows = [[
        "bits", "epochs", "held out (%)", "test set (%)", "firing rate", "weights (MB)",
        "the paper's, 300 epochs (%)",
    ]]  # fmt: skip
    paper = {"32w-32u": "96.36", "1w-2u": "95.20"}  # its Table 1
    for run in gpu_results("full-width")["runs"]:
        bits = run["config"]["bits"]
        rows.append([
            bits if bits == "32w-32u" else f"{bits}, WS-DR", str(run["config"]["epochs"]),
            f"{run['held_out_accuracy']:.2f}", f"{run['last_accuracy']:.2f}",
            f"{run['firing_rate']:.3f}", f"{run['weight_bytes'] / 1e6:.2f}", paper[bits],
        ])  # fmt: skip
    return table(rows)


def stopped_runs() -> str:
    """Held-out accuracy (%) of the runs that were stopped, by epoch: means of two seeds."""
    content = gpu_results("stopped")
    total = content["config"]["epochs"]
    rows = [["variant", "its setting", *(f"epoch {e} of {total}" for e in SHOWN), "last epoch run"]]
    for name in dict.fromkeys(r["variant"] for r in content["runs"]):
        runs = [r for r in content["runs"] if r["variant"] == name]
        at = [[r["history"][e - 1]["held_out_accuracy"] for r in runs] for e in SHOWN]
        ends = [r["history"][-1] for r in runs]
        last = [f"{end['held_out_accuracy']:.2f} ({end['epoch']})" for end in ends]
        setting = f"{runs[0]['optimizer']} {runs[0]['lr']:g}"
        rows.append([name, setting, *(f"{statistics.mean(a):.2f}" for a in at), ", ".join(last)])
    return table(rows)


def continued_run() -> str:
    """The last epochs of a run that was stopped on the GPU and went on on a CPU."""
    run = gpu_results("continued")
    rows = [["epoch", "held out (%)", "firing rate", "test set (%)"]]
    for entry in run["history"][run["continued_from_epoch"] - 1 :]:
        last = entry["epoch"] == run["config"]["epochs"]
        rows.append([
            str(entry["epoch"]), f"{entry['held_out_accuracy']:.2f}",
            f"{entry['firing_rate']:.3f}", f"{run['last_accuracy']:.2f}" if last else "",
        ])  # fmt: skip
    return table(rows)


def versions() -> str:
    """What the package takes now and took before, call by call."""
    rows = [["call", "before", "now", "ratio", "half of the rounds"]]
    for row in measured("versions")["rows"]:
        digits = 1 if row["before"] >= 10 else 2
        rows.append([
            row["case"], *(f"{row[k]:.{digits}f} {row['unit']}" for k in ("before", "after")),
            f"{row['ratio']:.2f}", f"{row['ratio_q1']:.2f} to {row['ratio_q3']:.2f}",
        ])  # fmt: skip
    return table(rows)


def gpu_rates() -> str:
    """Held-out accuracy (%) of every variant at every learning rate tried on the GPU."""
    return rates_table(gpu_results("stopped")["learning_rates"])


def training_cost() -> str:
    """What an epoch of CIFAR-10 takes of one core, from short measured runs of the recipe."""
    rows = [["width", "images trained", "processor seconds", "images per processor second",
             "an epoch of 45,000 images, minutes of one core"]]  # fmt: skip
    for row in measured("cost-cifar10", "recipes")["rows"]:
        speed = row["images"] / row["cpu_seconds"]
        rows.append([
            f"{row['width']:g}", f"{row['images']:,}", f"{row['cpu_seconds']:.1f}",
            f"{speed:.0f}", f"{45_000 / speed / 60:.0f}",
        ])  # fmt: skip
    return table(rows)


def models() -> str:
    """The networks in ``recipes/results/models``, from their cards."""
    rows = [[
        "model", "data", "parameters", "file (bytes)", "firing rate",
        "test samples", "simulation (%)", "integer program (%)",
    ]]  # fmt: skip
    for path in sorted((ROOT / "recipes" / "results" / "models").glob("*.json")):
        card = json.loads(path.read_text(encoding="utf-8"))
        rows.append([
            f"`{path.stem}`", card["data"], f"{card['parameters']:,}", f"{card['file_bytes']:,}",
            f"{card['firing_rate']:.3f}", f"{card['test_samples']:,}",
            f"{card['accuracy_simulation']:.2f}", f"{card['accuracy_program']:.2f}",
        ])  # fmt: skip
    return table(rows)


def _spread(row: dict[str, Any]) -> str:
    if row["std"] is None:
        return f"{row['mean']:.2f}"
    return f"{row['mean']:.2f} ± {row['std']:.2f}"


def devices() -> str:
    """What networks take on microcontrollers, as measured under emulators."""
    found = measured("devices")
    rows = [["network", "core", "build", "instructions", "flash", "RAM", "stack"]]
    for row in found["rows"]:
        rows.append([
            f"`{row['network']}`", f"{row['core']} (`{row['board']}`)", f"`{row['build']}`",
            f"{row['instructions']:,}", f"{row['flash']:,}", f"{row['ram']:,}", f"{row['stack']:,}",
        ])  # fmt: skip
    return table(rows)


def devices_int8() -> str:
    """The spiking network beside an int8 one of the same layers."""
    own, others = measured("devices"), measured("devices_int8")
    card = json.loads((ROOT / "recipes" / "results" / "devices" / "digits.json").read_text())
    noted = own["rows"]
    rows = [["core", "network", "runtime", "instructions", "flash", "RAM", "stack", "right (%)"]]
    for board in dict.fromkeys(row["board"] for row in others["rows"]):
        spiking = next(
            r for r in noted
            if (r["board"], r["network"], r["build"]) == (board, "digits", "-O2")
        )  # fmt: skip
        for row, network, runtime, right, samples in (
            (spiking, f"`digits`, {spiking['steps']} time steps", "this", card["accuracy_program"],
             spiking["sample_bytes"]),
            *((r, "int8, ReLU, one pass", r["runtime"], others["accuracy"], 0)
              for r in others["rows"] if r["board"] == board),
        ):  # fmt: skip
            rows.append([
                row["core"], network, runtime, f"{row['instructions']:,}",
                f"{row['firmware_flash'] - samples:,}", f"{row['firmware_ram']:,}",
                f"{row['stack']:,}", f"{right:.2f}",
            ])  # fmt: skip
    return table(rows)


def targets() -> str:
    """Where exported programs ran, as ``nox -s targets`` noted."""
    rows = [["architecture", "target of `zig cc`", "zig", "emulator", "integers", "run on"]]
    for name, row in measured("targets").items():
        same = {"passed": "the same", "failed": "**failed**"}[row["result"]]
        rows.append([
            name, f"`{row['target']}`", row["zig"], row["emulator"], same, row["date"],
        ])  # fmt: skip
    return table(rows)


# --------------------------------------------------------------------------- neurons

#: Arguments without which a neuron cannot be made.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "Leaky": {"beta": 0.9},
    "Lapicque": {"beta": 0.9},
    "Synaptic": {"alpha": 0.9, "beta": 0.8},
    "Alpha": {"alpha": 0.9, "beta": 0.8},
    "RLeaky": {"beta": 0.9, "linear_features": 4},
    "RSynaptic": {"alpha": 0.9, "beta": 0.8, "linear_features": 4},
    "DeltaLeaky": {"delta_threshold": 0.5, "beta": 0.9},
    "SLSTM": {"input_size": 4, "hidden_size": 4},
    "SConv2dLSTM": {"in_channels": 2, "out_channels": 2, "kernel_size": 3},
    "StateLeaky": {"beta": 0.9, "channels": 4},
    "LinearLeaky": {"beta": 0.9, "in_features": 4, "out_features": 4},
    "LeakyParallel": {"input_size": 4, "hidden_size": 4},
    "AssociativeLeaky": {"in_dim": 4, "d_value": 2, "d_key": 2, "num_spiking_neurons": 4},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "LIAFNode": {"act": torch.relu, "threshold_related": False},
    "GatedLIFNode": {"T": 2},
    "MPBNLIFNode": {"out_features": 4},
    "PSN": {"T": 2},
    "MaskedPSN": {"k": 1, "T": 2},
    "SlidingPSN": {"k": 1},
    "STBIFNode": {"q_threshold": 1.0, "level": 4},
    "FlexSN": {"core": lambda x, v: (x, v), "num_states": 1},
    "SpikingLSTMCell": {"input_size": 4, "hidden_size": 4},
    "SpikingGRUCell": {"input_size": 4, "hidden_size": 4},
    "SpikingVanillaRNNCell": {"input_size": 4, "hidden_size": 4},
    **{name: {"act_dim": 2, "dec_pop_dim": 2} for name in (
        "ILCIFNode", "ILCLIFNode", "ILCCUBALIFNode", "NoisyILCCUBALIFNode",
    )},
    **{name: {"num_node": 4} for name in ("NoisyCUBALIFNode", "NoisyNonSpikingIFNode")},
}  # fmt: skip


def _neurons_of(host: str) -> list[nn.Module]:
    """One neuron of every class that a host offers, in its order."""
    if host == "snntorch":
        import snntorch

        classes = _classes(vars(snntorch).values(), "snntorch._neurons.")
        classes = [c for c in classes if c not in (snntorch.SpikingNeuron, snntorch.LIF)]
    else:
        from spikingjelly.activation_based import layer, neuron, rnn

        classes = [
            *_classes(vars(neuron).values(), neuron.__name__),
            layer.SynapseFilter,
            *_classes(vars(rnn).values(), rnn.__name__),
        ]
        bases = (rnn.SpikingRNNBase, rnn.SpikingRNNCellBase)
        classes = [c for c in classes if not issubclass(c, bases[0]) and c is not bases[1]]
    made = []
    for kind in dict.fromkeys(c for c in classes if "Base" not in c.__name__):
        if kind.__module__.endswith("few_spike"):
            made.append(_few_spikes(kind))
        else:
            made.append(kind(**_ARGUMENTS.get(kind.__name__, {})))
    return made


def _classes(values: Iterable[Any], module: str) -> list[type[nn.Module]]:
    return [
        v
        for v in values
        if inspect.isclass(v) and issubclass(v, nn.Module) and v.__module__.startswith(module)
    ]


def _few_spikes(kind: Any) -> nn.Module:
    from spikingjelly.activation_based.neuron import FewSpikeTable

    def of(n: int) -> FewSpikeTable:
        return FewSpikeTable([1.0] * n, [1.0] * n, [1.0] * n)

    made: nn.Module
    match kind.__name__:
        case "HGNode":
            made = kind([of(2), of(2)], [0.5])
        case "OutlierAwareThresholdNode":
            made = kind(of(2), of(2), 1.0)
        case _:
            made = kind(of(2))
    return made


def neurons(host: str) -> str:
    """What ``quantize_`` makes of every neuron of a host, and which states it rounds."""
    from qsnn_ext import hosts, quantize_
    from qsnn_ext.quantizers import MEMBRANE_BITS

    widths = f"{min(MEMBRANE_BITS)} to {max(MEMBRANE_BITS)}"
    rows = [["neuron", "becomes", "states", "bits", "the step"]]
    for module in _neurons_of(host):
        name = type(module).__name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = quantize_(nn.Sequential(module), "32w-2u")["0"]
        model = hosts.describe(module)
        if report.action != "converted" or model is None:
            states = ", ".join(f"`{s.name}`" for s in model.states) if model is not None else ""
            rows.append([f"`{name}`", report.action, states, "", report.reason])
            continue
        step = "one fused operation" if model.charge is not None else "the host's, then rounding"
        if model.recurrent:
            step += "; what it feeds back are spikes"
        states = ", ".join(f"`{s.name}`" for s in model.states)
        rows.append([f"`{name}`", f"`{report.became}`", states, widths, step])
    return table(rows)


def deployed() -> str:
    """Trained networks of several kinds beside their integer programs."""
    rows = [[
        "network", "epochs", "simulation (%)", "program (%)", "same predictions (%)",
        "spikes agree (%)", "least layer (%)", "file (bytes)", "engine, eager (ms)",
    ]]  # fmt: skip
    for run in measured("deployed")["networks"]:
        found = run["as_it_is"]
        rows.append([
            run["network"], str(run["config"]["epochs"]),
            *(f"{100 * found[key]:.2f}" for key in (
                "accuracy_simulation", "accuracy_program", "predictions",
            )),
            f"{100 * found['spikes']:.4f}", f"{100 * found['least'][1]:.4f}",
            f"{run['file_bytes']:,}", f"{run['engine_ms']:.2f}, {run['eager_ms']:.1f}",
        ])  # fmt: skip
    return table(rows)


def second_states() -> str:
    """Test accuracy of recurrent and second-order networks, float and quantized."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in measured("second_states")["runs"]:
        found[run["network"], run["form"]].append(run["accuracy"])
    networks = dict.fromkeys(network for network, _ in found)
    forms = dict.fromkeys(form for _, form in found)
    rows = [["network", *forms, "seeds", "on from float, against float (points)"]]
    for network in networks:
        cells = [
            f"{statistics.mean(a):.2f} ± {statistics.stdev(a):.2f}"
            for a in (found[network, form] for form in forms)
        ]
        gap = statistics.mean(found[network, "on from float"])
        gap -= statistics.mean(found[network, "float"])
        rows.append([network, *cells, str(len(found[network, "float"])), f"{gap:+.2f}"])
    return table(rows)


# --------------------------------------------------------------------------- the zoo


def zoo_models(like: bool) -> list[dict[str, Any]]:
    """Structures of published networks, or the constructors of SpikingJelly."""
    return [m for m in measured("zoo")["models"] if bool(m["like"]) == like]


def zoo_missing(like: bool) -> str:
    """The models that the last run was ended before."""
    from benchmarks.structures import FAMILIES

    names = [
        key for key in measured("zoo")["not_examined"] if (key.split(".")[0] in FAMILIES) == like
    ]
    if not names:
        return ""
    return (
        f"{len(names)} more have not been examined, as the run was ended before them; "
        "`python -m benchmarks.zoo --resume` goes on: "
        + ", ".join(f"`{name.split('.', 1)[1]}`" for name in names)
        + ".\n"
    )


def zoo_table(like: bool) -> str:
    """Shares, neurons, and whether it deploys, a row per model."""
    head = ["shaped like", "model"] if like else ["family", "model"]
    rows = [[
        *head, "weights 1 / 8 / float (%)", "operations 1 / 8 / float (%)", "neurons",
        "works", "strict", "deploys", "predictions, spikes that agree (%)",
        "spikes, input rounded for both (%)", "firing rate (%)",
    ]]  # fmt: skip
    for m in zoo_models(like):
        failed = m["error"] or ", ".join(n for n, held in m["checks"].items() if not held)
        rows.append([
            m["like"] or m["family"],
            m["name"],
            _three(m["weights"]),
            _three(m["operations"]),
            f"{m['quantized']} of {m['neurons']}",
            "no" if failed else "yes",
            {"": "passes", None: ""}.get(m["strict"], "refuses"),
            {"": "yes", None: ""}.get(m["deploys"], "no"),
            "" if m["predictions"] is None
            else f"{100 * m['predictions']:.0f}, {_percent(m['spikes'])}",
            _percent(m.get("rounded")),
            _percent(m["firing_rate"], 1),
        ])  # fmt: skip
    return table(rows)


def zoo_totals(like: bool) -> str:
    """How many of the models work, keep at most 3 % of their weights in float, and deploy."""
    models = zoo_models(like)
    works = sum(not m["error"] and all(m["checks"].values()) for m in models)
    small = sum(m["weights"].get("float", 0) <= 0.03 * _total(m["weights"]) for m in models)
    deploy = sum(m["deploys"] == "" for m in models)
    return (
        f"{works} of {len(models)} work, {small} keep at most 3 % of their weights in floating "
        f"point, {deploy} deploy.\n" + zoo_missing(like)
    )


def zoo_reasons(like: bool) -> str:
    """What stays in floating point, what fails, and why there is no program."""
    rows = [["model", "what", "why"]]
    for m in zoo_models(like):
        reasons: list[tuple[str, str]] = [
            ("fails", m["error"] or ", ".join(n for n, held in m["checks"].items() if not held)),
            *((f"{n} module{'s' * (n > 1)} in float", why) for why, n in m["reasons"].items()),
            *_neurons(m),
            ("no program", m["deploys"] or ""),
        ]
        rows += [[m["name"], what, _short(why)] for what, why in reasons if why]
    return table(rows)


def _neurons(m: dict[str, Any]) -> list[tuple[str, str]]:
    """Neurons in floating point by reason, those that the modules' reasons do not name."""
    counts: dict[str, int] = defaultdict(int)
    for reason in m["float_neurons"].values():
        action, _, why = reason.partition(": ")
        if action != "unsupported":
            counts[why] += 1
    return [(f"{n} neuron{'s' * (n > 1)} in float", why) for why, n in counts.items()]


def _short(why: str, longest: int = 200) -> str:
    why = " ".join(why.split())
    return why if len(why) <= longest else why[: longest - 3].rstrip() + "..."


def _total(counts: dict[str, float]) -> float:
    return sum(counts.values()) or 1


def _three(counts: dict[str, float]) -> str:
    return " / ".join(
        f"{100 * counts.get(bits, 0) / _total(counts):.1f}" for bits in ("1", "8", "float")
    )


def _percent(share: float | None, digits: int = 2) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


TABLES = {
    "neurons-snntorch": partial(neurons, "snntorch"),
    "neurons-spikingjelly": partial(neurons, "spikingjelly"),
    "second-states": second_states,
    "deployed": deployed,
    "devices": devices,
    "devices-int8": devices_int8,
    "targets": targets,
    "presets": presets,
    "errors": error_classes,
    "results": results,
    "study-digits": partial(study_table, "digits"),
    "study-digits-events": partial(study_table, "digits-events"),
    "zoo-structures": partial(zoo_table, like=True),
    "zoo-structures-totals": partial(zoo_totals, like=True),
    "zoo-structures-reasons": partial(zoo_reasons, like=True),
    "zoo-spikingjelly": partial(zoo_table, like=False),
    "zoo-spikingjelly-totals": partial(zoo_totals, like=False),
    "zoo-spikingjelly-reasons": partial(zoo_reasons, like=False),
    "tuning-digits": partial(tuning_table, "digits"),
    "tuning-digits-events": partial(tuning_table, "digits-events"),
    "models": models,
    "cost-cifar10": training_cost,
    "full-width": full_width,
    "stopped-runs": stopped_runs,
    "gpu-rates": gpu_rates,
    "continued-run": continued_run,
    "versions": versions,
    **{f"protocol-{data}": partial(real_protocol, data) for data in REAL},
    **{f"real-{data}": partial(real_table, data) for data in REAL},
    **{f"rates-{data}": partial(real_rates, data) for data in REAL},
    **{f"trials-{data}": partial(real_trials, data) for data in REAL},
}


def fill(text: str) -> str:
    """The page with its generated tables as the code and the data have them now."""
    return _REGION.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


# --------------------------------------------------------------------------- the figures


def trace(bits: int | None, current: torch.Tensor) -> tuple[list[float], list[int]]:
    """Charge before firing, and times of spikes, of one neuron with that many membrane bits."""
    from qsnn_ext import functional as F

    v, charges, spikes = torch.zeros(1), [], []
    for time, x in enumerate(current):
        spike, carried = F.lif_step(x.view(1), v, decay=0.9, threshold=1.0)
        charges.append((0.9 * v + x).item())
        if spike.item():
            spikes.append(time)
        # One neuron alone would be its own scale; the grid of a layer spans the threshold.
        v = carried if bits is None else F.quantize_membrane(carried, bits, torch.tensor(1.0))
    return charges, spikes


def draw() -> None:
    """``img/overview.svg``: a neuron at three widths, and the size of the paper's networks."""
    import matplotlib
    from matplotlib.figure import Figure

    from qsnn_ext import footprint, models

    matplotlib.rcParams |= {"svg.hashsalt": "qsnn_ext", "font.size": 9}
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(3, 2))

    # Up to three input spikes of weight 0.35 arrive in each step.
    generator = torch.Generator().manual_seed(0)
    current = 0.35 * (torch.rand(3, 60, generator=generator) < 0.25).float().sum(0)
    widths: list[tuple[int | None, str]] = [(None, "0.4"), (4, "C0"), (2, "C3")]
    for axes, (bits, color) in zip(left.subplots(3, 1, sharex=True), widths, strict=True):
        charges, spikes = trace(bits, current)
        axes.step(range(len(charges)), charges, where="post", color=color, lw=1)
        axes.plot(spikes, [1.6] * len(spikes), "|", color=color, ms=8, mew=1.5)
        axes.axhline(1.0, color="k", lw=0.6, ls=":")
        axes.set(
            ylim=(-0.1, 1.9), ylabel=f"{bits or 32} bits", yticks=[0, 1], yticklabels=["0", "θ"]
        )
    axes.set_xlabel("time step")
    left.suptitle("one neuron, the same input: potential and spikes", fontsize=9)

    sizes_axes = right.subplots()
    names = ("resnet19", "vgg16", "vggsnn")
    for column, bits in enumerate(("32w-32u", "1w-8u", "1w-2u")):
        sizes = []
        for name in names:
            channels = 2 if name == "vggsnn" else 3
            model = getattr(models, name)(bits=bits)
            steps = 10 if name == "vggsnn" else None
            options = {"time_steps": steps} if steps else {}
            result = footprint(model, batch=1, input_shape=(channels, 32, 32), **options)
            sizes.append(result.megabytes)
        places = [i + 0.27 * (column - 1) for i in range(len(names))]
        bars = sizes_axes.bar(places, sizes, 0.25, label=bits, color=["0.6", "C0", "C3"][column])
        sizes_axes.bar_label(bars, fmt="%.1f", fontsize=7)
    sizes_axes.set_xticks(range(len(names)), ["ResNet19", "VGG16", "VGGSNN"])
    sizes_axes.set(yscale="log", ylabel="MB", ylim=(1, 150))
    right.suptitle("weights and membranes, batch 1", fontsize=9)
    sizes_axes.legend(ncols=3, frameon=False, fontsize=7)
    (DOCS / "img").mkdir(exist_ok=True)
    figure.savefig(DOCS / "img" / "overview.svg", metadata={"Date": None})


def draw_study() -> None:
    """``img/study.svg``: every variant at its own best setting, each seed a dot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, data in zip(panels, ("digits", "digits-events"), strict=True):
        content = study(data)
        rows = [row for row in content["rows"] if row["tuned"]]
        for place, row in enumerate(rows):
            color = "C3" if row["variant"] == "ws-dr" else "C0"
            axes.plot(row["accuracies"], [place] * row["n"], "o", ms=3, color=color, alpha=0.5)
            if row["mean"] < 80:
                axes.annotate(f"← {row['mean']:.1f} %", (80.3, place), va="center", color=color)
            axes.errorbar(
                row["mean"], place, xerr=row["std"], fmt="|", color=color, ms=12, capsize=3
            )
            axes.annotate(
                row["setting"].replace(":", " "), (1.01, place),
                xycoords=("axes fraction", "data"), fontsize=7, va="center",
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
        axes.set(title=content["study"], xlim=(80, 100))
        axes.set_xlabel("test accuracy after the last epoch (%)")
        axes.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.savefig(DOCS / "img" / "study.svg", metadata={"Date": None})


def draw_real(data: str) -> None:
    """``img/study-DATA.svg``: curves, layers and accuracies of a study on real data."""
    from recipes.engine.study_figure import draw as draw_study_of

    figure = draw_study_of(real_study(data))
    figure.savefig(DOCS / "img" / f"study-{data}.svg", metadata={"Date": None})


def draw_gpu() -> None:
    """``img/study-gpu.svg``: the runs on a GPU."""
    from recipes.engine import gpu_figure

    runs = (gpu_results(name)["runs"] for name in ("full-width", "stopped"))
    figure = gpu_figure.draw(*runs, continued=gpu_results("continued"))
    figure.savefig(DOCS / "img" / "study-gpu.svg", metadata={"Date": None})


def draw_notebook() -> None:
    """``img/report.png`` and ``img/comparison.png``: what the notebook's network costs and does."""
    import contextlib
    import os
    import runpy
    import tempfile

    notebooks = DOCS / "notebooks"
    sys.path.insert(0, str(notebooks))
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        runpy.run_path(str(notebooks / "spikingjelly_notebook.py"))
        for made, name in (("summary.png", "report.png"), ("comparison.png", "comparison.png")):
            shutil.copy(os.path.join(folder, made), DOCS / "img" / name)


def main() -> None:
    """Rewrite the tables; with ``--figures`` draw the figures too."""
    for page in PAGES:
        path = DOCS / page
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
    if "--figures" in sys.argv[1:]:
        draw()
        draw_study()
        for data in REAL:
            if (ROOT / "recipes" / "results" / f"study-{data}.json").exists():
                draw_real(data)
        draw_gpu()
        for name in ("inference.svg", "neuron_sweep_cpu.svg"):  # drawn by the benchmarks
            shutil.copy(ROOT / "benchmarks" / "results" / name, DOCS / "img" / name)


if __name__ == "__main__":
    main()
