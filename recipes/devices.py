"""The two small networks that firmware and the demo page carry.

    python -m recipes.devices

Trains a narrow VGGSNN (WS-DR, 1-bit weights, 2-bit membrane potentials) on the handwritten digits
and one on the digits before a simulated event camera, lowers both to integer programs, tests these
on all 450 test digits, and writes them with ten test digits each to ``recipes/results/devices``.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from qsnn_ext import calibrate
from qsnn_ext.deploy import DeployedModel, lower
from qsnn_ext.deploy.fileformat import save_program
from qsnn_ext.kernels import use_backend
from recipes import cifar10_resnet19, dvscifar10_vggsnn
from recipes import data as datasets
from recipes.config import Config
from recipes.data.digits import load_images
from recipes.engine import checkpoints, networks
from recipes.engine.cli import call
from recipes.engine.run import train

FOLDER = Path(__file__).with_name("results") / "devices"
CLASSES = [str(digit) for digit in range(10)]


def configurations() -> dict[str, Config]:
    """The runs, by the name of the file that comes of them."""
    still = cifar10_resnet19.config(data="digits").but(
        recipe="devices", network="vggsnn", steps=4, epochs=20, augment=True
    )
    moving = dvscifar10_vggsnn.config(data="digits-events").but(
        recipe="devices", size=16, steps=8, epochs=10
    )
    return {"digits": still, "events": moving}


def write(name: str, config: Config, folder: Path) -> dict[str, Any]:
    """Lower the network of a finished run and write its program and card.

    Args:
        name: Of the files.
        config: The run.
        folder: Where to write ``NAME.qsnn`` and ``NAME.json``.

    Returns:
        The card: accuracy of simulation and program, constants of the normalisation, test samples
        of every class as bytes in base64.

    """
    options = networks.data_options(config)
    spec = datasets.spec(config.data, **options)
    train_set, test_set = datasets.datasets(
        config.data, config.data_dir, augment=False, split=config.split, **options
    )
    collate = datasets.collate_frames if spec.events else None
    model = networks.build(config, spec)
    newest = checkpoints.newest_sound(config.folder)
    assert newest is not None
    weights = checkpoints.read(newest)["state_dict"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    model.eval()
    batches = [x for x, _ in DataLoader(train_set, batch_size=90, collate_fn=collate)]
    ((x, labels),) = DataLoader(test_set, batch_size=len(test_set), collate_fn=collate)
    with use_backend("function"), torch.no_grad():
        calibrate(model, batches)
        sample = torch.cat(batches, dim=1 if spec.events else 0)  # all of them: the codes' range
        program = lower(model, sample)
        simulated = model(x).sum(0).argmax(-1)
    program.metadata.update(classes=json.dumps(CLASSES))
    answers = DeployedModel(program).integers(x.numpy())[0]
    predicted = answers.sum(0).reshape(len(test_set), -1).argmax(-1)
    first = [int(np.flatnonzero(labels.numpy() == digit)[0]) for digit in range(10)]
    size = save_program(program, folder / f"{name}.qsnn")
    card: dict[str, Any] = {
        "data": config.data,
        "accuracy_simulation": round(float((simulated == labels).float().mean()) * 100, 2),
        "accuracy_program": round(float((predicted == labels.numpy()).mean()) * 100, 2),
        "test_samples": len(test_set),
        "bytes": size,
        "steps": config.steps,
        "command": "python -m recipes.devices",
        "config": config.but(out=None).to_dict(),
    }
    if spec.events:
        card["shape"] = [config.steps, *program.values[0].shape]
        values = x[:, first].transpose(0, 1)
    else:
        # Normalised pixels back to the 8 bits they were made from.
        images, _ = load_images(config.size, augment=False)
        card["shape"] = list(program.values[0].shape)
        card["mean"], card["std"] = images.mean, images.std
        values = torch.round((x[first] * images.std + images.mean) * 255)
    assert values.min() >= 0
    assert values.max() <= 255
    card["samples"] = [base64.b64encode(v.numpy().astype(np.uint8)).decode() for v in values]
    card["labels"] = [int(labels[i]) for i in first]
    card["predicted"] = [int(predicted[i]) for i in first]
    (folder / f"{name}.json").write_text(json.dumps(card, indent=1) + "\n")
    return card


def main(out: Path | None = None, folder: Path = FOLDER, trained: bool = False) -> None:
    """Train both networks and write their programs.

    Args:
        out: Folder for the runs; none makes runs/devices.
        folder: Folder for the programs.
        trained: Take the runs that ``out`` holds already instead of training.

    """
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in configurations().items():
        run = config.but(out=(out or Path("runs") / "devices") / name)
        if not trained:
            train(run)
        card = write(name, run, folder)
        print(
            f"{name}: {card['bytes']:,} bytes, accuracy {card['accuracy_simulation']:.2f} % as "
            f"simulated, {card['accuracy_program']:.2f} % as a program; of the ten samples "
            f"{sum(a == b for a, b in zip(card['labels'], card['predicted'], strict=True))} right"
        )


if __name__ == "__main__":
    call(main)
