from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_memtrain.report.cuda_snapshot import (
    parse_snapshot,
    print_snapshot_table,
    render_snapshot_page,
    save_snapshot_page,
)
from lightning_memtrain.report.cuda_snapshot.page import _points
from tests.helpers.snapshots import snapshot_data

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;{title}[/b]"


def printed(data: Any) -> str:
    file = io.StringIO()
    print_snapshot_table(parse_snapshot(data, "snapshot.pickle"), file)
    return " ".join(file.getvalue().split())


def hostile_data() -> dict[str, Any]:
    data = snapshot_data()
    for entry in data["device_traces"][0]:
        entry["frames"] = [{"filename": f"{HOSTILE}.py", "line": 1, "name": HOSTILE}]
    data["allocator_settings"] = {"garbage_collection_threshold": 0.8, HOSTILE: HOSTILE}
    return data


WHERE = "/home/me/model.py:12 forward < /home/me/train.py:40 main"
SHORTAGE = (
    "60.00 MiB were asked for, for which the allocator takes 60.00 MiB from the device, which had 48.00 MiB "
    "left: 12.00 MiB too little. Of 52.00 MiB reserved, 38.00 MiB were allocated and 14.00 MiB were not; the "
    f"largest free block that it could have had was 12.00 MiB. {WHERE}"
)
FREE = (
    "Free at the end: 14.00 MiB in 2 blocks, the largest 12.00 MiB. empty_cache() would give back 0 B; "
    "14.00 MiB lie between blocks in use. Rounding up takes 24 B of the blocks in use."
)
SAID_BY_BOTH = [
    f"Out of memory, event 14 {SHORTAGE}",
    "at the peak 73.00 98.00 25.00",
    "at the end 38.00 52.00 14.00",
    FREE,
    "Bytes of blocks are exact: the model of the allocator puts each at its real address.",
]
SAID = [
    *SAID_BY_BOTH,
    "cuda:0: peak 73.00 MiB allocated, 98.00 MiB reserved; 15 events were recorded",
    f"{WHERE} 30.00 78.9% 2",
    f"{WHERE} 30.00 1",
    "Allocated when memory ran out, by call stack",
    "/home/me/train.py:44 main 8.00 before",
]
SAID_BY_PAGE = [
    *SAID_BY_BOTH,
    "73.00 MiB allocated at most, 98.00 MiB reserved; 15 events were recorded",
    f"{WHERE} 30.00 78.9% 2",
    f"{WHERE} 30.00 event 1",
    "Allocated when memory ran out, by call stack",
    "/home/me/train.py:44 main 8.00 before the recording",
]


@pytest.mark.parametrize("sentence", SAID)
def test_the_table_says(sentence: str) -> None:
    assert sentence in printed(snapshot_data())


def test_names_are_no_markup_in_the_table() -> None:
    assert "".join(HOSTILE.split()) in printed(hostile_data()).replace(" ", "")


def test_the_table_of_an_empty_snapshot() -> None:
    assert printed({"segments": []}).endswith("It holds no memory of any device.")


def test_the_table_of_a_snapshot_without_call_stacks() -> None:
    data = snapshot_data()
    for entry in [*data["device_traces"][0], *(b for s in data["segments"] for b in s["blocks"])]:
        del entry["frames"]
    assert "no call stack was recorded 38.00 100.0% 3" in printed(data)


def test_a_placement_that_the_model_does_not_know_is_said() -> None:
    data = snapshot_data()
    # The real one has put 30 MiB into the middle of a segment.
    data["segments"][1]["blocks"] = [
        {"size": 2**20, "state": "inactive", "address": 0, "requested_size": 0},
        *data["segments"][1]["blocks"],
    ]
    data["segments"][1]["total_size"] += 2**20
    data["device_traces"][0][0]["size"] += 2**20
    data["device_traces"][0][1]["addr"] += 2**20
    assert "the model of the allocator puts 75.0% at their real address" in printed(data)


def test_a_setting_that_is_not_modelled_is_said() -> None:
    assert "by a setting that was in force: garbage_collection_threshold=0.8" in printed(hostile_data())


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


@pytest.mark.parametrize("sentence", SAID_BY_PAGE)
def test_the_page_says(sentence: str) -> None:
    assert sentence in Page(render_snapshot_page(parse_snapshot(snapshot_data(), "snapshot.pickle"))).text


def test_the_page_asks_for_nothing_and_runs_nothing() -> None:
    page = render_snapshot_page(parse_snapshot(snapshot_data()))
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:;" in page
    assert "<script" not in page
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.\w+|@import|url\(", page)


def test_names_cannot_break_out_of_the_page() -> None:
    plain = Page(render_snapshot_page(parse_snapshot(snapshot_data())))
    page = Page(render_snapshot_page(parse_snapshot(hostile_data(), HOSTILE)))
    assert page.tags == plain.tags
    assert page.text.count(HOSTILE) >= 2 + 2 * 2  # title and heading, and each row of a table


def test_the_page_of_an_empty_snapshot() -> None:
    assert "It holds no memory of any device." in render_snapshot_page(parse_snapshot({"segments": []}))


def test_the_page_is_saved(tmp_path: Path) -> None:
    snapshot = parse_snapshot(snapshot_data())
    save_snapshot_page(snapshot, tmp_path / "snapshot.html")
    assert (tmp_path / "snapshot.html").read_text() == render_snapshot_page(snapshot)


def test_thinned_points_keep_the_highest_of_each_stretch() -> None:
    sizes = [0] * 10_000
    sizes[4321] = 7
    points = _points(sizes)
    assert len(points) <= 900
    assert max(points, key=lambda point: point[1]) == (4321, 7)
    assert _points([1, 2]) == [(0, 1), (1, 2)]
