"""Recurrent and second-order neurons of snnTorch, trained on event digits in float and quantized.

    python -m benchmarks.second_states            # all runs: writes results/second_states.json
    python -m benchmarks.second_states --network RLeaky  # one network, whose runs it replaces
    python -m benchmarks.second_states --quick    # one seed, one epoch: only prints

Networks of a convolution and a hidden layer, one with ``RLeaky`` (spikes fed back over weights of
its own), two with ``Synaptic`` (a synaptic current beside the potential), read from a leaky
integrator, on the recipes' handwritten digits before a simulated event camera. Each is trained in
floating point; with 1-bit weights and 2-bit states from scratch; and with these from where the
float network of the same seed has ended, for as many epochs again, as one does who has a trained
network. Every form of each has the learning rate of its own that is best on a fifth of the
training digits, held out, from a seed that is not counted; then it is trained on all of them
from the same seeds, and tested once. The weights of the feedback, which no batch norm follows, keep
the deviation of their currents (``calibrate_scales``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import snntorch as snn
import torch
from snntorch import surrogate
from torch import Tensor, nn

from qsnn_ext import calibrate_scales, quantize_
from recipes import data as datasets
from recipes.engine import holdout

RESULTS = Path(__file__).parent / "results" / "second_states.json"


@dataclass(frozen=True)
class Config:
    """How all of the networks are trained.

    Attributes:
        channels: of the convolution.
        hidden: neurons of the hidden layer.
        size: pixels of the sensor's side.
        steps: T.
        epochs: passes over the training set.
        batch: samples of an optimizer step.
        rates: learning rates of Adam that are tried, annealed to zero by a cosine.
        seeds: of weights and order of samples.
        tuning_seed: likewise, of the runs that choose a rate.
        held_out: training samples they are tested on.
        bits: of the quantized networks.
    """

    channels: int = 16
    hidden: int = 64
    size: int = 16
    steps: int = 10
    epochs: int = 8
    batch: int = 64
    rates: tuple[float, ...] = (2e-3, 5e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    held_out: int = 269
    bits: str = "1w-2u"


class Recurrent(nn.Module):
    """``RLeaky`` after a convolution, fed back by one, and after a linear layer, likewise."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, hidden, grad = config.channels, config.hidden, surrogate.atan()
        self.conv1 = nn.Conv2d(2, channels, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.lif1 = snn.RLeaky(beta=0.8, conv2d_channels=channels, kernel_size=3, spike_grad=grad)
        self.fc2 = nn.Linear(channels * (config.size // 2) ** 2, hidden, bias=False)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.lif2 = snn.RLeaky(beta=0.8, linear_features=hidden, spike_grad=grad)
        self.fc3 = nn.Linear(hidden, 10)
        self.readout = snn.Leaky(beta=0.9, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, H, W]`` to the mean potentials ``[N, 10]``."""
        spk1, mem1 = self.lif1.reset_mem()
        spk2, mem2 = self.lif2.reset_mem()
        mem3 = self.readout.reset_mem()
        out = []
        for x_t in x:
            spk1, mem1 = self.lif1(self.norm1(self.conv1(x_t)), spk1, mem1)
            spk2, mem2 = self.lif2(self.norm2(self.fc2(spk1.flatten(1))), spk2, mem2)
            _, mem3 = self.readout(self.fc3(spk2), mem3)
            out.append(mem3)
        return torch.stack(out).mean(0)


class SecondOrder(nn.Module):
    """``Synaptic`` after a convolution and after a linear layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        channels, hidden, grad = config.channels, config.hidden, surrogate.atan()
        self.conv1 = nn.Conv2d(2, channels, 5, stride=2, padding=2, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.lif1 = snn.Synaptic(alpha=0.5, beta=0.8, spike_grad=grad)
        self.fc2 = nn.Linear(channels * (config.size // 2) ** 2, hidden, bias=False)
        self.norm2 = nn.BatchNorm1d(hidden)
        self.lif2 = snn.Synaptic(alpha=0.5, beta=0.8, spike_grad=grad)
        self.fc3 = nn.Linear(hidden, 10)
        self.readout = snn.Leaky(beta=0.9, reset_mechanism="none")

    def forward(self, x: Tensor) -> Tensor:
        """``[T, N, 2, H, W]`` to the mean potentials ``[N, 10]``."""
        syn1, mem1 = self.lif1.reset_mem()
        syn2, mem2 = self.lif2.reset_mem()
        mem3 = self.readout.reset_mem()
        out = []
        for x_t in x:
            spk1, syn1, mem1 = self.lif1(self.norm1(self.conv1(x_t)), syn1, mem1)
            spk2, syn2, mem2 = self.lif2(self.norm2(self.fc2(spk1.flatten(1))), syn2, mem2)
            _, mem3 = self.readout(self.fc3(spk2), mem3)
            out.append(mem3)
        return torch.stack(out).mean(0)


NETWORKS: dict[str, Callable[[Config], nn.Module]] = {
    "RLeaky": Recurrent,
    "Synaptic": SecondOrder,
    # A binary layer loses less the wider it is: twice the channels, four times the hidden neurons.
    "Synaptic, wide": lambda config: SecondOrder(replace(config, channels=32, hidden=256)),
}

FORMS = ("float", "from scratch", "on from float")
"""In floating point; quantized before training; quantized after it and trained as long again."""

Arrays = tuple[Tensor, Tensor]


def load(config: Config) -> tuple[Arrays, Arrays]:
    """Training and test digits: event counts ``[T, N, 2, size, size]``, labels ``[N]``."""
    sets = datasets.datasets("digits-events", size=config.size, steps=config.steps, augment=False)
    arrays = []
    for part in sets:
        x, y = datasets.collate_frames([part[i] for i in range(len(part))])  # type: ignore[arg-type]
        arrays.append((x, y))
    return arrays[0], arrays[1]


def divided(data: Arrays, config: Config) -> tuple[Arrays, Arrays]:
    """The training digits without those held out, and these."""
    x, y = data
    kept, held = holdout.split(y.tolist(), config.held_out)
    return (x[:, kept], y[kept]), (x[:, held], y[held])


def train(net: nn.Module, data: Arrays, config: Config, rate: float, seed: int) -> None:
    """Cross-entropy of the mean potentials, Adam, a cosine."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    batches = -(-len(y) // config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * batches)
    net.train()
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(y), generator=generator).split(config.batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[:, chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(net: nn.Module, data: Arrays) -> float:
    """Per cent."""
    x, y = data
    return 100 * (net.eval()(x).argmax(1) == y).float().mean().item()


def run(
    name: str,
    form: str,
    rate: float,
    seed: int,
    data: tuple[Arrays, Arrays],
    config: Config,
    start: nn.Module | None,
) -> tuple[dict[str, Any], nn.Module]:
    """One network, trained and tested, in one of :data:`FORMS`; ``start`` is the float one."""
    torch.manual_seed(seed)
    begun = time.perf_counter()
    (x, _), _ = data
    net = NETWORKS[name](config)
    quantized: dict[str, Any] = {}
    if form == "on from float":
        assert start is not None
        net.load_state_dict(start.state_dict())
    if form != "float":
        report = quantize_(net, config.bits, sample=x[:, :4])
        # Feedback has no batch norm behind it: as the report says, its currents would grow.
        scales = calibrate_scales(net)
        quantized = {
            "weight_bits": {r.name: r.weight_bits for r in report.modules if r.weight_bits},
            "membrane_bits": {r.name: r.membrane_bits for r in report.modules if r.membrane_bits},
            "scaled": sorted(scales),
        }
    train(net, data[0], config, rate, seed)
    row = {
        "network": name, "form": form, "rate": rate, "seed": seed,
        "accuracy": round(accuracy(net, data[1]), 2),
        "seconds": round(time.perf_counter() - begun, 1), **quantized,
    }  # fmt: skip
    return row, net


def study(
    name: str, data: tuple[Arrays, Arrays], config: Config
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs that choose the rates of one network's three forms, and those that count."""
    tuned_on = divided(data[0], config)
    tuning, rows = [], []
    # The float networks that training goes on from, by seed.
    floats: dict[int, nn.Module] = {}
    for form in FORMS:
        seed = config.tuning_seed
        tried = {
            rate: run(name, form, rate, seed, tuned_on, config, floats.get(seed))
            for rate in config.rates
        }
        tuning += [row for row, _ in tried.values()]
        found = {rate: row["accuracy"] for rate, (row, _) in tried.items()}
        best = max(found, key=found.__getitem__)
        print(name, form, found, flush=True)
        floats.setdefault(seed, tried[best][1])
        for seed in config.seeds:
            row, net = run(name, form, best, seed, data, config, floats.get(seed))
            floats.setdefault(seed, net)
            rows.append(row)
            print(row["accuracy"], f"{row['seconds']} s", flush=True)
    return tuning, rows


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and deviation of the accuracies of each network and form."""
    lines = []
    for name, form in dict.fromkeys((row["network"], row["form"]) for row in rows):
        found = [r["accuracy"] for r in rows if (r["network"], r["form"]) == (name, form)]
        spread = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
        lines.append(f"{name:<10} {form:<14} {statistics.mean(found):.2f}{spread} %")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--network", choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    config = Config(seeds=tuple(range(args.seeds)))
    if args.quick:
        config = Config(epochs=1, seeds=(0,), rates=(5e-3,))
    data = load(config)
    tuning, rows = [], []
    for name in [args.network] if args.network else NETWORKS:
        more = study(name, data, config)
        tuning += more[0]
        rows += more[1]
    print(table(rows))
    if not args.quick:
        _write(config, tuning, rows, args.network)


def _write(
    config: Config, tuning: list[dict[str, Any]], rows: list[dict[str, Any]], network: str | None
) -> None:
    """All runs; those of one network take the place of its earlier ones."""
    versions = {package: version(package) for package in ("torch", "snntorch")}
    content = {"config": asdict(config), "versions": versions, "tuning": tuning, "runs": rows}
    if network is not None and RESULTS.exists():
        old = json.loads(RESULTS.read_text(encoding="utf-8"))
        for key in ("tuning", "runs"):
            content[key] = [*(r for r in old[key] if r["network"] != network), *content[key]]
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
