from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lightning_memtrain.core import MIB, Category
from lightning_memtrain.report import MemoryProfiler, MemoryReport
from tests.helpers.boring_models import PARAMETER_BYTES, BoringModel, loader
from tests.helpers.trainers import quiet_trainer
from tests.helpers.two_ranks import TwoRanks

WIDER = 256


class Uneven(BoringModel):
    """Rank 1 needs more memory than rank 0, and rank 0 has more batches to predict."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        wide = batch.repeat(WIDER * (1 + self.global_rank), 1)
        loss = self.head(self.body(wide).relu()).mean()
        self.log("loss", loss, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.body(batch.repeat(WIDER * (1 + self.global_rank), 1))

    def predict_dataloader(self) -> DataLoader:
        return loader(3)  # two batches for rank 0, one for rank 1


def _fit_and_predict(name: str, folder: Path, rank: int) -> dict[str, float]:
    profiler = MemoryProfiler(every_n_steps=3)
    stopping = EarlyStopping(monitor="memory/ranks/max_peak_mib", mode="min", patience=5)
    trainer = quiet_trainer(folder / "fit", profiler, stopping, strategy="ddp", devices=2, max_epochs=2)
    trainer.fit(Uneven(num_batches=8, num_val_batches=4))
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}

    trainer = quiet_trainer(folder / "predict", MemoryProfiler(every_n_steps=1), strategy="ddp", devices=2)
    trainer.predict(Uneven(), return_predictions=False)
    return metrics


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """Two processes that have fitted and predicted."""
    with TwoRanks(_fit_and_predict, tmp_path_factory.mktemp("two_processes")) as ranks:
        assert all(isinstance(metrics, dict) for metrics in ranks("uneven")), ranks("uneven")
        yield ranks


@pytest.mark.slow
def test_the_report_is_that_of_rank_0_with_the_extremes_of_all(ranks: TwoRanks):
    report = MemoryReport.load(ranks.folder / "fit" / "memory" / "memory_report.json")
    assert [step.step for step in report.steps if step.stage == "fit"] == [0, 1, 2, 3, 6]
    own = report.stages["fit"]
    assert own.maxima[Category.PARAMETERS] == PARAMETER_BYTES
    assert report.ranks is not None
    assert report.ranks["world_size"] == 2
    assert report.ranks["min_peak_bytes"] == own.peak_bytes
    # Rank 1 tells of its last step only; the highest may have held a logged scalar more.
    last_bytes = round(ranks("uneven")[1]["memory/peak_mib"] * MIB)
    assert 0 <= report.ranks["max_peak_bytes"] - last_bytes <= 16
    assert report.growth == {"fit": (), "validate": ()}  # DDP's buckets are made once


@pytest.mark.slow
def test_all_ranks_know_the_extremes(ranks: TwoRanks):
    metrics = ranks("uneven")
    for prefix in ("memory", "memory/validate"):
        peaks = [own[f"{prefix}/peak_mib"] for own in metrics]
        assert peaks[0] < peaks[1]
        for own in metrics:
            assert own[f"{prefix}/ranks/min_peak_mib"] == peaks[0]
            assert own[f"{prefix}/ranks/max_peak_mib"] == peaks[1]


@pytest.mark.slow
def test_ranks_with_different_numbers_of_batches_meet(ranks: TwoRanks):
    report = MemoryReport.load(ranks.folder / "predict" / "memory" / "memory_report.json")
    assert [(step.stage, step.step) for step in report.steps] == [("predict", 0), ("predict", 1)]
    assert report.ranks is not None
    assert report.ranks["world_size"] == 2
