"""What techniques say of themselves reaches the report of a real run."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_memtrain.coordination import annotate
from lightning_memtrain.core import ReportWarning, TechniqueRecord
from lightning_memtrain.report import MemoryProfiler, MemoryReport
from lightning_memtrain.report.trainer_state import technique_records
from tests.helpers.boring_models import BoringModel
from tests.helpers.trainers import LIGHTNING_WARNINGS, fit, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class Halving(Callback):
    """Halves its size in every step."""

    exact = True

    def __init__(self) -> None:
        self.size = 8
        self.events: list[str] = []

    def technique_record(self) -> TechniqueRecord:
        return TechniqueRecord("Halving", {"size": self.size}, tuple(self.events))

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.size //= 2
        self.events.append(f"step {trainer.global_step - 1}: size={self.size}")


class HalfStrategy(SingleDeviceStrategy):
    exact = False

    def technique_record(self) -> TechniqueRecord:
        return TechniqueRecord("HalfStrategy")


class HalfPrecision(Precision):
    exact = False

    def technique_record(self) -> TechniqueRecord:
        return TechniqueRecord("HalfPrecision", {"dtype": "bf16"})


class Broken(Halving):
    def technique_record(self) -> Any:
        raise ZeroDivisionError("no record")


class WrongType(Halving):
    def technique_record(self) -> Any:
        return {"name": "WrongType"}


class InTwoParts(BoringModel):
    """Marks the parts of its step, as a technique would."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        losses = []
        for part, rows in enumerate(batch.chunk(2), start=1):
            annotate(f"microbatch {part} of 2")
            losses.append(self.loss(rows))
        return torch.stack(losses).mean()


def test_callbacks_strategy_and_precision_are_asked_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    profiler, halving = MemoryProfiler(), Halving()
    strategy = HalfStrategy(device=torch.device("cpu"))
    trainer = quiet_trainer(tmp_path, profiler, halving, strategy=strategy, plugins=[HalfPrecision()])
    trainer.fit(BoringModel(num_batches=3, num_val_batches=1))
    assert profiler.report is not None
    steps = ("step 0: size=4", "step 1: size=2", "step 2: size=1")
    assert profiler.report.techniques == (
        TechniqueRecord("Halving", {"size": 1}, steps),
        TechniqueRecord("HalfStrategy"),
        TechniqueRecord("HalfPrecision", {"dtype": "bf16"}),
    )
    assert MemoryReport.load(tmp_path / "memory" / "memory_report.json") == profiler.report
    printed = capsys.readouterr().out
    assert "Technique: Halving(size=1)\n  step 0: size=4\n" in printed
    assert "Technique: HalfPrecision(dtype='bf16')\n" in printed


def test_a_run_without_techniques_names_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    profiler = MemoryProfiler()
    fit(BoringModel(num_batches=1), profiler, tmp_path)
    assert profiler.report is not None
    assert profiler.report.techniques == ()
    assert "Technique" not in capsys.readouterr().out


def test_a_run_that_fails_has_them_too(tmp_path: Path):
    class OutOfMemory(BoringModel):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
            loss = self.loss(batch)
            if batch_idx == 1:
                raise torch.OutOfMemoryError("full")
            return loss

    profiler = MemoryProfiler()
    with pytest.raises(torch.OutOfMemoryError):
        quiet_trainer(tmp_path, Halving(), profiler, limit_val_batches=0).fit(OutOfMemory())
    assert profiler.report is not None
    assert profiler.report.techniques == (TechniqueRecord("Halving", {"size": 4}, ("step 0: size=4",)),)


@pytest.mark.parametrize(
    ("technique", "reason"),
    [
        (Broken, "ZeroDivisionError: no record"),
        (WrongType, r"TypeError: expected a TechniqueRecord, but got \{'name': 'WrongType'\}"),
    ],
)
def test_a_technique_that_cannot_say_is_left_out_with_a_warning(technique: Any, reason: str, tmp_path: Path):
    profiler = MemoryProfiler()
    trainer = quiet_trainer(tmp_path, technique(), Halving(), profiler, limit_val_batches=0)
    message = (
        rf"`MemoryProfiler` could not ask {technique.__name__} for its `technique_record\(\)`, "
        rf"so the report does without: {reason}"
    )
    with pytest.warns(ReportWarning, match=message):
        trainer.fit(BoringModel(num_batches=1))
    assert profiler.report is not None
    assert [record.name for record in profiler.report.techniques] == ["Halving"]


def test_each_technique_is_asked_once_and_mocks_are_not():
    both = Halving()
    trainer = MagicMock(callbacks=[both, MagicMock(), Callback()], strategy=both)
    assert technique_records(trainer) == (TechniqueRecord("Halving", {"size": 8}),)


def test_marks_of_a_technique_are_on_the_timeline(tmp_path: Path):
    profiler = MemoryProfiler()
    fit(InTwoParts(num_batches=1), profiler, tmp_path, limit_val_batches=0)
    names = [event.name for event in profiler.breakdowns["fit"].timeline]
    first, second = names.index("microbatch 1 of 2"), names.index("microbatch 2 of 2")
    assert "forward body" in names[first:second]
    assert "forward body" in names[second : names.index("backward")]
