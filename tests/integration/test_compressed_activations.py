"""Training with compressed activations: it learns as without, alone and with everything around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_memtrain import CompressedActivations, MemoryProfiler, MemoryReport, Microbatching
from lightning_memtrain.core import Category
from lightning_memtrain.precision import ActivationCodec
from tests.helpers.trainers import assert_torch_is_as_found, quiet_trainer
from tests.helpers.two_ranks import TwoRanks

NUM_CLASSES = 10


def digits(num_images: int, seed: int) -> TensorDataset:
    """Noisy copies of ten 8x8 patterns."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(NUM_CLASSES, 1, 8, 8, generator=generator)
    generator.manual_seed(seed)
    labels = torch.randint(0, NUM_CLASSES, (num_images,), generator=generator)
    return TensorDataset(
        patterns[labels] + 1.5 * torch.randn(num_images, 1, 8, 8, generator=generator), labels
    )


class Classifier(LightningModule):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(16 * 64, NUM_CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images)
        hidden = (
            checkpoint(self.body, hidden, use_reentrant=False) if self.checkpointed else self.body(hidden)
        )
        return self.head(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(digits(64 * 20, seed=1 + self.global_rank), batch_size=64)


def fit(
    folder: Path, *callbacks: Any, model: LightningModule | None = None, **options: Any
) -> tuple[float, Any]:
    """Loss on fresh images after training, and the model."""
    torch.manual_seed(0)
    model = Classifier() if model is None else model
    torch.manual_seed(1)
    trainer = quiet_trainer(folder, *callbacks, **{"max_epochs": 2} | options)
    trainer.fit(model)
    images, labels = digits(512, seed=99).tensors
    model.float().eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(images), labels)), model


def compressed(bits: int, **options: Any) -> CompressedActivations:
    return CompressedActivations(ActivationCodec(bits=bits, min_numel=1024, compiled=False, **options))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> float:
    loss, _ = fit(tmp_path_factory.mktemp("plain"))
    assert loss < 0.35  # untrained: 2.3
    return loss


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_it_learns_as_without(bits: int, stochastic: bool, plain: float, tmp_path: Path) -> None:
    callback = compressed(bits, stochastic=stochastic)
    loss, model = fit(tmp_path, callback)
    assert abs(loss - plain) < 0.1 * plain
    assert "kept" in callback.technique_record().events[0]
    assert_torch_is_as_found(model)


def test_two_bits_learn(plain: float, tmp_path: Path) -> None:
    assert fit(tmp_path, compressed(2))[0] < 2 * plain


def test_with_microbatching(plain: float, tmp_path: Path) -> None:
    callback = compressed(8)
    loss, _ = fit(tmp_path, callback, Microbatching(num_microbatches=4))
    assert abs(loss - plain) < 0.2 * plain  # batch normalisation sees chunks
    (event,) = callback.technique_record().events
    assert event.startswith("kept 5 tensors of 320.00 KiB")  # of a chunk of 16 images: 16 channels, 64 pixels


def test_around_checkpointing(plain: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpointed, callback = Classifier(checkpointed=True), compressed(8)
    loss, _ = fit(tmp_path, callback, model=checkpointed)
    assert abs(loss - plain) < 0.1 * plain


def test_inside_of_checkpointing_is_refused(tmp_path: Path) -> None:
    class Inside(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            packing = ActivationCodec(min_numel=1024).packing(self)

            def packed(images: Tensor) -> Tensor:
                with packing:
                    return self(images)

            scores = checkpoint(packed, batch[0].requires_grad_(), use_reentrant=False)
            return F.cross_entropy(scores, batch[1])

    with pytest.raises(RuntimeError, match="must be entered around activation checkpointing"):
        fit(tmp_path, model=Inside())


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_with_lightnings_precisions(precision: str, plain: float, tmp_path: Path) -> None:
    loss, _ = fit(tmp_path, compressed(8), precision=precision)
    assert loss < 1.5 * plain


def test_the_report_names_it_and_shows_fewer_bytes_of_activations(tmp_path: Path) -> None:
    held = []
    for name, callbacks in {"plain": [], "packed": [compressed(8)]}.items():
        folder = tmp_path / name
        fit(tmp_path, *callbacks, MemoryProfiler(report_dir=folder), max_epochs=1, limit_train_batches=4)
        report = MemoryReport.load(folder / "memory_report.json")
        held.append(report.stages["fit"].maxima[Category.ACTIVATIONS])
    assert [technique.name for technique in report.techniques] == ["CompressedActivations"]
    assert held[1] < 0.4 * held[0]


def check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    callback = compressed(4, stochastic=True)
    loss, model = fit(folder, callback, strategy=DDPStrategy(), devices=2)
    events = list(callback.technique_record().events)
    return {"loss": loss, "weights": [p.tolist() for p in model.parameters()], "events": events}


@pytest.mark.slow
def test_two_processes(plain: float, tmp_path: Path) -> None:
    with TwoRanks(check, tmp_path) as ranks:
        first, second = ranks("4 bits")
    assert isinstance(first, dict), first
    assert first["weights"] == second["weights"]
    assert first["loss"] < 1.5 * plain
    assert first["events"] == second["events"] != []
