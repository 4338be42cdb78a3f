"""How well the integer programs of trained networks agree with their float simulation.

``python -m benchmarks.agreement RUN ...`` takes folders of finished recipe runs (``--out`` of a
recipe, or those of the demo), calibrates each network on its training set, lowers it, and compares
both on the whole test set: with the input codes lowering chooses, with 8 bits forced, and, to tell
the rounding of the input from everything else, with the simulation given the rounded input.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qsnn_ext import calibrate
from qsnn_ext.deploy import compare, lower
from qsnn_ext.kernels import use_backend
from recipes import data as datasets
from recipes.config import Config
from recipes.engine import checkpoints, networks

Batches = list[tuple[Tensor, Tensor]]


def trained(folder: Path) -> tuple[nn.Module, Batches, Batches]:
    """The network of a run as of its newest checkpoint, in evaluation mode, and its data.

    Args:
        folder: Of the run.

    Returns:
        The network, training and test set in batches of 90, not augmented.
    """
    fields: dict[str, Any] = json.loads((folder / "config.json").read_text())
    paths = {name: Path(fields[name]) for name in ("data_dir", "out") if fields[name] is not None}
    config = Config(**{**fields, **paths})
    options = networks.data_options(config)
    spec = datasets.spec(config.data, **options)
    sets = datasets.datasets(
        config.data, config.data_dir, augment=False, split=config.split, **options
    )
    collate = datasets.collate_frames if spec.events else None
    model = networks.build(config, spec)
    newest = checkpoints.newest_sound(folder)
    if newest is None:
        raise SystemExit(f"{folder} holds no checkpoint; finish the run first")
    weights = checkpoints.read(newest)["state_dict"]
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights.items()})
    train, test = (list(DataLoader(s, batch_size=90, collate_fn=collate)) for s in sets)
    return model.eval(), train, test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    args = parser.parse_args()
    head = ("run", "input", "same", "predictions", "accuracy", "program", "first", "least")
    print("{:<24} {:>8} {:>5} {:>11} {:>9} {:>9} {:>10} {:>10}".format(*head))
    for folder in args.runs:
        model, train, test = trained(folder)
        with use_backend("function"):
            calibrate(model, [x for x, _ in train])
            for bits in (None, 8):
                program = lower(model, train[0][0], input_bits=bits)
                for same in (False, True):
                    report = compare(model, program, test, quantize_input=same)
                    agreements = [a.agreement for a in report.layers]
                    print(
                        f"{folder.name[-24:]:<24} {program.input_bits:>3} bits "
                        f"{'yes' if same else 'no':>5} {report.predictions:>10.2%} "
                        f"{report.accuracy_model:>9.2%} {report.accuracy_program:>9.2%} "
                        f"{agreements[0]:>10.6f} {min(agreements):>10.6f}",
                        flush=True,
                    )
                if program.input_bits == 8:
                    break  # what lowering chose are 8 bits already
    print("same: the simulation was given the rounded input. first, least: agreement of the spikes")
    print("of the first layer, and of the layer where it is least.")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
