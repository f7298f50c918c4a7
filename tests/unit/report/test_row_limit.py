"""A report of very many modules is a file of moderate size, in which nothing is lost from the sums."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_memtrain import MemoryProfiler, MemoryReport
from lightning_memtrain.core import Category, CategoryBytes, MemoryBreakdown, ModuleMemory, TimelineEvent
from lightning_memtrain.report.row_limit import limit_rows
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)
SIZES = [field.name for field in fields(ModuleMemory) if field.name.endswith("_bytes")]


def report_of(names: list[str], held: list[int] | None = None) -> MemoryReport:
    rows = [
        ModuleMemory(name, "Linear", *(number + place for place in range(6)))
        for number, name in enumerate(names)
    ]
    events = [
        TimelineEvent(index, f"forward {index}", CategoryBytes({Category.ACTIVATIONS: num_bytes}))
        for index, num_bytes in enumerate(held or [])
    ]
    at_peak = CategoryBytes({Category.ACTIVATIONS: max(held or [0])})
    stage = MemoryBreakdown("cpu", at_peak, at_peak, "", modules=tuple(rows), timeline=tuple(events))
    return MemoryReport("Net", 1, "2026-01-01T00:00:00+00:00", {}, {"fit": stage})


def test_what_is_small_is_summed_by_the_module_around_it() -> None:
    report = report_of(["a.0", "a.1", "a.2", "b.0", "b.1", "c", "d.0", "d.1"])
    rows = limit_rows(report, 6).stages["fit"].modules
    assert [row.name for row in rows] == ["a.*", "b.*", "c", "d.0", "d.1"]
    assert [row.type_name for row in rows] == ["3 modules", "2 modules", "Linear", "Linear", "Linear"]
    assert rows[0] == ModuleMemory("a.*", "3 modules", *(0 + 1 + 2 + 3 * place for place in range(6)))


@pytest.mark.parametrize("max_rows", [2, 3, 7, 40, 399])
def test_rows_are_at_most_as_many_as_asked_for_and_their_sum_stays(max_rows: int) -> None:
    report = report_of([f"net.{i}.{j}.{k}" for i in range(4) for j in range(10) for k in range(10)])
    rows = limit_rows(report, max_rows).stages["fit"].modules
    assert len(rows) <= max_rows
    for name in SIZES:
        before = sum(getattr(row, name) for row in report.stages["fit"].modules)
        assert sum(getattr(row, name) for row in rows) == before
    largest = [f"net.3.9.{9 - place}" for place in range(max_rows // 2)][:10]
    assert {*largest} <= {row.name for row in rows}


@pytest.mark.parametrize("peak", range(0, 100, 9))
def test_the_highest_moment_stays(peak: int) -> None:
    held = [1] * 100
    held[peak] = 7
    moments = limit_rows(report_of([], held), 10).stages["fit"].timeline
    assert len(moments) <= 10
    (event,) = [event for event in moments if event.held.total_bytes == 7]
    assert (event.index, event.name) == (peak, f"forward {peak}")
    assert [event.index for event in moments] == sorted(event.index for event in moments)


def test_what_is_short_enough_is_left_alone() -> None:
    report = report_of(["a", "b"], [1, 2])
    assert limit_rows(report, 2) is report


class Wide(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(1700)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.layer(batch).square().mean() + self.net(batch[:, :4]).square().mean()


@pytest.mark.slow
def test_five_thousand_modules_fit_into_a_megabyte(tmp_path: Path) -> None:
    profiler = MemoryProfiler(report_dir=tmp_path)
    quiet_trainer(tmp_path, profiler, max_steps=1, limit_val_batches=1).fit(Wide())
    path = tmp_path / "memory_report.json"
    assert path.stat().st_size < 1e6
    assert profiler.report is not None
    loaded, whole = MemoryReport.load(path).stages["fit"], profiler.report.stages["fit"]
    assert len(whole.modules) > 1700
    assert loaded.at_peak == whole.at_peak
    assert sum(row.total_bytes for row in loaded.modules) == sum(row.total_bytes for row in whole.modules)


def test_all_rows_are_written_on_request(tmp_path: Path) -> None:
    profiler = MemoryProfiler(report_dir=tmp_path, max_rows=None)
    model = BoringModel()
    model.more = nn.Sequential(*(nn.Tanh() for _ in range(1100)))
    quiet_trainer(tmp_path, profiler, max_steps=1, limit_val_batches=0).fit(model)
    assert MemoryReport.load(tmp_path / "memory_report.json") == profiler.report


@pytest.mark.parametrize(("max_rows", "error"), [(1, ValueError), (True, TypeError), ("all", TypeError)])
def test_a_number_of_rows_that_is_none_is_refused(max_rows: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^`MemoryProfiler\(max_rows\)` must be .* but got max_rows="):
        MemoryProfiler(max_rows=max_rows)
