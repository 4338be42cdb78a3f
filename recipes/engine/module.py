"""One training run as Lightning sees it: the loss of Eq. 18, its optimizer, its measurements."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from qsnn_ext import SignGradientSchedule, WSDRRegularizer
from qsnn_ext.errors import DivergenceError, TrainingError
from recipes.config import Config
from recipes.engine import setting
from recipes.engine.graphs import StepGraph, finite
from recipes.engine.loading import mix
from recipes.engine.networks import binary_layers, uses_annealing
from recipes.engine.rates import RateMeter
from recipes.engine.teacher import Teacher


class Tally:
    """Sums over an epoch, kept on the device so that no step waits for them."""

    names = ("samples", "correct", "loss", "regularization")

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(self.names), dtype=torch.float64, device=device)

    def add(self, counted: Tensor) -> None:
        """Add what :func:`count` says of one batch."""
        self.sums += counted

    def means(self, everyone: Any) -> dict[str, float]:
        """Accuracy (%), losses and sample count over all processes.

        Args:
            everyone: Function that sums a tensor over the processes.

        """
        samples, correct, loss, term = everyone(self.sums).tolist()
        return {
            "accuracy": 100 * correct / samples,
            "loss": loss / samples,
            "regularization": term / samples,
            "samples": int(samples),
        }


def count(logits: Tensor, labels: Tensor, loss: Tensor, term: Tensor) -> Tensor:
    """A batch's part of a :class:`Tally`, float64 [4].

    Args:
        logits: [T, N, classes], averaged over time to answer.
        labels: [N].
        loss: Cross entropy, 0-dim.
        term: Firing-rate loss, 0-dim.

    """
    correct = (logits.detach().mean(0).argmax(1) == labels).double().sum()
    n = len(labels)
    parts = [torch.full_like(correct, n), correct, loss.detach() * n, term.detach() * n]
    return torch.stack([part.double() for part in parts])


class Training(LightningModule):
    """Trains a network of :mod:`qsnn_ext.models` by the paper's loss.

    Args:
        config: The run.
        model: Network giving logits [T, N, classes].
        steps_per_epoch: Optimizer steps in one epoch, for the schedules.
        teacher: Network whose answers are learnt beside the labels.

    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        steps_per_epoch: int,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.teacher = teacher  # no module: its weights are no part of this one's checkpoints
        self.config, self.model, self.steps_per_epoch = config, model, steps_per_epoch
        self.regularizer: WSDRRegularizer | None = None
        if config.regularized:
            self.regularizer = WSDRRegularizer(
                model,
                strength=config.strength,
                reduction="mean" if config.preset == "official" else "sum",
            )
        self.annealing = (
            SignGradientSchedule(model, config.epochs) if uses_annealing(model) else None
        )
        self.meter = RateMeter(model)
        self.train_tally = self.test_tally = Tally(torch.device("cpu"))
        self.graph: StepGraph | None = None
        if setting.records(config):
            self.graph = StepGraph(self.losses, model)
            self.automatic_optimization = False

    # -- forward and loss

    def forward(self, x: Tensor) -> Tensor:
        """Logits [T, N, classes] of images [N, C, H, W] or frames [T, N, C, H, W]."""
        logits: Tensor = self.model(setting.arranged(x, self.config.memory_format))
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy averaged over time steps and samples (first term of Eq. 18).

        ``mean_logits`` takes that of the logits averaged over time instead, and ``tet`` mixes in
        the second term of TET (Deng et al., ICLR 2022), the squared distance of every time step's
        logits from 1.
        """
        steps = logits.shape[0]
        if self.config.loss == "mean_logits":
            loss = nnf.cross_entropy(logits.mean(0).float(), labels)
        else:
            loss = nnf.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(steps))
        if self.config.tet:
            distance = (logits.float() - 1).square().mean()
            loss = (1 - self.config.tet) * loss + self.config.tet * distance
        return loss

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss of a batch (Eq. 18), its part of the tally, and whether loss and input are finite.

        Nothing in it waits for the device: it is what :class:`StepGraph` records.
        """
        logits = self(x)
        loss = self.loss(logits, labels)
        term = self._term(loss)
        share = self.config.distillation
        if self.teacher is not None and share:
            total = (1 - share) * loss + share * self.teacher.loss(x, logits) + term
        else:
            total = loss + term
        # A neuron makes no spike of NaN, so a bad input need not show in the loss.
        return total, count(logits, labels, loss, term), finite(total, x)

    def _term(self, loss: Tensor) -> Tensor:
        return torch.zeros_like(loss) if self.regularizer is None else self.regularizer()

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """The loss of one batch; data parallel training averages its gradient over processes."""
        x, labels = batch
        total, counted, sound = (self.losses if self.graph is None else self.graph)(x, labels)
        if not sound:
            self._stop(x, total, index)
        self.train_tally.add(counted)
        if self.graph is not None:  # gradients are there; Lightning's loop leaves the rest to us
            self.optimizers().step()  # type: ignore[union-attr]
            self.lr_schedulers().step()  # type: ignore[union-attr]
        return total

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Count right answers and spikes of one test batch."""
        x, labels = batch
        logits = self(x)
        loss = self.loss(logits, labels)
        # Also taken here, so that no spikes of the test set are left in the next training step's.
        self.test_tally.add(count(logits, labels, loss, self._term(loss)))

    def test_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        """Likewise, for the one look at the test set that runs with held-out samples take."""
        self.validation_step(batch, index)

    def on_test_epoch_start(self) -> None:
        """Start counting answers; the spikes counted stay those of the last epoch."""
        self.test_tally = Tally(self.device)

    def _stop(self, x: Tensor, loss: Tensor, index: int) -> None:
        where = f"in epoch {self.current_epoch + 1}, batch {index + 1}"
        kept = "checkpoints of earlier epochs are kept."
        # A fault of the data, whatever it then does to the loss.
        if not torch.isfinite(x).all():
            raise TrainingError(
                f"The input batch holds NaN or infinity {where}; mend the data set, or its cache. "
                f"All {kept}"
            )
        raise DivergenceError(
            f"The loss became {loss.item()} {where}; first to go non-finite: "
            f"{first_nonfinite(self, x)}. Try a lower --lr, --clip 1, or "
            f"--precision 32-true; {kept}"
        )

    # -- epochs

    def on_train_epoch_start(self) -> None:
        """Start counting."""
        self.train_tally = Tally(self.device)

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        """Whatever is random inside the network depends on seed, epoch, batch and process."""
        if index == 0 and self.annealing is not None:
            self.annealing.load_state_dict({"epoch": self.current_epoch})
        torch.manual_seed(mix(self.config.seed, self.current_epoch, index, self.global_rank))

    def on_train_epoch_end(self) -> None:
        """Stop before a checkpoint is made of weights that are no numbers; spikes hide them."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise DivergenceError(
                    f"After epoch {self.current_epoch + 1} {name!r} holds NaN or infinity. Try a "
                    "lower --lr, --clip 1, or --precision 32-true; checkpoints of earlier epochs "
                    "are kept."
                )

    def on_validation_epoch_start(self) -> None:
        """Start counting answers and spikes."""
        self.test_tally = Tally(self.device)
        self.meter.start()

    def on_validation_epoch_end(self) -> None:
        """Stop counting spikes."""
        self.meter.stop()

    # -- optimizer

    def configure_optimizers(self) -> Any:
        """The optimizer and a cosine from the highest rate to zero, after the warm-up."""
        config = self.config
        groups = decay_groups(self.model, config.weight_decay)
        if config.latent_lr != 1 or config.latent_weight_decay is not None:
            decay = config.latent_weight_decay
            groups = split_latent(
                self.model,
                groups,
                lr=config.lr * config.latent_lr,
                weight_decay=config.weight_decay if decay is None else decay,
            )
        optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
        else:
            optimizer = torch.optim.Adam(groups, lr=config.lr)
        total = config.epochs * self.steps_per_epoch
        warm = config.warmup * self.steps_per_epoch

        def factor(step: int) -> float:
            if step < warm:
                return (step + 1) / (warm + 1)
            return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with and without weight decay.

    Weights of convolutions and linear layers have two or more dimensions; batch norm's scales and
    shifts, biases and learnable neuron constants have fewer, and do not decay.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def split_latent(
    model: nn.Module, groups: list[dict[str, Any]], **options: float
) -> list[dict[str, Any]]:
    """Parameter groups in which the latent weights of binary layers have a group of their own.

    Args:
        model: The network.
        groups: Its parameter groups.
        options: Of the latent weights' group: ``lr`` and ``weight_decay``.

    """
    latent = [layer.weight for layer in binary_layers(model)]
    theirs = {id(weight) for weight in latent}
    others = [
        {**group, "params": [p for p in group["params"] if id(p) not in theirs]} for group in groups
    ]
    return [*others, {"params": latent, **options}]


def first_nonfinite(training: Training, x: Tensor) -> str:
    """Where NaN or infinity first appears when a batch passes through the network.

    Args:
        training: The run.
        x: The batch's input, all finite.

    Returns:
        A description that names the layer, or the loss.

    """
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if found:
                return
            kind = type(module).__name__
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for key, tensor in own:
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    found.append(f"layer '{name}' ({kind}), whose {key} is not finite")
                    return
            for tensor in output if isinstance(output, tuple | list) else (output,):
                if isinstance(tensor, Tensor) and not torch.isfinite(tensor).all():
                    found.append(f"layer '{name}' ({kind}), whose output is not finite")
                    return

        return hook

    # Innermost modules finish first, so the first report is the innermost culprit.
    handles = [m.register_forward_hook(watch(n)) for n, m in training.model.named_modules() if n]
    try:
        with torch.no_grad():
            training(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss alone (every layer's output is finite)"
