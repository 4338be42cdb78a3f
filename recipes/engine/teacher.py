"""Weights of a finished run used in another: to start from, or to learn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from qsnn_ext.errors import CheckpointError, ConfigError
from recipes.config import Config
from recipes.engine import checkpoints, networks


def weights(folder: Path) -> dict[str, Tensor]:
    """The network's weights in the newest sound checkpoint of a run.

    Args:
        folder: Of the run.

    Raises:
        CheckpointError: There is none.

    """
    path = checkpoints.newest_sound(folder) if folder.is_dir() else None
    if path is None:
        raise CheckpointError(f"{folder} holds no checkpoint of a run: name a run's folder.")
    state = checkpoints.read(path)["state_dict"]
    return {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}


def start_from(model: nn.Module, folder: Path) -> None:
    """Begin with the weights and batch statistics of another run of the same network.

    Raises:
        CheckpointError: There is no checkpoint.
        ConfigError: It is of another network.

    """
    try:
        model.load_state_dict(weights(folder))
    except RuntimeError as error:
        raise ConfigError(f"The run in {folder} has another network: {error}.") from error


class Teacher:
    """A trained network whose answers another one learns (Hinton, 2015).

    Args:
        folder: The teacher's run.
        spec: :class:`recipes.data.DataSpec` of the data set.
        temperature: Of both softmaxes.

    Raises:
        ConfigError: The folder holds no readable configuration, or one of another data set.
        CheckpointError: It holds no checkpoint.

    """

    def __init__(self, folder: Path, spec: Any, temperature: float) -> None:
        try:
            noted = json.loads((folder / "config.json").read_text())
            names = ("network", "width", "steps", "bits", "preset", "host", "data")
            config = Config(**{name: noted[name] for name in names})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"--teacher {folder} is not the folder of a run: {error}.") from error
        if config.data != spec.name:
            raise ConfigError(f"The teacher in {folder} was trained on {config.data}.")
        self.model = networks.build(config, spec)
        start_from(self.model, folder)
        self.model.eval().requires_grad_(False)
        self.temperature = temperature

    def loss(self, x: Tensor, logits: Tensor) -> Tensor:
        """Divergence of the student's answers from the teacher's, of logits averaged over time.

        Args:
            x: The batch, as the student gets it.
            logits: The student's [T, N, classes].

        """
        self.model.to(x.device)
        with torch.no_grad():
            wanted = self.model(x).mean(0).float() / self.temperature
        given = logits.mean(0).float() / self.temperature
        # The gradient of a softened softmax shrinks with the square of the temperature.
        return self.temperature**2 * nnf.kl_div(
            given.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True
        )
