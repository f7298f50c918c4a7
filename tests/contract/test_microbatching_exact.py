"""Microbatched training equals unsplit training: gradients, parameters, logs, outputs, counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_memtrain.microbatching import Microbatching
from tests.helpers.trainers import LIGHTNING_WARNINGS
from tests.helpers.twin_runs import assert_same_run, train

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

PADDING = -100
Batch = dict[str, Tensor]


def token_batches(num: int = 10, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Batches of 12 or 7 samples of 5 tokens, some of them padding; samples 3 to 5 have none but padding."""
    generator = torch.Generator().manual_seed(3)
    batches = []
    for index in range(num):
        size = 7 if index % 5 == 4 else 12
        tokens = torch.randn(size, 5, 6, dtype=dtype, generator=generator)
        labels = torch.randint(4, (size, 5), generator=generator)
        labels[torch.rand(size, 5, generator=generator) < 0.3] = PADDING
        labels[3:6] = PADDING
        batches.append({"tokens": tokens, "labels": labels})
    return batches


def valid_tokens(batch: Batch) -> Tensor:
    return (batch["labels"] != PADDING).sum()


class TokenClassifier(LightningModule):
    """A small network that logs in all ways that Lightning knows."""

    def __init__(self, reduction: str = "mean", dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        self.reduction = reduction
        self.accuracy = MulticlassAccuracy(4, average="micro", ignore_index=PADDING)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.reduction == "samples":  # a mean over samples, whatever their tokens
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=PADDING, reduction="none")
            return losses.sum(1).mean()
        return F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=PADDING, reduction=self.reduction
        )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        logits = self.net(batch["tokens"])
        loss = self.loss(logits, batch["labels"])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("loss_max", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("num_tokens", valid_tokens(batch).to(logits), on_step=True, on_epoch=True, reduce_fx="sum")
        self.log("largest", logits.detach().max(), on_step=True, on_epoch=True, reduce_fx="max")
        self.log("batch_idx", float(batch_idx), on_step=True, on_epoch=False)
        self.accuracy(logits.flatten(0, 1), batch["labels"].flatten())
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits.detach(), "name": "tokens"}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


@dataclass
class Case:
    """One setting in which both runs are made."""

    model: Callable[[], LightningModule] = TokenClassifier
    split: dict[str, Any] = field(default_factory=lambda: {"num_microbatches": 3})
    trainer: dict[str, Any] = field(default_factory=dict)
    batches: Callable[[], list[Any]] = token_batches


class Scheduled(TokenClassifier):
    """Two schedulers, one stepping per step and one per epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9, nesterov=True)
        per_step = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
        per_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [
            {"scheduler": per_step, "interval": "step"},
            {"scheduler": per_epoch, "interval": "epoch"},
        ]


class SecondOrder(TokenClassifier):
    """LBFGS evaluates its closure several times per step."""

    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=2, history_size=2)


TOKENS = {"weight_fn": valid_tokens}
CASES = {
    "mean": Case(lambda: TokenClassifier("samples")),
    "sum": Case(lambda: TokenClassifier("sum"), {"num_microbatches": 3, "loss_reduction": "sum"}),
    "tokens": Case(split={"num_microbatches": 3} | TOKENS),
    "tokens, a chunk without any": Case(split={"microbatch_size": 3} | TOKENS),
    "sample by sample": Case(lambda: TokenClassifier("samples"), {"microbatch_size": 1}),
    "more chunks than samples": Case(lambda: TokenClassifier("samples"), {"num_microbatches": 100}),
    "one chunk": Case(split={"num_microbatches": 1}),
    "clipped by norm": Case(split={"num_microbatches": 4} | TOKENS, trainer={"gradient_clip_val": 0.1}),
    "clipped by value": Case(
        split={"num_microbatches": 4} | TOKENS,
        trainer={"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "accumulated": Case(split={"num_microbatches": 3} | TOKENS, trainer={"accumulate_grad_batches": 4}),
    "schedulers": Case(Scheduled, {"num_microbatches": 3} | TOKENS),
    "LBFGS": Case(SecondOrder, {"num_microbatches": 3} | TOKENS),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_float64_run_equals_the_unsplit_one(case: Case, tmp_path: Path) -> None:
    plain = train(case.model, case.batches(), tmp_path, **case.trainer)
    split = train(case.model, case.batches(), tmp_path, Microbatching(**case.split), **case.trainer)
    assert plain.trainer.global_step >= 4
    assert_same_run(plain, split)
