"""The page and the figures of a study: numbers where they belong, no network, no script."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest

from lightning_memtrain.core import MIB
from lightning_memtrain.study.grid import read_grid
from lightning_memtrain.study.pages.figures import bars, draw_figures
from lightning_memtrain.study.pages.study_page import render_study, save_study
from lightning_memtrain.study.pages.svg_chart import Point, scatter
from lightning_memtrain.study.study_folder import StudyFolder
from lightning_memtrain.study.study_result import StudyResult
from tests.helpers.browser import visit
from tests.helpers.studies import GRID, finished_run, small_result


def texts(figure: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(figure).iter("text")]


def test_everything_is_written_as_files(tmp_path):
    save_study(small_result(), StudyFolder(tmp_path))
    assert StudyResult.load(tmp_path / "study.json") == small_result()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *("peaks.svg", "score.svg", "time.svg", "techniques.svg")
    }
    for path in (tmp_path / "figures").iterdir():
        root = ElementTree.fromstring(path.read_text())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in root[0].text


def test_the_page_escapes_names_and_asks_for_nothing():
    page = render_study(small_result())
    assert "ValueError: &lt;no&gt; such &amp; thing" in page
    assert "<no>" not in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert '<tr class="front"><th class="name" scope="row">plain</th><td>2/3</td><td>400 B</td>' in page
    assert "<td>62.50 ± 17.68 %</td>" in page
    assert "2 of 5 runs finished" not in page  # three are
    assert "3 of 5 runs finished, 1 failed, 3 min 0 s of training" in page


def test_a_study_without_scores_has_figures_of_memory_and_time():
    grid = read_grid({key: value for key, value in GRID.items() if key != "score"})
    runs = (
        *(finished_run("plain", 1, 0.5, 4 * MIB, 4 * MIB), finished_run("half", 1, 0.5, MIB, MIB)),
        finished_run("both", 1, 0.5, MIB, MIB, step=0.75),
    )
    from lightning_memtrain.study.study_result import summarize

    result = replace(small_result(grid), runs=runs, variants=summarize(grid, runs))
    figures = draw_figures(result)
    assert list(figures) == ["peaks", "time", "techniques", "combinations"]
    assert "step (ms)" in texts(figures["combinations"][1])
    assert "bf16" in texts(figures["techniques"][1])
    assert texts(figures["peaks"][1])[-5:] == [
        "4.00 MiB",
        "half",
        "1.00 MiB, 4.00x less",
        "both",
        "1.00 MiB, 4.00x less",
    ]


def test_a_study_that_has_just_begun_has_a_page():
    empty = replace(small_result(), runs=(), variants=())
    assert draw_figures(empty) == {}
    assert "0 of 0 runs finished" in render_study(empty)


def test_a_negative_workspace_makes_no_bar_too_long():
    figure = bars({"a": {"activations": 300, "workspace": -100}})
    (bar,) = [node for node in ElementTree.fromstring(figure).iter("rect") if node.get("height") == "13"]
    assert float(bar.get("width")) == 460.0
    assert "200 B" in texts(figure)


def test_bars_are_as_wide_as_their_bytes():
    figure = bars({"a": {"parameters": 100, "activations": 300}, "b": {"activations": 200}})
    widths = [
        (node.get("class"), float(node.get("width")))
        for node in ElementTree.fromstring(figure).iter("rect")
        if node.get("height") == "13"
    ]
    assert widths == [("c-parameters", 115.0), ("c-activations", 345.0), ("c-activations", 230.0)]


@pytest.mark.parametrize(
    ("xs", "ticks"),
    [
        ((1, 64), ["1", "2", "4", "8", "16", "32", "64"]),
        ((10, 13), ["10", "10.5", "11", "11.5", "12", "12.5", "13"]),
    ],
)
def test_an_axis_is_logarithmic_where_sizes_differ_much(xs, ticks):
    figure = scatter("t", [Point(str(x), x, 1.0) for x in xs], "x", "y")
    assert [text for text in texts(figure) if text in ticks][: len(ticks)] == ticks


def test_one_point_and_points_on_one_spot_can_be_drawn():
    assert "alone" in texts(scatter("t", [Point("alone", 5.0, 0.0)], "x", "y"))
    crowd = [Point(f"name-{number:02}", 1.0, 1.0) for number in range(30)]
    written = [text for text in texts(scatter("t", crowd, "x", "y")) if text.startswith("name-")]
    assert 1 <= len(written) < 30  # no name lies on another one


def test_a_browser_shows_it_without_a_request_and_without_scrolling_sideways(tmp_path):
    page = render_study(small_result())
    allowed = page.replace(
        "style-src 'unsafe-inline';", "style-src 'unsafe-inline'; script-src 'unsafe-inline';"
    )
    seen = visit(
        allowed,
        tmp_path,
        "return [document.documentElement.scrollWidth <= window.innerWidth, texts('h2')]",
        width=520,
    )
    assert seen.answer == [
        True,
        *(
            [
                [
                    "Variants",
                    "Peak by category",
                    "Each technique alone",
                    "Score against memory",
                    "Step time against memory",
                    "Runs",
                    "Environment",
                ]
            ]
        ),
    ]
    assert seen.requests == []
    assert seen.console == []
