from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_memtrain.core import MIB, CategoryBytes, Growth, ModuleMemory, TechniqueRecord
from lightning_memtrain.report.memory_report import MemoryReport, StepTimes
from lightning_memtrain.report.outputs.report_table import print_table, render_table
from tests.helpers.reports import deep_report, out_of_memory_report, tiny_report


def rendered(report: MemoryReport, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width, highlight=False).print(render_table(report))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def row(lines: list[str], name: str) -> list[str]:
    """The cells of the first row that begins with ``name``, without its bar."""
    line = next(line for line in lines if line.strip().startswith(name))
    return line.strip().removeprefix(name).replace("━", "").replace("╸", "").split()


def test_categories_are_listed_in_mib_with_share_and_maximum() -> None:
    lines = rendered(tiny_report())
    assert row(lines, "parameters") == ["4.00", "7.1%", "4.00"]
    assert row(lines, "gradients") == ["1.00", "1.8%", "4.00"]
    assert row(lines, "optimizer state") == ["8.00", "14.3%", "8.00"]
    assert row(lines, "activations") == ["32.00", "57.1%", "32.00"]
    assert row(lines, "of which recomputed") == ["2.00", "3.6%", "6.00"]
    assert row(lines, "temporary") == ["3.00", "5.4%", "5.00"]
    assert row(lines, "workspace") == ["6.00", "10.7%"]
    assert row(lines, "total (allocator)") == ["56.00", "100.0%"]
    assert "fit: peak 56.00 MiB (allocator) on cpu, after 'forward head'; 4 steps" in lines


def test_rows_of_a_stage_without_allocator_add_up_to_the_ledger() -> None:
    alone = replace(tiny_report(), stages={"validate": tiny_report().stages["validate"]})
    lines = rendered(alone)
    start = next(i for i, line in enumerate(lines) if line.startswith("validate: peak 50.00 MiB (ledger)"))
    assert row(lines[start:], "total (ledger)") == ["50.00", "100.0%"]
    assert not [line for line in lines[start:] if line.strip().startswith("workspace")]


def test_beside_training_another_stage_takes_two_lines() -> None:
    report = tiny_report()
    report = replace(report, stages={"validate": report.stages["validate"], "fit": report.stages["fit"]})
    lines = rendered(report, width=160)
    start = lines.index("validate: peak 50.00 MiB (ledger) on cpu, after 'forward head'")
    assert start > next(i for i, line in enumerate(lines) if line.startswith("fit: peak"))
    assert lines[start + 1] == (
        "Held: activations 32.00 MiB, optimizer state 8.00 MiB, parameters 4.00 MiB, temporary 3.00 MiB, "
        "inputs 2.00 MiB, gradients 1.00 MiB"
    )
    assert lines[start + 2] == "Peak over 2 ranks: from 55.00 MiB to 56.00 MiB."


@pytest.mark.parametrize(
    ("times", "line"),
    [
        (
            StepTimes(0.0124, 47, 0.05, 4, 0.2),
            "Time: 12.4 ms per step (median of 47); the 4 measured steps took 150 ms more than that in all",
        ),
        (StepTimes(0.0124, 47), "Time: 12.4 ms per step (median of 47)"),
        (StepTimes(None, 0, 0.5, 3, 1.5), "Time: 500 ms per step, with measuring in all of them"),
        (
            StepTimes(0.02, 7, 0.01, 1, 0.01),
            "Time: 20 ms per step (median of 7); the measured step took 10 ms less than that in all",
        ),
    ],
)
def test_step_times_stand_beside_the_bytes(times: StepTimes, line: str) -> None:
    lines = rendered(replace(tiny_report(), step_times={"fit": times}), width=120)
    assert (
        lines[lines.index("fit: peak 56.00 MiB (allocator) on cpu, after 'forward head'; 4 steps") + 1]
        == line
    )


@pytest.mark.parametrize("width", [80, 160])
def test_a_module_is_one_line(width: int) -> None:
    fit = tiny_report().stages["fit"]
    paths = [f"network.encoder.layers.{i}.self_attention.output_projection" for i in range(3)]
    modules = tuple(
        ModuleMemory(path, "NonDynamicallyQuantizableLinear", 9 * MIB, 0, 0, MIB) for path in paths
    )
    lines = rendered(replace(tiny_report(), stages={"fit": replace(fit, modules=modules)}), width)
    start = next(i for i, line in enumerate(lines) if line.lstrip().startswith("Module, MiB at peak"))
    assert lines[start].split()[-3:] == ["Total", "Model", "Optim"]  # no column of zeros only
    rows = lines[start + 2 : start + 5]
    for row, path in zip(rows, paths, strict=True):
        assert row.split()[-3:] == ["10.00", "9.00", "1.00"]
        shown = row.split()[0]
        assert shown == path if width == 160 else path.endswith(shown.removeprefix("..."))
        assert len(shown) >= 40
    assert ("NonDynamicallyQuantizableLinear" in rows[0]) == (width == 160)


def test_groups_of_the_paper() -> None:
    groups = "By group: model 4.00 MiB (7.1%), optimizer 9.00 MiB (16.1%), activations 43.00 MiB (76.8%)"
    assert groups in rendered(tiny_report(), width=120)


def test_recomputed_row_shows_only_when_something_was_recomputed() -> None:
    assert not [line for line in rendered(deep_report()) if "recomputed" in line]


def test_modules_are_the_ten_largest_by_total() -> None:
    lines = rendered(tiny_report())
    assert row(lines, "body Linear") == ["33.00", "24.00", "20.00", "3.00", "0.00", "6.00"]
    assert row(lines, "head Linear") == ["15.00", "11.00", "12.00", "1.00", "1.00", "2.00"]
    lines = rendered(deep_report(num_blocks=3))
    assert len([line for line in lines if line.strip().startswith("blocks.")]) == 10
    assert "5 more modules in the HTML report" in lines


def test_growth_names_the_modules() -> None:
    lines = rendered(tiny_report())
    start = lines.index("Growth: 4.00 MiB outlived the step that made it")
    assert lines[start + 1] == "  head: 3.00 MiB in 12 storages"
    assert lines[start + 2] == "  (outside of any submodule): 1.00 MiB in 1 storage"
    many = replace(tiny_report(), growth={"fit": tuple(Growth(f"m{i}", 1, 1) for i in range(7))})
    assert "  and 2 more in the HTML report" in rendered(many)


def test_out_of_memory_comes_first_with_holders_and_advice() -> None:
    lines = rendered(out_of_memory_report(), width=200)
    assert lines[1] == "Out of memory in fit, step 4, with 56.00 MiB held"
    assert lines[2] == "  CUDA out of memory. Tried to allocate 2.00 GiB."
    assert lines[3].startswith("  1. activations, 32.00 MiB: split the batch into microbatches")
    assert lines[4].startswith("  2. activations of body (Linear), 24.00 MiB: recompute")
    assert lines[5].startswith("  3. activations of head (Linear), 11.00 MiB: recompute")


def test_a_technique_is_one_line_and_its_first_five_events() -> None:
    record = TechniqueRecord(
        "Microbatching", {"microbatch_size": 16, "mode": "auto"}, tuple(f"step {i}: halved" for i in range(7))
    )
    report = replace(out_of_memory_report(), techniques=(record, TechniqueRecord("[bold]RigL")))
    lines = rendered(report, width=200)
    start = lines.index("Technique: Microbatching(microbatch_size=16, mode='auto')")
    assert lines[start - 3].startswith("  1. activations")  # right after what went wrong
    assert lines[start + 1 : start + 6] == [f"  step {i}: halved" for i in range(5)]
    assert lines[start + 6] == "  and 2 more in the HTML report"
    assert lines[start + 7] == "Technique: [bold]RigL()"
    few = replace(report, techniques=(replace(record, events=record.events[:5]),))
    assert not [line for line in rendered(few) if line.startswith("  and ")]
    assert not [line for line in rendered(tiny_report()) if "Technique" in line]


@pytest.mark.parametrize(
    ("retries", "line"),
    [
        (None, "Reserved by the allocator: 64.00 MiB"),
        (0, "Reserved by the allocator: 64.00 MiB"),
        (1, "Reserved by the allocator: 64.00 MiB; it gave its free blocks back 1 time to go on"),
        (2, "Reserved by the allocator: 64.00 MiB; it gave its free blocks back 2 times to go on"),
    ],
)
def test_what_the_allocator_reserved_is_shown_where_it_is_known(retries: int | None, line: str) -> None:
    fit = tiny_report().stages["fit"]
    known = fit.with_allocator_peak(
        fit.allocator_peak_bytes, reserved_bytes=64 * MIB, num_alloc_retries=retries
    )
    assert line in rendered(replace(tiny_report(), stages={"fit": known}), width=120)
    assert not [line for line in rendered(tiny_report()) if "Reserved" in line]


def test_ranks_are_named() -> None:
    assert "Peak over 2 ranks: from 55.00 MiB to 56.00 MiB." in rendered(tiny_report())


@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_wider_than_the_terminal_and_no_number_is_cut(width: int) -> None:
    long_name = ".".join(f"very_long_module_name_{i}" for i in range(6))
    fit = tiny_report().stages["fit"]
    module = ModuleMemory(long_name, "LongClassName" * 3, 123_456 * MIB, 0, 0, 234_567 * MIB, 345_678 * MIB)
    report = replace(tiny_report(), stages={"fit": replace(fit, modules=(module,))})
    lines = rendered(report, width)
    assert max(map(len, lines)) <= width
    text = "".join(line.replace(" ", "") for line in lines)
    for number in ("703,701.00", "345,678.00", "123,456.00", "234,567.00"):
        assert number in text
    assert "…" not in text


def test_names_in_brackets_are_not_taken_for_markup() -> None:
    report = tiny_report()
    module = ModuleMemory("[bold]x[/bold]", "T", 0, 0, 0, 0, MIB)
    stages = {"fit": replace(report.stages["fit"], modules=(module,))}
    text = "\n".join(rendered(replace(report, model="[red]M", stages=stages)))
    assert "[bold]x[/bold] T" in text
    assert "[red]M, 1,048,576 parameters" in text


def test_negative_workspace_is_shown_as_it_is() -> None:
    report = tiny_report()
    fit = report.stages["fit"].with_allocator_peak(49 * MIB)
    lines = rendered(replace(report, stages={"fit": fit}))
    assert row(lines, "workspace") == ["-1.00", "-2.0%"]
    assert row(lines, "total (allocator)") == ["49.00", "100.0%"]


def test_empty_reports_are_printed() -> None:
    nothing = replace(tiny_report(), stages={}, steps=(), growth={}, ranks=None)
    assert "No step was profiled." in rendered(nothing)
    zero = CategoryBytes()
    fit = replace(
        tiny_report().stages["fit"], at_peak=zero, maxima=zero, modules=(), allocator_peak_bytes=None
    )
    assert row(rendered(replace(nothing, stages={"fit": fit})), "total (ledger)") == ["0.00", "-"]


def test_printed_to_a_file_it_has_no_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    file = io.StringIO()
    print_table(out_of_memory_report(), file)
    assert "total (allocator)" in file.getvalue()
    assert "\x1b" not in file.getvalue()
