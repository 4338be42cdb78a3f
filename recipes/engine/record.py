"""What a run says about itself while it goes: terminal, TensorBoard, and a history."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from recipes.engine.module import Training
from recipes.engine.processes import summing
from recipes.engine.rates import entropy, sign_probabilities


class Record(Callback):
    """Measures each epoch, prints one line, and keeps the history in the checkpoints.

    Args:
        judged: What epochs are judged by: ``"test"`` set or ``"held_out"`` samples.

    Attributes:
        history: One dictionary per finished epoch.
        best: The entry with the highest accuracy; the earliest where several share it.
        is_best: Whether the newest entry is that one.

    """

    def __init__(self, judged: str = "test") -> None:
        self.judged = judged
        self.history: list[dict[str, Any]] = []
        self._started = self._trained = self._cpu_started = self._cpu = 0.0

    @property
    def best(self) -> dict[str, Any]:
        """The entry with the highest accuracy on what epochs are judged by."""
        return max(self.history, key=lambda entry: entry[f"{self.judged}_accuracy"])

    @property
    def is_best(self) -> bool:
        """Whether the newest epoch is the best so far."""
        return self.best is self.history[-1]

    def state_dict(self) -> dict[str, Any]:
        """Goes into every checkpoint."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes from the checkpoint a run is resumed from."""
        self.history = state_dict["history"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, i: int) -> None:
        """The clock of an epoch starts with its first batch."""
        if i == 0:
            self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        """The clock stops with the last batch, so that testing is not counted."""
        self._trained = time.perf_counter() - self._started
        self._cpu = time.process_time() - self._cpu_started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Training) -> None:  # type: ignore[override]
        """Gather the epoch's numbers from all processes; print and log them once."""
        everyone = summing(trainer)
        train = pl_module.train_tally.means(everyone)
        test = pl_module.test_tally.means(everyone)
        neurons = pl_module.meter.neuron_rates(everyone)
        rates = {name: rate.mean().item() for name, rate in neurons.items()}
        spikes = sum(rate.double().sum().item() for rate in neurons.values())
        entry = {
            "epoch": trainer.current_epoch + 1,
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": train["loss"],
            "regularization": train["regularization"],
            "train_accuracy": train["accuracy"],
            f"{self.judged}_loss": test["loss"],
            f"{self.judged}_accuracy": test["accuracy"],
            # Over all neurons, so wide layers count for more; the layers' own rates are beside it.
            "firing_rate": spikes / max(1, sum(rate.numel() for rate in neurons.values())),
            "layer_rates": rates,
            "throughput": train["samples"] / self._trained if self._trained else 0.0,
            # What the epoch costs, on a machine that others use as well.
            "cpu_seconds": self._cpu,
        }
        self.history.append(entry)
        if trainer.is_global_zero:
            self._tell(trainer, entry)
            self._log(trainer, pl_module, entry, neurons)

    def _tell(self, trainer: Trainer, entry: dict[str, Any]) -> None:
        epochs = trainer.lightning_module.config.epochs
        line = (
            f"epoch {entry['epoch']:>3}/{epochs}"
            f"  train: loss {entry['train_loss']:.4f}, accuracy {entry['train_accuracy']:6.2f} %"
            f"  {self.judged.replace('_', ' ')}: loss {entry[f'{self.judged}_loss']:.4f}, "
            f"accuracy {entry[f'{self.judged}_accuracy']:6.2f} %"
            f"  firing rate {entry['firing_rate']:.4f}"
            f"  {entry['throughput']:.0f} samples/s"
        )
        bar = trainer.progress_bar_callback
        if bar is not None and hasattr(bar, "print"):
            bar.print(line)
        else:
            print(line, flush=True)

    def _log(
        self, trainer: Trainer, module: Training, entry: dict[str, Any], neurons: dict[str, Tensor]
    ) -> None:
        if not isinstance(trainer.logger, TensorBoardLogger):
            return
        board, step = trainer.logger.experiment, entry["epoch"]
        for part in ("train", self.judged):
            for name in ("loss", "accuracy"):
                board.add_scalar(f"{name}/{part}", entry[f"{part}_{name}"], step)
        for key in ("regularization", "firing_rate", "throughput", "lr"):
            board.add_scalar(key, entry[key], step)
        for name, rate in entry["layer_rates"].items():
            board.add_scalar(f"layer firing rate/{name}", rate, step)
            board.add_scalar(f"layer entropy/{name}", entropy(rate), step)
            board.add_histogram(f"neuron firing rates/{name}", neurons[name], step)
        for name, share in sign_probabilities(module.model).items():
            board.add_scalar(f"sign probability/{name}", share, step)
        board.flush()
