from __future__ import annotations

import itertools
import pickle
import pickletools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from torch.cuda import _memory_viz

from lightning_memtrain.core import MIB, Category, CategoryBytes, TimelineEvent
from lightning_memtrain.report.cuda_snapshot import load_snapshot, snapshot_of_breakdown, summarize
from tests.helpers.reports import tiny_breakdown, tiny_report
from tests.helpers.snapshots import snapshot_data

# What the reader in memory_viz's own JavaScript knows.
OPCODES = {
    *(
        "APPEND",
        "APPENDS",
        "BINFLOAT",
        "BINGET",
        "BININT",
        "BININT1",
        "BININT2",
        "BINPUT",
        "BINUNICODE",
        "DICT",
    ),
    *(
        "EMPTY_DICT",
        "EMPTY_LIST",
        "EMPTY_TUPLE",
        "FRAME",
        "LIST",
        "LONG1",
        "LONG_BINGET",
        "LONG_BINPUT",
        "MARK",
    ),
    *("MEMOIZE", "NEWFALSE", "NEWTRUE", "NONE", "PROTO", "SETITEM", "SETITEMS", "SHORT_BINUNICODE", "STOP"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new folder" / "step.pickle"
    tiny_report().save_snapshot(path)
    return path


def allocated(path: Path) -> list[int]:
    """Bytes that are allocated after each event of the file, as memory_viz adds them up."""
    with path.open("rb") as file:
        trace = pickle.load(file)["device_traces"][0]
    change = {"alloc": 1, "free_completed": -1}
    return list(itertools.accumulate(change.get(entry["action"], 0) * entry["size"] for entry in trace))


def test_the_bytes_after_each_moment_of_the_timeline_are_in_the_file(path: Path) -> None:
    held = [moment.held.total_bytes for moment in tiny_breakdown().timeline]
    sums = allocated(path)
    assert held == [14 * MIB, 38 * MIB, 46 * MIB, 50 * MIB, 18 * MIB]
    at = 0
    for size in held:  # in this order
        at = sums.index(size, at)
    assert sums[-1] == held[-1]
    assert max(sums) == max(held)


def test_each_category_has_its_bytes_its_segment_and_its_colour(path: Path) -> None:
    with path.open("rb") as file:
        data = pickle.load(file)
    assert sorted(segment["total_size"] // MIB for segment in data["segments"]) == [2, 3, 4, 4, 8, 32]
    trace = data["device_traces"][0]
    largest = max((entry for entry in trace if entry["action"] == "alloc"), key=lambda entry: entry["size"])
    assert largest["category"] == "activations"
    assert largest["frames"] == [{"filename": "activations", "line": 1, "name": "forward body"}]
    # memory_viz fails without it.
    assert "unknown" in {entry["category"] for entry in trace}
    assert {entry["category"] for entry in trace[:-1]} <= {category.value for category in Category}


def test_what_shrinks_in_part_stays_what_it_was(tmp_path: Path) -> None:
    sizes = [10, 30, 25, 5, 0, 7]
    timeline = tuple(
        TimelineEvent(at, f"event {at}", CategoryBytes({"activations": size}))
        for at, size in enumerate(sizes)
    )
    data = snapshot_of_breakdown(replace(tiny_breakdown(), timeline=timeline))
    made = [
        (entry["action"], entry["size"], entry["frames"][0]["name"])
        for entry in data["device_traces"][0][:-1]
        if entry["action"] != "free_requested"
    ]
    assert made == [
        ("alloc", 10, "event 0"),
        ("alloc", 20, "event 1"),
        ("free_completed", 20, "event 1"),
        ("alloc", 15, "event 1"),
        ("free_completed", 15, "event 1"),
        ("free_completed", 10, "event 0"),
        ("alloc", 5, "event 0"),
        ("free_completed", 5, "event 0"),
        ("alloc", 7, "event 5"),
    ]


def test_blocks_never_overlap(path: Path) -> None:
    with path.open("rb") as file:
        data = pickle.load(file)
    live: dict[int, int] = {}
    segments = [(s["address"], s["address"] + s["total_size"]) for s in data["segments"]]
    for entry in data["device_traces"][0]:
        begin, end = entry["addr"], entry["addr"] + entry["size"]
        if entry["action"] == "alloc":
            assert all(other >= end or other + size <= begin for other, size in live.items())
            assert sum(low <= begin and end <= high for low, high in segments) == 1
            live[begin] = entry["size"]
        elif entry["action"] == "free_completed":
            assert live.pop(begin) == entry["size"]
    at_end = {
        b["address"]: b["size"] for s in data["segments"] for b in s["blocks"] if b["state"] != "inactive"
    }
    assert at_end == live


def test_memory_viz_can_read_the_file(path: Path) -> None:
    found = {opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())}
    assert found <= OPCODES


def test_torchs_own_reports_take_the_file(path: Path) -> None:
    with path.open("rb") as file:
        data = pickle.load(file)
    assert "total_reserved: 53.0MiB\ntotal_allocated: 18.0MiB\ntotal_free: 35.0MiB" in _memory_viz.segsum(
        data
    )
    text = _memory_viz.trace(data)
    assert text.startswith("Device 0 ----------------\n15 entries\na = seg_")
    lines: list[str] = []
    _memory_viz.memory(data, format_flamegraph=lines.append)
    assert "stream_0;active_allocated;activations" not in lines[0]
    assert "stream_0;active_allocated;optimizer_state:0:step 8388608\n" in lines[0]
    _memory_viz.segments(data, format_flamegraph=lines.append)
    assert len(lines[1].splitlines()) == len(lines[0].splitlines())
    assert "snapshot.pickle" in _memory_viz.trace_plot(data)
    assert "Allocator State History" in _memory_viz.segment_plot(data)


def test_torchs_command_line_takes_the_file(path: Path, tmp_path: Path) -> None:
    page = tmp_path / "plot.html"
    command = [sys.executable, "-W", "ignore", "-m", "torch.cuda._memory_viz", "trace_plot", str(path)]
    subprocess.run([*command, "-o", str(page)], check=True, timeout=120)
    assert "Active Memory Timeline" in page.read_text()


def test_torchs_own_reports_take_what_the_model_of_the_allocator_did() -> None:
    data = snapshot_data()
    assert "raise OutOfMemoryError # 60.0MiB requested, 48.0MiB free in CUDA" in _memory_viz.trace(data)
    assert "total_reserved: 52.0MiB\ntotal_allocated: 38.0MiB\n" in _memory_viz.segsum(data)


def test_our_own_report_reads_the_file(path: Path) -> None:
    (device,) = load_snapshot(path).devices
    summary = summarize(device, {})
    assert summary.peak_allocated_bytes == 50 * MIB
    assert summary.live[0].num_bytes == 24 * MIB


def test_a_stage_without_timeline_or_unknown_is_refused(tmp_path: Path) -> None:
    report = tiny_report()
    with pytest.raises(
        ValueError, match=r"stage 'validate' was profiled without one\. Use `MemoryProfiler\(timel"
    ):
        report.save_snapshot(tmp_path / "x", stage="validate")
    with pytest.raises(ValueError, match=r"one of \['fit', 'validate'\], but got 'test'"):
        report.save_snapshot(tmp_path / "x", stage="test")
    with pytest.raises(ValueError, match=r"one of \[\], but got None"):
        replace(report, stages={}).save_snapshot(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
