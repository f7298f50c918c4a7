"""The notebook in the documentation runs from top to bottom, and its results draw themselves."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.trainers import LIGHTNING_WARNINGS

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def run(cells: list[str], module: ModuleType) -> list[Any]:
    """The value of each cell's last line, as a notebook shows it; nothing of a cell that ends otherwise."""
    shown = []
    for number, source in enumerate(cells):
        parsed = ast.parse(source)
        *lines, last = parsed.body
        if not isinstance(last, ast.Expr):
            lines, last = [*lines, last], None
        file = f"<ipython-input-{number}>"
        exec(compile(ast.Module(lines, []), file, "exec"), vars(module))
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), file, "eval"), vars(module)))
    return shown


@pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)
def test_the_notebook_runs_and_its_results_draw_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert not [cell for cell in notebook["cells"] if cell.get("outputs")]  # nobody's figures are kept in it
    module = ModuleType("notebook_cells")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(tmp_path)
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    report, breakdown, nothing, prediction = run(sources, module)
    assert nothing is None  # `show` has printed the table
    assert "<MemoryReport of Net: peak of fit" in repr(report)
    assert "Memory report  Net" in capsys.readouterr().out
    for result in (report, breakdown, prediction):
        assert len(repr(result)) < 120
        assert "\n" not in repr(result)
    assert report._repr_html_().startswith("<iframe srcdoc=")
    assert prediction._repr_html_().startswith("<table>")
    assert "<iframe srcdoc=" in prediction._repr_html_()
    assert "activations" in breakdown._repr_html_()
    assert (tmp_path / "notebook_report" / "loop.html").is_file()
    lines = {site.file for site in report.stages["fit"].sites if site.category == "activations"}
    assert lines == {"<ipython-input-0>"}
