"""From a run to what others can use: a `.qsnn` program, a checkpoint and a model card.

    python -m recipes.cards --run runs/... --name cifar10-1w-2u

Writes ``NAME.qsnn``, ``NAME.safetensors`` (where it is small enough), ``NAME.json`` and ``NAME.md``
into ``recipes/results/models``. Accuracies are those of the whole test set, of the simulation and
of the integer program; ``python -m recipes.evaluate`` finds the same. A run that was stopped before
its last epoch gives its newest checkpoint, and the card says so.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from qsnn_ext import MembraneQuantizer, calibrate, deploy, save_checkpoint, summarize
from qsnn_ext.errors import CheckpointError, ConfigError
from recipes.config import Config
from recipes.data.batches import ImageArray
from recipes.engine import checkpoints, networks, teacher
from recipes.engine.cli import call
from recipes.engine.files import write_atomically
from recipes.engine.results import git_commit, versions, write_json
from recipes.evaluate import (
    accuracy_of_program,
    accuracy_of_simulation,
    configuration,
    first_samples,
    spec_of,
    test_set,
)

FOLDER = Path(__file__).parent / "results" / "models"
LARGEST_CHECKPOINT = 1_000_000
# Training samples that the codes of the input, and membrane scales that were dynamic, are from.
CALIBRATION = 1_000

# What stands for the paths of a command line.
PATHS = {
    **{"--data-dir": "DIR", "--out": "RUN", "--start-from": "RUN0", "--teacher": "RUN0"},
    **{"--runs": "RUNS", "--results": "RESULTS"},
}

LICENSES = {
    "cifar10": "CIFAR-10 (Krizhevsky, 2009): its authors state no licence.",
    "cifar100": "CIFAR-100 (Krizhevsky, 2009): its authors state no licence.",
    "fashionmnist": "Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017): MIT.",
    "nmnist": "N-MNIST (Orchard, Jayawant, Cohen and Thakor, 2015): CC BY-SA 4.0.",
    "digits": "Handwritten digits of scikit-learn (Alpaydin and Kaynak, 1998): CC BY 4.0.",
}


def main(
    run: Path, name: str, folder: Path = FOLDER, data_dir: Path | None = None, note: str = ""
) -> None:
    """Write the files of a run's network.

    Args:
        run: Folder of the run.
        name: Of the files.
        folder: Where they go.
        data_dir: Where the data set lies; none takes the run's own.
        note: What the run's options do not say of the training, for the card.

    """
    config, result = result_of(run)
    if data_dir is not None:
        config = config.but(data_dir=data_dir)
    model = networks.build(config, spec_of(config))
    teacher.start_from(model, run)
    samples = first_samples(config, CALIBRATION)
    scales = [m for m in model.modules() if isinstance(m, MembraneQuantizer)]
    model.eval()
    if any(scale.mode == "dynamic" for scale in scales):
        calibrate(model, [samples])
    folder.mkdir(parents=True, exist_ok=True)
    program, checkpoint = folder / f"{name}.qsnn", folder / f"{name}.safetensors"
    lowered, tested = deploy.lower(model, samples), test_set(config)
    if isinstance(tested, ImageArray) and tested.classes:
        lowered.metadata["classes"] = json.dumps(tested.classes)
    deploy.save_program(lowered, program)
    save_checkpoint(model, checkpoint)
    if checkpoint.stat().st_size > LARGEST_CHECKPOINT:
        checkpoint.unlink()
    card = describe(config, result, model, samples, program)
    if note:
        card["note"] = note
    write_json(folder / f"{name}.json", card)
    text = page(name, card)
    write_atomically(folder / f"{name}.md", lambda file: file.write(text.encode()))
    print(text)


def result_of(run: Path) -> tuple[Config, dict[str, Any]]:
    """Configuration and result of a run; of a stopped one what its newest checkpoint knows.

    Raises:
        ConfigError: The folder holds no run.
        CheckpointError: It holds no sound checkpoint.

    """
    finished = (run / "result.json").exists()
    try:
        noted = json.loads((run / ("result.json" if finished else "config.json")).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run} holds no run: {error}.") from error
    if finished:
        config = configuration(noted["config"])
        return config, {**noted, "epochs_done": config.epochs}
    newest = checkpoints.newest_sound(run)
    if newest is None:
        raise CheckpointError(f"{run} holds no checkpoint: the run was stopped in its first epoch.")
    config = configuration(noted)
    return config, {
        "last_accuracy": None,
        "epochs_done": checkpoints.read(newest)["epoch"] + 1,
        "command": f"python -m recipes.{config.recipe}",
    }


def describe(
    config: Config, result: dict[str, Any], model: nn.Module, samples: Tensor, program: Path
) -> dict[str, Any]:
    """What a card says, as data.

    Args:
        config: The run.
        result: What the run wrote.
        model: Its network, calibrated.
        samples: Training samples, to measure rates on.
        program: The network's `.qsnn` file.

    """
    tested = test_set(config)
    total = summarize(model, samples[..., :64, :, :, :]).total
    return {
        "data": config.data,
        "network": config.network,
        "width": config.width,
        "steps": config.steps,
        "bits": config.bits,
        "variant": config.variant,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": networks.weight_bytes(model),
        "file_bytes": program.stat().st_size,
        "firing_rate": total.firing_rate,
        "accuracy_in_training": result["last_accuracy"],
        "accuracy_simulation": accuracy_of_simulation(model, config),
        "accuracy_program": accuracy_of_program(program, config),
        "test_samples": len(tested),  # type: ignore[arg-type]
        **normalization(tested),
        "epochs": config.epochs,
        "epochs_done": result["epochs_done"],
        "command": portable(result["command"]),
        "git": git_commit(),
        "versions": versions(),
        "config": config.but(out=None, data_dir=Path("data")).to_dict(),
    }


def normalization(tested: Dataset[Any]) -> dict[str, list[float]]:
    """What was taken from the channels of images, and what they were divided by: of [0, 1]."""
    if not isinstance(tested, ImageArray):
        return {}
    return {"mean": list(tested.transform.mean), "std": list(tested.transform.std)}


def portable(command: str) -> str:
    """A run's command line with names in place of the paths of the machine it ran on."""
    words = shlex.split(command)
    for i, word in enumerate(words):
        option, equals, _ = word.partition("=")
        if option not in PATHS:
            continue
        if equals:
            words[i] = f"{option}={PATHS[option]}"
        elif i + 1 < len(words):
            words[i + 1] = PATHS[option]
    return shlex.join(words)


def epochs_of(card: dict[str, Any]) -> str:
    """How long was trained, in words."""
    done, planned = card.get("epochs_done", card["epochs"]), card["epochs"]
    return f"{planned} epochs" if done == planned else f"stopped after epoch {done} of {planned}"


def page(name: str, card: dict[str, Any]) -> str:
    """A model card in Markdown."""
    trained = card["accuracy_in_training"]  # none of a run that was stopped
    rows = {
        "data": card["data"],
        "network": f"{card['network']}, width {card['width']:g}, T = {card['steps']}",
        "bits": f"{card['bits']} (hidden weights, membrane potentials), {card['variant']}",
        "parameters": f"{card['parameters']:,} in {card['weight_bytes']:,} bytes",
        "file": f"{card['file_bytes']:,} bytes",
        "mean firing rate": f"{card['firing_rate']:.3f} on {64} training samples",
        "test samples": f"{card['test_samples']:,}",
        **({} if trained is None else {"test accuracy, as trained": f"{trained:.2f} %"}),
        "test accuracy, frozen scales": f"{card['accuracy_simulation']:.2f} %",
        "test accuracy, integer program": f"{card['accuracy_program']:.2f} %",
        "training": f"{epochs_of(card)}, `{card['command']}`",
        **({"note": card["note"]} if "note" in card else {}),
        "data's licence": LICENSES.get(card["data"], "see the data set's own page"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return (
        f"# {name}\n\n| | |\n|---|---|\n{table}\n\n"
        "Written by `python -m recipes.cards`. The number is found again by\n"
        f"`python -m recipes.evaluate --model {name}.qsnn --data {card['data']} --data-dir DIR`.\n"
    )


if __name__ == "__main__":
    call(main)
