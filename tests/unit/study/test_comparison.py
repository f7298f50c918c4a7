"""Runs side by side: the categories, the modules that differ, and what has to be known to read it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_memtrain.cli import main
from lightning_memtrain.core import MIB, CategoryBytes, ModuleMemory
from lightning_memtrain.report.memory_report import JSON_NAME, MemoryReport
from lightning_memtrain.study.comparison import compare_runs, load_run
from lightning_memtrain.study.pages.comparison_page import render_comparison
from tests.helpers.reports import tiny_report
from tests.helpers.studies import record


def half_report() -> MemoryReport:
    """The tiny one with half of the activations of `body`, and without `head`."""
    report = tiny_report()
    fit = report.stages["fit"]
    at_peak = CategoryBytes({**fit.at_peak, "activations": 20 * MIB, "workspace": 0})
    body = replace(fit.modules[0], produced_bytes=12 * MIB)
    other = ModuleMemory("neck", "ReLU", 0, 0, 0, 0, 8 * MIB)
    smaller = replace(fit, at_peak=at_peak, modules=(body, other)).with_allocator_peak(40 * MIB)
    return replace(report, stages={"fit": smaller})


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders `plain` and `half` of runs that are over."""
    monkeypatch.chdir(tmp_path)
    for name, report, seconds in (("plain", tiny_report(), 0.25), ("half", half_report(), 0.5)):
        report.save(tmp_path / name / "memory" / JSON_NAME)
        write_record(
            tmp_path / name, step_seconds=seconds, num_timed_steps=9, metrics={"test/accuracy": seconds}
        )
    return tmp_path


def write_record(folder: Path, **fields: object) -> None:
    text = json.dumps(replace(record(), **fields).to_dict())  # type: ignore[arg-type]
    (folder / "run.json").write_text(text)


def test_two_runs_with_their_change(runs, capsys):
    assert main(["compare", "plain", "half"]) == 0
    lines = [re.split(r"\s*[│┃]\s*", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 4}
    assert rows["peak"] == ["56.00 MiB", "40.00 MiB", "-16.00 MiB"]
    assert rows["times less"] == ["-", "1.40x", ""]
    assert rows["activations"] == ["32.00 MiB", "20.00 MiB", "-12.00 MiB"]
    assert rows["workspace"] == ["6.00 MiB", "2.00 MiB", "-4.00 MiB"]
    assert rows["median step"] == ["250 ms", "500 ms", "2.00x"]
    assert rows["test/accuracy"] == ["0.25", "0.5", "+0.25"]
    assert rows["head"] == ["15.00 MiB", "-", "-15.00 MiB"]
    assert rows["neck"] == ["-", "8.00 MiB", "+8.00 MiB"]


def test_the_json_has_all_of_it(runs, capsys):
    assert main(["compare", "plain", "half", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["kind"], data["schema_version"], data["stage"]) == (
        "lightning_memtrain comparison",
        1,
        "fit",
    )
    assert [run["name"] for run in data["runs"]] == ["plain", "half"]
    assert [run["allocator_peak_bytes"] for run in data["runs"]] == [56 * MIB, 40 * MIB]
    assert [row["name"] for row in data["modules"]] == ["head", "body", "neck"]
    assert data["modules"][1]["total_bytes"] == [33 * MIB, 21 * MIB]
    assert data["notes"] == []


def test_three_runs_have_no_change(runs, capsys):
    assert main(["compare", "plain", "half", str(runs / "plain" / "memory" / JSON_NAME)]) == 0
    out = capsys.readouterr().out
    assert "┃ change" not in out.replace("  ", " ")
    assert "1.40x" in out


def test_the_page_needs_nothing(runs, capsys):
    assert main(["compare", "plain", "half", "--page", "side/page.html"]) == 0
    assert "Page: side/page.html" in capsys.readouterr().out
    page = (runs / "side" / "page.html").read_text()
    assert page == render_comparison(compare_runs([load_run(Path("plain")), load_run(Path("half"))]))
    assert "<h1>plain and half</h1>" in page
    assert '<th class="name" scope="row">head Linear</th><td>15.00 MiB</td><td>-</td>' in page
    assert "<script" not in page


def test_runs_of_other_recipes_and_machines_say_so(runs, capsys):
    (runs / "plain" / "run.json").unlink()
    write_record(runs / "half", recipe="other", state="interrupted", environment={"processor": "Another"})
    assert main(["compare", "plain", "half"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "plain has no `run.json`: it was not made by `memtrain run`, or by an older version" in out
    assert "half is not finished (interrupted)." in out
    assert "different processors (plain: A processor, half: Another), so step times are not comparable" in out

    write_record(runs / "plain")
    assert main(["compare", "plain", "half"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "These are runs of different recipes (plain: net, half: other)" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plain"], 2, "`memtrain compare` needs at least two runs, but got only `plain`."),
        (["plain", "nowhere"], 1, "`nowhere`, which does not exist. Name the folder of a run that had a"),
        (["plain", "empty"], 1, "`empty`, which is no run's folder: it has no memory report."),
        (
            ["plain", "old"],
            1,
            "schema_version=0, written by lightning_memtrain 0.0.9. Read it with that version",
        ),
        (["plain", "half", "--stage", "valid"], 2, "but got `valid`. Did you mean `validate`?"),
        (
            ["plain", "half", "--stage", "validate"],
            1,
            "and `half` has `fit`. Name one that all have.",
        ),
        (["plain", "odd"], 1, "`odd/run.json` cannot be read: Expected the record of a run"),
        (["plain", "half", "--pge", "x"], 2, "unknown argument `--pge`. Did you mean `--page`?"),
    ],
)
def test_mistakes_are_answered_in_one_line(runs, capsys, arguments, code, message):
    (runs / "empty").mkdir()
    half_report().save(runs / "odd" / JSON_NAME)
    (runs / "odd" / "run.json").write_text("[]")
    old = {**tiny_report().to_dict(), "schema_version": 0, "environment": {"lightning_memtrain": "0.0.9"}}
    (runs / "old").mkdir()
    (runs / "old" / JSON_NAME).write_text(json.dumps(old))
    if "odd" in arguments:
        message = "`odd/run.json` cannot be read: Expected an object, but got list."
    assert main(["compare", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_names_differ_by_as_many_folders_as_it_takes(runs):
    loaded = [load_run(runs / "plain"), load_run(runs / "plain")]
    assert [run.name for run in compare_runs(loaded).runs] == [f"{runs}/plain (1)", f"{runs}/plain (2)"]
