"""How the wide residual network is trained: loss, optimizer, learning rate, accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassAccuracy

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.microbatching import GroupNorm, replace_batchnorm
from lightning_memtrain.precision import SGD8bit

from .model import WideResNet


class WideResNetClassifier(pl.LightningModule):
    r"""A wide residual network trained by SGD with Nesterov momentum and a learning rate in steps.

    The rate is ``lr`` :math:`\times` ``lr_decay`` :math:`^m` after :math:`m` of the milestones have passed.
    Milestones are fractions of the whole run: the defaults are epochs 60, 120 and 160 of 200, and of a run
    of 50 epochs they are 15, 30 and 40. The whole run is what the Trainer will really do, in optimizer steps:
    ``max_epochs``, or ``max_steps`` if that ends it earlier. The rate changes exactly at a milestone, which
    with ``max_steps`` may lie inside an epoch.

    Logs ``train/loss``, ``train/accuracy`` (of every step), ``val/loss``, ``val/accuracy``, ``test/loss`` and
    ``test/accuracy`` (over the whole set). Accuracy is a fraction in ``[0, 1]``.

    Args:
        depth: see :class:`WideResNet`.
        widen_factor: see :class:`WideResNet`.
        num_classes: see :class:`WideResNet`.
        dropout: see :class:`WideResNet`.
        norm: ``"batch"``, as in the paper, or ``"group"``, which sees one image at a time, so that
            microbatches of any size give the gradients of the whole batch.
        channels_per_group: fewest channels of a group of group norm; at least 1.
        lr: learning rate up to the first milestone, above 0.
        momentum: Nesterov momentum, in ``(0, 1)``.
        momentum_bits: per number of the momentum; 8 for :class:`~lightning_memtrain.precision.SGD8bit`.
        weight_decay: L2 penalty on all parameters, as in the paper; at least 0.
        lr_milestones: increasing fractions of the run, each in ``(0, 1)``; none for a constant rate.
        lr_decay: factor on the learning rate at each milestone, in ``(0, 1]``.

    Raises:
        ArgumentError: if an argument lies outside its range.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 2,
        num_classes: int = 10,
        dropout: float = 0.0,
        norm: Literal["batch", "group"] = "batch",
        channels_per_group: int = 4,
        lr: float = 0.1,
        momentum: float = 0.9,
        momentum_bits: Literal[32, 8] = 32,
        weight_decay: float = 5e-4,
        lr_milestones: Sequence[float] = (0.3, 0.6, 0.8),
        lr_decay: float = 0.2,
    ) -> None:
        super().__init__()
        _require("norm", norm, norm in ("batch", "group"), "'batch' or 'group'")
        _require("lr", lr, lr > 0, "above 0")
        _require("momentum", momentum, 0 < momentum < 1, "in (0, 1), because Nesterov's step needs it")
        _require("momentum_bits", momentum_bits, momentum_bits in (32, 8), "32 or 8")
        _require("weight_decay", weight_decay, weight_decay >= 0, "at least 0")
        _require("lr_decay", lr_decay, 0 < lr_decay <= 1, "in (0, 1]")
        lr_milestones = list(lr_milestones)
        increasing = lr_milestones == sorted(set(lr_milestones))
        _require(
            "lr_milestones",
            lr_milestones,
            increasing and all(0 < fraction < 1 for fraction in lr_milestones),
            "increasing fractions of the run in (0, 1), such as 0.3 for epoch 60 of 200",
        )
        self.save_hyperparameters()
        self.model = WideResNet(depth, widen_factor, num_classes, dropout)
        if norm == "group":
            replace_batchnorm(self.model, GroupNorm(channels_per_group=channels_per_group))
        # The data module has checked the labels; torchmetrics' own check would wait for the device.
        for stage in ("train", "val", "test"):
            accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
            setattr(self, f"{stage}_accuracy", accuracy)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores of normalised images; see :meth:`WideResNet.forward`."""
        scores: Tensor = self.model(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of one batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the held-out training images."""
        self._step(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the test images."""
        self._step(batch, "test")

    def _step(self, batch: tuple[Tensor, Tensor], stage: str) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        accuracy = getattr(self, f"{stage}_accuracy")
        accuracy(logits.detach(), labels)
        self.log_dict({f"{stage}/loss": loss, f"{stage}/accuracy": accuracy}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        """SGD and its learning rate per optimizer step.

        Returns:
            Lightning's dictionary of an optimizer and a scheduler.

        Raises:
            MisconfigurationException: if the run has no end of which the milestones could be fractions.
        """
        hparams = self.hparams
        sgd = SGD8bit if hparams["momentum_bits"] == 8 else torch.optim.SGD
        optimizer = sgd(
            self.parameters(),
            lr=hparams["lr"],
            momentum=hparams["momentum"],
            nesterov=True,
            weight_decay=hparams["weight_decay"],
        )
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise MisconfigurationException(
                "`WideResNetClassifier(lr_milestones)` are fractions of the run, but "
                f"Trainer(max_epochs={self.trainer.max_epochs}, max_steps={self.trainer.max_steps}) "
                "never ends. Set `max_epochs` or `max_steps`."
            )
        factor = step_decay([round(f * total_steps) for f in hparams["lr_milestones"]], hparams["lr_decay"])
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def step_decay(milestone_steps: Sequence[int], decay: float) -> Any:
    """A learning rate's factor that falls at each milestone.

    Args:
        milestone_steps: optimizer steps before which the rate falls.
        decay: factor per milestone.

    Returns:
        A function from the number of optimizer steps done to ``decay ** milestones passed``.

    Example:
        >>> factor = step_decay([60, 120], 0.5)
        >>> [factor(step) for step in (0, 59, 60, 119, 120)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    return lambda step: float(decay ** sum(step >= milestone for milestone in milestone_steps))


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise ArgumentError(f"`WideResNetClassifier({name})` must be {expected}, but got {name}={value}.")
