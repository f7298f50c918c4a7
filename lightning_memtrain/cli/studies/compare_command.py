"""``memtrain compare``: runs side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_memtrain.cli.errors import CommandError, did_you_mean
from lightning_memtrain.cli.writable import require_writable
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.study.comparison import Comparison, compare_runs, load_run
from lightning_memtrain.study.comparison_rows import (
    headings,
    memory_rows,
    module_rows,
    other_rows,
    technique_rows,
)
from lightning_memtrain.study.pages.comparison_page import render_comparison

_STAGES = ("fit", "validate", "test", "predict")


def show_comparison(paths: Sequence[Path], *, stage: str | None, as_json: bool, page: Path | None) -> None:
    """Print how runs differ.

    Args:
        paths: folders of runs, or their reports.
        stage: whose peaks to compare; ``None`` for training.
        as_json: whether to print JSON instead of tables.
        page: where to write a page, too.

    Raises:
        CommandError: if there are fewer than two, one is no run, or has no such stage.
    """
    if stage is not None and stage not in _STAGES:
        raise CommandError(
            f"--stage must be one of {', '.join(_STAGES)}, but got `{stage}`.{did_you_mean(stage, _STAGES)}"
        )
    if page is not None:
        require_writable(page.parent, "the page's folder")
    if len(paths) < 2:
        raise CommandError(f"`memtrain compare` needs at least two runs, but got only `{paths[0]}`.")
    try:
        comparison = compare_runs([load_run(path) for path in paths], stage or "fit")
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    if page is not None:
        write_atomically(page, render_comparison(comparison))
    if as_json:
        print(json.dumps(comparison.to_dict(), indent=1))
        return
    print_comparison(comparison)
    if page is not None:
        print(f"Page: {page}")


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print a comparison as tables.

    Args:
        comparison: of at least two runs.
        console: where to; ``None`` for the terminal.
    """
    out = Console() if console is None else console
    rows = memory_rows(comparison)
    out.print(_table(headings(comparison, f"{comparison.stage}, at the peak"), rows))
    out.print(_table(headings(comparison, "time and score"), other_rows(comparison)))
    if comparison.modules:
        out.print(
            _table(headings(comparison, "modules that differ most"), module_rows(comparison, types=False))
        )
    for name, techniques in technique_rows(comparison):
        out.print(f"{name}: {techniques}", markup=False, highlight=False)
    for note in comparison.notes:
        out.print(note, markup=False, highlight=False)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
