"""Lightning: a callback that logs, anneals and calibrates, and checkpoints that know quantizers.

Both work with any ``LightningModule`` that holds a model of either host, in the usual way:

    class Classifier(QuantizedCheckpoints, LightningModule): ...

    Trainer(callbacks=[SpikingCallback(calibration_batches=20)]).fit(classifier, loader)
    Classifier.load_from_checkpoint(path)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qsnn_ext import functional as F
from qsnn_ext import hosts
from qsnn_ext.calibration import calibrate
from qsnn_ext.checkpoint import restore_structure, structure
from qsnn_ext.errors import ConfigError, InputError, MissingDependencyError
from qsnn_ext.layers import BinaryLayer
from qsnn_ext.regularizers import SignGradientSchedule

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingDependencyError(
        f"qsnn_ext.lightning needs lightning, which could not be imported ({error}); install it "
        "with: pip install 'qsnn_ext[lightning]'."
    ) from error


class QuantizedCheckpoints:
    """Mixin before ``LightningModule``: checkpoints say which module has which quantizer.

    So ``load_from_checkpoint`` and ``fit(ckpt_path=)`` rebuild a quantized model, calibrated or
    folded or not, in a module whose ``__init__`` builds the float one; if ``__init__`` quantizes
    already, what the checkpoint says holds.
    """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the structure beside the ``state_dict``."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        checkpoint["qsnn_ext"] = structure(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Quantize as the checkpoint was, before its ``state_dict`` is loaded.

        Raises:
            CheckpointError: the checkpoint is of another architecture or a newer version.
        """
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        header = checkpoint.get("qsnn_ext")
        if header is not None:  # else it was written without this mixin
            assert isinstance(self, nn.Module)
            restore_structure(self, header, checkpoint["state_dict"], "the checkpoint")


class SpikingCallback(Callback):
    """Logs rates and entropies, anneals sign gradients, freezes membrane scales at the end.

    Logged for every epoch of validation and test: ``p_s/<layer>`` (firing rate: the share of a
    spiking layer's outputs that are not zero), ``H_s/<layer>`` (its entropy in nats, Eq. 14),
    ``p_w/<layer>`` (share of positive signs of a binary layer), and the rate of all layers
    together, ``p_s``. Rates are counted on the device and over all processes.

    Annealed sign gradients (:class:`~qsnn_ext.SignGradientSchedule`) move with the epoch, also when
    training resumes in the middle; a model without any is left alone.

    Args:
        log: what to log: ``"layers"``, ``"total"`` (only ``p_s``) or ``None``.
        anneal: whether to move the sign gradients' temperature.
        calibration_batches: how many training batches :func:`~qsnn_ext.calibrate` sees at the end
            of the last epoch, before the checkpoint is written; 0 for no calibration.
        statistic: of the frozen scale, see :func:`~qsnn_ext.calibrate`.
        forward: ``forward(module, batch)`` runs one training batch in calibration; by default
            ``module(batch[0])``.

    Raises:
        ConfigError: an unknown ``log``, or a negative number of batches.
    """

    def __init__(
        self,
        log: Literal["layers", "total"] | None = "layers",
        anneal: bool = True,
        calibration_batches: int = 0,
        statistic: Literal["mean", "max", "percentile"] = "mean",
        forward: Callable[[nn.Module, Any], Any] | None = None,
    ) -> None:
        if log not in ("layers", "total", None):
            raise ConfigError(f"log={log!r} is unknown; choose 'layers', 'total' or None.")
        if calibration_batches < 0:
            raise ConfigError(f"calibration_batches={calibration_batches!r} must be 0 or more.")
        self.what = log  # Lightning puts a function named log into callbacks
        self.anneal = anneal
        self.calibration_batches = calibration_batches
        self.statistic = statistic
        self.forward = forward
        self._handles: list[Any] = []
        self._spikes: dict[str, Tensor] = {}
        self._outputs: dict[str, int] = {}
        self._schedule: SignGradientSchedule | None = None

    # -- rates and entropies

    def _start(self, module: LightningModule) -> None:
        self._stop()
        self._spikes, self._outputs = {}, {}
        if self.what is None:
            return
        for name, layer in module.named_modules():
            if hosts.adapter_of(layer) is not None:
                self._handles.append(layer.register_forward_hook(self._count(name)))

    def _count(self, name: str) -> Callable[..., None]:
        def count(layer: nn.Module, args: Any, output: Any) -> None:
            spikes = hosts.spikes(output)
            if isinstance(spikes, Tensor):
                fired = torch.count_nonzero(spikes.detach())
                self._spikes[name] = self._spikes.get(name, 0) + fired
                self._outputs[name] = self._outputs.get(name, 0) + spikes.numel()

        return count

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        self._stop()
        if not self._spikes:
            return
        spikes = torch.stack([s.to(torch.float64) for s in self._spikes.values()])
        outputs = torch.tensor(list(self._outputs.values())).to(spikes)
        spikes, outputs = (
            trainer.strategy.reduce(count, reduce_op="sum") for count in (spikes, outputs)
        )
        values = {"p_s": (spikes.sum() / outputs.sum()).item()}
        if self.what == "layers":
            for name, rate in zip(self._spikes, (spikes / outputs).tolist(), strict=True):
                values[f"p_s/{name}"] = rate
                values[f"H_s/{name}"] = F.entropy(torch.tensor(rate, dtype=torch.float64)).item()
            for name, layer in module.named_modules():
                if isinstance(layer, BinaryLayer):
                    codes, _ = layer.codes()
                    values[f"p_w/{name}"] = (codes > 0).double().mean().item()
        for name, value in values.items():
            module.log(name, value, rank_zero_only=False, sync_dist=False)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count spikes."""
        self._start(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was counted."""
        self._report(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count spikes."""
        self._start(pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log what was counted."""
        self._report(trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind."""
        self._stop()

    # -- annealing and calibration

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the temperature of this epoch."""
        if not self.anneal:
            return
        if self._schedule is None:
            if trainer.max_epochs is None or trainer.max_epochs < 1:
                raise ConfigError(
                    "annealing needs Trainer(max_epochs=...), as the temperature goes by the share "
                    "of epochs; give it, or SpikingCallback(anneal=False)."
                )
            self._schedule = SignGradientSchedule(pl_module, trainer.max_epochs)
        self._schedule.load_state_dict({"epoch": trainer.current_epoch})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In the last epoch: freeze the scales, before checkpoints are written."""
        last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs
        if self.calibration_batches and last:
            calibrate(
                pl_module,
                list(self._batches(trainer, pl_module)),
                statistic=self.statistic,
                forward=self.forward,
            )

    def _batches(self, trainer: Trainer, module: LightningModule) -> Iterator[Any]:
        loader = trainer.train_dataloader
        if loader is None:
            raise InputError("there is no training data to calibrate with.")
        for batch in itertools.islice(iter(loader), self.calibration_batches):
            yield module.transfer_batch_to_device(batch, module.device, 0)
