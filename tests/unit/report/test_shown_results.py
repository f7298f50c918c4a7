"""Reports, breakdowns and callbacks in a notebook and in a debugger."""

from __future__ import annotations

import html
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lightning_memtrain as mt
from lightning_memtrain.report.outputs.html import render_html
from tests.helpers.reports import deep_report, tiny_report


def test_reprs_are_short() -> None:
    assert repr(tiny_report()) == "<MemoryReport of TinyModel: peak of fit 56.00 MiB, validate 50.00 MiB>"
    assert repr(tiny_report().stages["fit"]) == "<MemoryBreakdown on cpu: peak 56.00 MiB>"
    assert len(repr(deep_report(num_blocks=40))) < 120


def test_a_report_is_its_page_in_a_notebook_and_its_table_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tiny_report()
    frame = report._repr_html_()
    page = html.unescape(frame.partition('srcdoc="')[2].rpartition('" style=')[0])
    assert page == render_html(report)
    report.show()
    assert capsys.readouterr().out.startswith("Memory report  TinyModel")
    drawn: list[Any] = []
    shell = SimpleNamespace(kernel=object())
    ipython = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=drawn.append))
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    report.show()
    report.stages["fit"].show()
    assert drawn == [report, report.stages["fit"]]
    shell.kernel = None  # IPython in a terminal
    report.stages["fit"].show()
    assert capsys.readouterr().out.splitlines()[0].split() == ["activations", "32.00", "MiB"]


@pytest.mark.parametrize(
    ("technique", "start"),
    [
        (mt.Microbatching(num_microbatches=4), "Microbatching(num_microbatches=4"),
        (mt.OptimizerInBackward(), "OptimizerInBackward("),
        (mt.ActivationCheckpointing(), "ActivationCheckpointing("),
        (mt.CompressedActivations(), "CompressedActivations("),
        (mt.LowPrecision("bf16-true"), "LowPrecision("),
        (mt.MemoryProfiler(stacks=True), "MemoryProfiler(every_n_steps=50, stacks=True"),
    ],
)
def test_callbacks_say_what_they_are_set_to(technique: object, start: str) -> None:
    assert repr(technique).startswith(start)
    assert "0x" not in repr(technique)


def test_a_loop_of_ones_own_has_the_same_report(tmp_path) -> None:
    model, batch = torch.nn.Linear(8, 4), torch.ones(16, 8)
    steps = []
    for _ in range(2):
        with mt.MemoryLedger(model, inputs=batch) as ledger:
            model(batch).sum().backward()
        steps.append(ledger.breakdown())
    report = mt.report.report_of_steps(model, steps)
    assert [one.peak_bytes for one in report.steps] == [one.ledger_peak_bytes for one in steps]
    assert report.num_parameters == 36
    report.save(tmp_path / "memory_report.json")
    assert mt.MemoryReport.load(tmp_path / "memory_report.json") == report
    report.save_html(tmp_path / "page.html")
    assert "Linear" in (tmp_path / "page.html").read_text()
    for wrong in ((), [None], "steps"):
        with pytest.raises(
            mt.ArgumentError, match=r"`report_of_steps\(steps\)` must be one or more breakdowns"
        ):
            mt.report.report_of_steps(model, wrong)
