"""Train one configuration from start to result."""

from __future__ import annotations

import errno
import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from qsnn_ext.errors import ConfigError, TrainingError
from qsnn_ext.kernels import use_backend
from recipes import data as datasets
from recipes.config import Config, differences
from recipes.engine import checkpoints, files, holdout, networks, processes, setting
from recipes.engine.loading import Loading
from recipes.engine.module import Training
from recipes.engine.plots import plot_run
from recipes.engine.record import Record
from recipes.engine.results import collect, write_json
from recipes.engine.teacher import Teacher, start_from

# What a disk that is full, over quota, failing or read-only says.
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}

CONFIG, RESULT, PLOT = "config.json", "result.json", "run.png"


def train(config: Config) -> dict[str, Any]:
    """Train a network as configured and write its result.

    The run's folder gets ``config.json``, checkpoints, ``tensorboard/``, and at the end
    ``result.json`` and ``run.png``.

    Args:
        config: The run.

    Returns:
        The result as of the last epoch done (see :func:`recipes.engine.results.collect`).

    Raises:
        TrainingError: The folder cannot be used, or training cannot go on.
        DataError: The data set is absent, incomplete or damaged.
        ConfigError: Options that do not go together.
        CheckpointError: There is no sound checkpoint to resume from.

    """
    folder = config.folder
    # Other processes of the same run are started after the first one has prepared the folder.
    first = rank_zero_only.rank == 0
    owner = None
    if first:
        files.require_writable(folder)
        owner = files.lock(folder)
    try:
        if first:
            prepare(setting.resolve(config, _noted(folder / CONFIG)), folder)
        config = setting.resolve(config, _noted(folder / CONFIG))
        with explained(folder):
            start = checkpoints.newest_sound(folder) if config.resume else None
            return _train(config, folder, start)
    finally:
        if owner is not None:
            owner.close()


def prepare(config: Config, folder: Path) -> None:
    """Refuse a folder that holds another run; note this run's configuration in a new one."""
    note = folder / CONFIG
    if note.exists():
        if not config.resume:
            raise TrainingError(
                f"{folder} already holds a run. Continue it with --resume, or give another folder "
                "with --out."
            )
        changed = differences(config.to_dict(), _noted(note) or {})
        if changed:
            listed = ", ".join(f"{k} was {was!r}, is {now!r}" for k, (was, now) in changed.items())
            raise ConfigError(
                f"The run in {folder} was started with other options ({listed}). Resume it with "
                "the same ones, or give another folder with --out."
            )
    else:
        write_json(note, config.to_dict())


def _noted(note: Path) -> dict[str, Any] | None:
    """The configuration a run began with; none for a new one."""
    if not note.exists():
        return None
    try:
        return dict(json.loads(note.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{note} is damaged ({error}), so nobody can tell whether this is the same run. "
            "Restore it, or start anew in another folder with --out."
        ) from error


def _train(config: Config, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    """The whole run: data, network, training, the last look at the test set, result."""
    spec, loading = _data(config)
    quieten()
    seed_everything(config.seed, workers=False, verbose=False)
    model = _network(config, spec, folder, checkpoint)
    teacher = None
    if config.teacher is not None:
        teacher = Teacher(config.teacher, spec, config.temperature)

    record = Record("held_out" if config.holdout else "test")
    trainer = _trainer(config, folder, record)
    loading.trainer = trainer
    batches = len(loading.train_dataloader())
    batches = min(batches, config.limit_batches or batches)
    if trainer.world_size > 1:
        processes.sync_scales(model)
        if config.sync_batchnorm:
            model = processes.sync_batchnorm(model, trainer.strategy.root_device)
    if config.compile:
        # One program per batch size: there are few, and fixed sizes compile more surely.
        model.compile(dynamic=False)
    training = Training(config, model, math.ceil(batches / config.accumulate), teacher)
    introduce(config, model, folder, checkpoint, loading.found)
    test = None
    with use_backend(config.kernels):
        trainer.fit(training, datamodule=loading, ckpt_path=checkpoint)
        done = len(record.history) == config.epochs
        if done and config.holdout:
            trainer.test(training, datamodule=loading, verbose=False)
            tally = training.test_tally.means(processes.summing(trainer))
            test = {"test_accuracy": tally["accuracy"], "test_loss": tally["loss"]}

    device = trainer.strategy.root_device
    result = collect(config, model, record.history, record.best, device, test)
    if trainer.is_global_zero and done:
        write_json(folder / RESULT, result)
        plot_run(result, folder / PLOT)
        chosen = "held-out samples" if config.holdout else "the test set"
        print(
            f"Test set after the last epoch: {result['last_accuracy']:.2f} %. Best epoch "
            f"({result['best_epoch']}, chosen on {chosen}): {result['best_accuracy']:.2f} %.\n"
            f"Result: {folder / RESULT}  Plot: {folder / PLOT}"
        )
    elif trainer.is_global_zero:
        print(f"Stopped after epoch {len(record.history)} of {config.epochs}; go on with --resume.")
    return result


def _data(config: Config) -> tuple[datasets.DataSpec, Loading]:
    """What the network has to know about its data, and the loaders of all parts."""
    options = networks.data_options(config)
    spec = datasets.spec(config.data, **options)
    options |= {"split": config.split, "strong": config.strong_augment}
    train_set, test_set = datasets.datasets(
        config.data, config.data_dir, augment=config.augment, **options
    )
    found = getattr(train_set, "found", "")
    held_out = None
    if config.holdout:
        # Judged as they are: kept aside from the same samples without augmentation.
        plain, _ = datasets.datasets(config.data, config.data_dir, augment=False, **options)
        rest, aside = holdout.split(plain.labels, config.holdout)  # type: ignore[attr-defined]
        train_set, held_out = holdout.part(train_set, rest), holdout.part(plain, aside)
    collate = datasets.collate_frames if spec.events else None
    loading = Loading(config, train_set, test_set, spec.classes, collate, held_out)
    loading.found = found
    return spec, loading


def _network(
    config: Config, spec: datasets.DataSpec, folder: Path, checkpoint: Path | None
) -> nn.Module:
    """The network as a new run begins with it, having made sure of room for its checkpoints."""
    model = setting.arrange(networks.build(config, spec), config.memory_format)
    if config.start_from is not None and checkpoint is None:
        start_from(model, config.start_from)
    # Weights, optimizer state (one copy for SGD, two for Adam), and three files besides the newest.
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    files.require_space(folder, 4 * (3 if config.optimizer == "adam" else 2) * size)
    return model


def _trainer(config: Config, folder: Path, record: Record) -> Trainer:
    """Lightning's driver of the run."""
    show_bar = config.progress and sys.stderr.isatty()
    return Trainer(
        accelerator=config.accelerator,
        devices=config.devices or ("auto" if torch.cuda.is_available() else 1),
        num_nodes=config.nodes,
        precision=config.precision,
        max_epochs=min(config.epochs, config.stop_after or config.epochs),
        accumulate_grad_batches=config.accumulate,
        gradient_clip_val=config.clip,
        limit_train_batches=config.limit_batches,
        limit_val_batches=config.limit_batches,
        limit_test_batches=config.limit_batches,
        callbacks=[
            record,
            checkpoints.EpochCheckpoints(folder, record),
            *([TQDMProgressBar()] if show_bar else []),
        ],
        logger=TensorBoardLogger(folder, name=None, version="tensorboard"),
        plugins=[checkpoints.AtomicCheckpointIO()],
        enable_progress_bar=show_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        # Neurons keep counts on their spikes, which inference tensors do not allow.
        inference_mode=False,
        # The loaders shard the data themselves, so that testing counts every sample once.
        use_distributed_sampler=False,
    )


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Give faults of the machine that libraries report in their own terms a name and a remedy."""
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:
        if _worker_killed(error):
            raise TrainingError(
                f"A data loading process was killed ({str(error).strip() or 'it went silent'}), "
                "most often because memory ran out. Give fewer with --workers or a smaller "
                "--batch, and go on with --resume."
            ) from error
        # TensorBoard's writer, for one, fails in a thread of its own and reports it anywhere.
        if isinstance(error, OSError) and error.errno in _DISK:
            raise TrainingError(
                f"The run's files in {folder} could not be written: {error}. Make room or fix the "
                "folder, then go on with --resume; finished checkpoints are untouched."
            ) from error
        raise


def _worker_killed(error: Exception) -> bool:
    """Whether a data loading process has died, rather than reported a fault of its own.

    torch says so from a signal handler, wherever the main thread happens to be. But the worker's
    sockets close before the signal comes, so a batch that is being handed over may break first.
    What a living worker reports is raised elsewhere, after the batch has arrived.
    """
    if isinstance(error, RuntimeError):
        return "DataLoader worker" in str(error) and not str(error).startswith("Caught ")
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_code.co_name == "_try_get_data" for frame, _ in frames)


@rank_zero_only
def introduce(
    config: Config, model: nn.Module, folder: Path, checkpoint: Path | None, found: str = ""
) -> None:
    """Say what is about to be trained and where it goes."""
    parameters = sum(p.numel() for p in model.parameters())
    start = f"from {checkpoint}" if checkpoint else "from the beginning"
    print(
        f"{config.recipe}: {config.network} ({parameters:,} parameters, width {config.width:g}, "
        f"T = {config.steps}) on {config.data}, {config.bits}, {config.variant}, preset "
        f"{config.preset}, {config.host}, seed {config.seed}\n"
        f"{found or config.data}\n"
        f"Arithmetic {config.precision}, memory {config.memory_format}; epochs are judged by "
        f"{f'{config.holdout:,} held-out samples' if config.holdout else 'the test set'}\n"
        f"{config.epochs} epochs {start}; folder {folder}"
    )


def quieten() -> None:
    """Silence Lightning's advice that does not apply to these runs."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for advice in (
        ".*does not have many workers.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*You defined a `validation_step`.*",
        ".*LeafSpec.*",
        ".*lightning_fabric_simpleflake.*",
    ):
        warnings.filterwarnings("ignore", advice)
