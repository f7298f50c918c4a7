"""A report ends with what would have needed less, from the planner, where asking takes little of the time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.core import ReportWarning
from lightning_memtrain.planning import Device
from lightning_memtrain.planning.fit import suggest as suggesting
from lightning_memtrain.report import suggestions
from lightning_memtrain.report.outputs.report_table import print_table
from tests.helpers.stand_in_search import StandInSearch
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]

ENOUGH: dict[str, Any] = {"device": Device("cpu", 2**30), "limit_bytes": 2**30}


class Net(pl.LightningModule):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)
        self.fails_at = fails_at

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        if index == self.fails_at:
            raise torch.OutOfMemoryError("injected: out of memory")
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> StandInSearch:
    """As if every run had taken long enough."""
    search = StandInSearch()
    monkeypatch.setattr(suggesting, "find_ways", search)
    monkeypatch.setattr(suggestions, "_SHARE", 1e9)
    return search


def reported(folder: Path, model: Net, *callbacks: Any) -> mt.MemoryReport:
    profiler = mt.MemoryProfiler(report_dir=folder)
    data = DataLoader(torch.ones(16, 16), batch_size=8)
    try:
        quiet_trainer(folder, profiler, *callbacks).fit(model, data)
    except torch.OutOfMemoryError:
        assert model.fails_at is not None
    assert profiler.report is not None
    return profiler.report


def test_the_report_ends_with_two_lines_to_paste(tmp_path: Path, asked: StandInSearch) -> None:
    report = reported(tmp_path, Net())
    assert report.suggestions == ("Microbatching(microbatch_size=1): 2.16 KiB, +8 % time",)
    out = io.StringIO()
    print_table(report, out)
    assert out.getvalue().endswith(
        "Less memory, for `callbacks`:\n  Microbatching(microbatch_size=1): 2.16 KiB, +8 % time\n"
    )
    assert mt.MemoryReport.load(tmp_path / "memory_report.json") == report


def test_after_running_out_of_memory_it_says_what_would_have_fitted(
    tmp_path: Path, asked: StandInSearch
) -> None:
    report = reported(tmp_path, Net(fails_at=1))
    assert report.out_of_memory is not None
    assert report.out_of_memory.held_bytes < 612 + 1600  # so that even the least is too much
    assert report.suggestions == ()
    ways = suggesting.best_ways(asked(Net(), torch.ones(8, 16), **ENOUGH), 612 + 3 * 1600)
    assert [str(way) for way in ways] == [
        "Microbatching(microbatch_size=2)",
        "Microbatching(microbatch_size=1)",
    ]


def test_a_short_run_is_not_kept_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = StandInSearch()
    monkeypatch.setattr(suggesting, "find_ways", search)
    assert reported(tmp_path, Net()).suggestions == ()
    assert search.calls == []


def test_what_was_planned_gets_no_suggestions(
    tmp_path: Path, asked: StandInSearch, stand_in: StandInSearch
) -> None:
    assert reported(tmp_path, Net(), mt.FitMemory("1GiB")).suggestions == ()
    assert asked.calls == []


def test_whatever_goes_wrong_ends_neither_run_nor_report(
    tmp_path: Path, asked: StandInSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise ValueError("no way")

    monkeypatch.setattr(suggesting, "find_ways", fail)
    with pytest.warns(ReportWarning, match="could not find out what would need less: ValueError: no way"):
        assert reported(tmp_path, Net()).suggestions == ()
