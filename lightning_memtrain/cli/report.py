"""Print the memory report of a run again."""

from __future__ import annotations

import pickle
import webbrowser
from contextlib import suppress
from pathlib import Path

from lightning_memtrain.cli.errors import CommandError


def show_report(path: Path, *, open_page: bool = False) -> None:
    """Print the table of a memory report, or of a snapshot of CUDA memory.

    Args:
        path: a run's folder, the report's JSON file, or a snapshot that torch wrote.
        open_page: whether to open the page in a browser as well; its path is printed.

    Raises:
        CommandError: if there is no report or it cannot be read.
    """
    from lightning_memtrain.report.document import HTML_NAME, JSON_NAME, MemoryReport
    from lightning_memtrain.report.html import save_html
    from lightning_memtrain.report.table import print_table

    # A run's folder, or the folder in it that `MemoryProfiler` writes to.
    inside = [path / JSON_NAME, path / "memory" / JSON_NAME]
    file = next((file for file in inside if file.is_file()), path)
    if file.is_dir():
        raise CommandError(
            f"the folder `{path}` holds no `{JSON_NAME}`: `MemoryProfiler` writes it at the end of a run.",
            exit_code=1,
        )
    if _is_pickle(file):
        _show_snapshot(file, open_page)
        return
    try:
        report = MemoryReport.load(file)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    print_table(report)
    if open_page:
        page = file.parent / HTML_NAME
        if not page.is_file():
            save_html(report, page)
        print(page)
        webbrowser.open(page.resolve().as_uri())


def _is_pickle(file: Path) -> bool:
    """Whether a file is a snapshot by its name or by its first byte."""
    if file.suffix in (".pickle", ".pkl"):
        return True
    with suppress(OSError), file.open("rb") as opened:
        return opened.read(1) == pickle.PROTO
    return False


def _show_snapshot(file: Path, open_page: bool) -> None:
    from lightning_memtrain.report.cuda_snapshot import (
        load_snapshot,
        print_snapshot_table,
        save_snapshot_page,
    )

    try:
        snapshot = load_snapshot(file)
        print_snapshot_table(snapshot)
        if open_page:
            page = file.with_name(f"{file.stem}_report.html")
            save_snapshot_page(snapshot, page)
            print(page)
            webbrowser.open(page.resolve().as_uri())
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
