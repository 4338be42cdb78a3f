"""Checkpoints that survive a kill, a full disk and a damaged file."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import CheckpointIO

from qsnn_ext.errors import CheckpointError
from recipes.engine.files import link_atomically, write_atomically

# What the Trainer takes from a checkpoint without asking whether it is there.
_PARTS: dict[str, type] = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "state_dict": dict,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
}

NAME = re.compile(r"epoch-(\d+)\.ckpt$")


class AtomicCheckpointIO(CheckpointIO):
    """How Lightning's Trainer writes and reads a checkpoint file here.

    A file appears under its name only when it is whole and on the disk. It holds tensors and plain
    values alone and is read with ``weights_only=True``, so a foreign file cannot run code.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all."""
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint; raises :class:`CheckpointError` when it is damaged."""
        return read(Path(path), map_location or "cpu")

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint file."""
        Path(path).unlink(missing_ok=True)


class EpochCheckpoints(Checkpoint):
    """Keep the newest checkpoints of a run, and the best one as ``best.ckpt``.

    Args:
        folder: Where they go.
        record: Callback whose ``is_best`` tells whether the epoch just ended is the best so far.
        keep: How many of the newest to keep, so that a damaged one has a predecessor.

    """

    def __init__(self, folder: Path, record: Any, keep: int = 2) -> None:
        self.folder, self.record, self.keep = folder, record, keep

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, then drop what is older than the newest ``keep``."""
        path = self.folder / f"epoch-{trainer.current_epoch + 1:04d}.ckpt"
        # The best one first: a run killed between the two does the epoch again, and both with it.
        best = self.folder / "best.ckpt"
        trainer.save_checkpoint(best if self.record.is_best else path)
        if trainer.is_global_zero:
            if self.record.is_best:
                link_atomically(best, path)
            for old in saved(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)


def saved(folder: Path) -> list[Path]:
    """The run's epoch checkpoints, newest first."""
    found = [p for p in folder.glob("epoch-*.ckpt") if NAME.search(p.name)]
    return sorted(found, key=lambda p: int(NAME.search(p.name)[1]), reverse=True)  # type: ignore[index]


def read(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint after checking every byte of it.

    Raises:
        CheckpointError: The file is cut short, changed, or no checkpoint of this engine.

    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # every record against its checksum
        if damaged is None:
            content = torch.load(path, map_location=map_location, weights_only=True)
            if isinstance(content, dict) and all(
                isinstance(content.get(name), kind) for name, kind in _PARTS.items()
            ):
                return content
            damaged = "its content"
    except Exception as error:  # a spoilt pickle can fail in any way
        raise CheckpointError(f"Checkpoint {path} cannot be read: {error}") from error
    raise CheckpointError(f"Checkpoint {path} is damaged ({damaged}).")


def newest_sound(folder: Path) -> Path | None:
    """The newest checkpoint that reads well; none when the run has not saved any.

    Warns about every damaged one it passes over.

    Raises:
        CheckpointError: There are checkpoints and all are damaged.

    """
    candidates = saved(folder)
    for path in candidates:
        try:
            read(path)
            return path
        except CheckpointError as error:
            warnings.warn(f"{error} Trying the checkpoint before it.", stacklevel=2)
    if candidates:
        raise CheckpointError(
            f"Every checkpoint in {folder} is damaged. Restore one from a copy, or start anew in "
            "another folder with --out."
        )
    return None
