"""Trained networks as integer programs: agreement, size and time beside their simulation.

    python -m benchmarks.deployed                 # all: writes results/deployed.json
    python -m benchmarks.deployed --only Synaptic # one network, whose row it replaces

A convolutional network, a spiking transformer of each school (softmax-free attention, masks and
membrane shortcuts), and networks of recurrent and of second-order neurons are trained with 1-bit
weights and 2-bit membranes on the recipes' handwritten digits, images or events, for a minute each.
Each is calibrated on its training set, lowered and compared with its simulation on the whole test
set: the share of equal spikes layer by layer and of equal predictions, both as inputs come and with
the simulation given the rounded input. The engine's answers are compared with the NumPy reference
bit by bit. Times are CPU time of one thread for one sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import Tensor, nn

from benchmarks import second_states
from benchmarks.structures import transformers
from qsnn_ext import calibrate, hosts, quantize_
from qsnn_ext.deploy import DeployedModel, Program, compare, load, lower, save_program
from recipes import data as datasets

RESULTS = Path(__file__).parent / "results" / "deployed.json"


@dataclass(frozen=True)
class Config:
    """How all of the networks are trained.

    Attributes:
        bits: of weights and membranes.
        steps: T of the networks of images; those of events have :data:`_SECOND`'s.
        size: pixels of a side.
        epochs: passes over the training set.
        batch: samples of an optimizer step.
        lr: of Adam, annealed to zero by a cosine.
        bit_exact: test samples on which engine and reference are compared.
        rounds: calls that are timed.
    """

    bits: str = "1w-2u"
    steps: int = 4
    size: int = 16
    epochs: int = 12
    batch: int = 64
    lr: float = 2e-3
    bit_exact: int = 32
    rounds: int = 30


# --------------------------------------------------------------------------- networks


class Convolutional(nn.Module):
    """Two convolutions and a hidden layer; the answer is the mean over time."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.body = nn.Sequential(
            layer.Conv2d(1, 32, 3, padding=1, bias=False), layer.BatchNorm2d(32),
            neuron.LIFNode(detach_reset=True), layer.MaxPool2d(2),
            layer.Conv2d(32, 64, 3, padding=1, bias=False), layer.BatchNorm2d(64),
            neuron.LIFNode(detach_reset=True), layer.MaxPool2d(2),
            layer.Flatten(), layer.Linear(64 * 16, 128, bias=False), layer.BatchNorm1d(128),
            neuron.LIFNode(detach_reset=True), layer.Linear(128, 10),
        )  # fmt: skip
        functional.set_step_mode(self, "m")

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 16, 16]`` to ``[N, 10]``."""
        out: Tensor = self.body(x.unsqueeze(0).repeat(self.steps, 1, 1, 1, 1)).mean(0)
        return out


def spikformer(steps: int) -> nn.Module:
    """Spikformer's attention, one block."""
    net = transformers.Spikformer(steps, 64, 4, 1, 10)
    net.patch_embed = transformers.PatchSplitting(1, 64)
    return net


class SpikeDriven(nn.Module):
    """The Spike-driven Transformer, one block, without its hook."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net = transformers.SpikeDrivenTransformer(steps, 64, 1, 10)
        self.net.stem[0] = nn.Conv2d(1, 32, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 16, 16]`` to ``[N, 10]``."""
        out: Tensor = self.net(x)[0]
        return out


_SECOND = second_states.Config(steps=6, size=16)

#: Name -> whether it takes events, and what builds it.
NETWORKS: dict[str, tuple[bool, Callable[[Config], nn.Module]]] = {
    "convolutional": (False, lambda c: Convolutional(c.steps)),
    "Spikformer": (False, lambda c: spikformer(c.steps)),
    "Spike-driven Transformer": (False, lambda c: SpikeDriven(c.steps)),
    "RLeaky": (True, lambda c: second_states.Recurrent(_SECOND)),
    "Synaptic": (True, lambda c: second_states.SecondOrder(_SECOND)),
}

Arrays = tuple[Tensor, Tensor]

HEAD = (
    f"{'network':<26} {'simul.':>8} {'program':>8} {'predict':>8} {'spikes':>9} {'rounded':>9} "
    f"{'least':>9} {'bytes':>8} {'ms':>7} {'eager':>7} same"
)


def digits(events: bool, config: Config) -> tuple[Arrays, Arrays]:
    """Training and test digits, ``[N, 1, H, W]`` or event counts ``[T, N, 2, H, W]``."""
    if events:
        return second_states.load(_SECOND)
    sets = datasets.datasets("digits", size=config.size, augment=False)
    found = []
    for part in sets:
        items = [part[i] for i in range(len(part))]  # type: ignore[arg-type]
        images = torch.stack([x for x, _ in items])
        if images.shape[-1] != config.size:
            images = nn.functional.interpolate(images, config.size)
        found.append((images, torch.tensor([y for _, y in items])))
    return found[0], found[1]


# --------------------------------------------------------------------------- one network


def train(net: nn.Module, data: Arrays, events: bool, config: Config) -> None:
    """Cross-entropy, Adam, a cosine."""
    x, y = data
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=config.lr)
    batches = -(-len(y) // config.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * batches)
    net.train()
    for _ in range(config.epochs):
        for chosen in torch.randperm(len(y), generator=generator).split(config.batch):
            hosts.reset(net)
            optimizer.zero_grad()
            shown = x[:, chosen] if events else x[chosen]
            nn.functional.cross_entropy(net(shown), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    hosts.reset(net)
    net.eval()


def batches(data: Arrays, events: bool, size: int) -> list[tuple[Tensor, Tensor]]:
    """The data in pieces."""
    x, y = data
    parts = torch.arange(len(y)).split(size)
    return [(x[:, part] if events else x[part], y[part]) for part in parts]


def compared(net: nn.Module, program: Program, test: list[Any], rounded: bool) -> dict[str, Any]:
    """Agreement of a program with its simulation."""
    report = compare(net, program, test, quantize_input=rounded)
    agreements = {a.name: a.agreement for a in report.layers}
    least = min(agreements, key=lambda name: agreements[name])
    spikes = sum(a.spikes for a in report.layers)
    return {
        "predictions": report.predictions,
        "spikes": sum(a.spikes * a.agreement for a in report.layers) / spikes,
        "least": [least, agreements[least]],
        "firing_rate": sum(a.spikes * a.rate_model for a in report.layers) / spikes,
        "accuracy_simulation": report.accuracy_model,
        "accuracy_program": report.accuracy_program,
    }


def bit_exact(program: Program, x: Tensor) -> bool:
    """Whether the engine answers as the reference does, bit by bit."""
    engine, reference = DeployedModel(program), DeployedModel(program, "numpy")
    pairs = zip(engine.integers(x), reference.integers(x), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    """Median CPU time of this thread."""
    call()
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return 1e3 * statistics.median(times)


def run(name: str, config: Config) -> dict[str, Any]:
    """Train, calibrate, lower and compare one network."""
    events, build = NETWORKS[name]
    torch.manual_seed(0)
    data, held = digits(events, config)
    net = build(config)
    sample = data[0][:, :4] if events else data[0][:4]
    report = quantize_(net, config.bits, sample=sample)
    start = time.perf_counter()
    train(net, data, events, config)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        calibrate(net, [x for x, _ in batches(data, events, 128)])
        program = lower(net, sample)
        program.validate()
        test = batches(held, events, 90)
        one = test[0][0][:, :1] if events else test[0][0][:1]
        first = test[0][0]
        few = first[:, : config.bit_exact] if events else first[: config.bit_exact]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.qsnn"
            save_program(program, path)
            size = path.stat().st_size
            deployed = load(path)
            engine_ms = median_ms(lambda: deployed(one), config.rounds)
        found = {
            "network": name,
            "parameters": sum(p.numel() for p in net.parameters()),
            "in_floating_point": [r.name for r in report.of("unsupported")],
            "training_seconds": round(seconds, 1),
            "operations": len(program.ops),
            "file_bytes": size,
            "bit_exact": bit_exact(program, few),
            "as_it_is": compared(net, program, test, rounded=False),
            "rounded_input": compared(net, program, test, rounded=True),
            "engine_ms": engine_ms,
            "eager_ms": median_ms(lambda: (hosts.reset(net), net(one)), config.rounds),
        }
    hosts.reset(net)
    return found


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    a, b = row["as_it_is"], row["rounded_input"]
    return (
        f"{row['network']:<26} {a['accuracy_simulation']:>8.2%} {a['accuracy_program']:>8.2%} "
        f"{a['predictions']:>8.2%} {a['spikes']:>9.4%} {b['spikes']:>9.4%} {b['least'][1]:>9.4%} "
        f"{row['file_bytes']:>8} {row['engine_ms']:>7.3f} {row['eager_ms']:>7.2f} "
        f"{'yes' if row['bit_exact'] else 'NO':>4}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NETWORKS)
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    args = parser.parse_args()
    config = Config(epochs=args.epochs)
    print(HEAD)
    for name in [args.only] if args.only else NETWORKS:
        row = run(name, config)
        print(line(row), flush=True)
        write(row, config)


def write(row: dict[str, Any], config: Config) -> None:
    """Put a network's row in the place of what an earlier run found."""
    versions = {package: version(package) for package in ("torch", "spikingjelly", "snntorch")}
    settings = {"config": asdict(config), "versions": versions}
    old = json.loads(RESULTS.read_text(encoding="utf-8"))["networks"] if RESULTS.exists() else []
    rows = {r["network"]: r for r in [*old, {**row, **settings}]}
    content = {"networks": [rows[name] for name in NETWORKS if name in rows]}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
