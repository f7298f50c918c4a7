from __future__ import annotations

from typing import Any

import pytest

from lightning_memtrain.core import KIB, MIB
from lightning_memtrain.report.cuda_snapshot import Frame, SnapshotSummary, parse_snapshot, summarize
from lightning_memtrain.report.cuda_snapshot.document import own_frames
from lightning_memtrain.report.cuda_snapshot.summary import CallSite, Fragmentation, LiveBlock, Shortage
from tests.helpers.snapshots import FORWARD, STEP, snapshot_data


@pytest.fixture
def summary() -> SnapshotSummary:
    snapshot = parse_snapshot(snapshot_data())
    return summarize(snapshot.devices[0], snapshot.allocator_settings)


def without_failure() -> dict[str, Any]:
    """The same snapshot, but nobody asked for what does not fit."""
    data = snapshot_data()
    data["device_traces"][0] = [e for e in data["device_traces"][0] if e["action"] != "oom"]
    return data


def test_allocated_and_reserved_bytes_after_each_event(summary: SnapshotSummary) -> None:
    # 25 MiB less 100 bytes have all of a segment of 26 MiB; 1,000 bytes have 1 KiB.
    mib, small = [8, 8, 38, 38, 64, 64, 64, 64, 73, 64, 64, 38, 38, 38, 38, 38], [0] * 6 + [KIB] * 10
    assert list(summary.allocated_bytes) == [a * MIB + b for a, b in zip(mib, small, strict=True)]
    reserved = [20, 50, 50, 76, 76, 78, 78, 98, 98, 98, 98, 98, 98, 72, 52, 52]
    assert [size / MIB for size in summary.reserved_bytes] == reserved


def test_what_was_live_when_memory_ran_out(summary: SnapshotSummary) -> None:
    assert summary.focus_event == 14
    assert summary.live == (
        LiveBlock(30 * MIB, 1, FORWARD),
        LiveBlock(8 * MIB, None, STEP),
        LiveBlock(KIB, 5, FORWARD),
    )
    assert summary.call_sites == (CallSite(30 * MIB + KIB, 2, FORWARD[2:]), CallSite(8 * MIB, 1, STEP))


def test_the_peak_and_what_was_live_then() -> None:
    summary = summarize(parse_snapshot(without_failure()).devices[0], {})
    assert summary.peak_event == summary.focus_event == 8
    assert summary.peak_allocated_bytes == 73 * MIB + KIB
    assert summary.peak_reserved_bytes == 98 * MIB
    assert summary.live == (
        LiveBlock(30 * MIB, 1, FORWARD),
        LiveBlock(26 * MIB, 3, FORWARD),
        LiveBlock(9 * MIB, 7, FORWARD),
        LiveBlock(8 * MIB, None, STEP),  # known, since it is still there at the end
        LiveBlock(KIB, 5, FORWARD),
    )
    assert summary.call_sites == (CallSite(65 * MIB + KIB, 4, FORWARD[2:]), CallSite(8 * MIB, 1, STEP))


def test_no_more_rows_than_asked_for() -> None:
    summary = summarize(parse_snapshot(without_failure()).devices[0], {}, max_rows=1)
    assert [block.num_bytes for block in summary.live] == [30 * MIB]
    assert [site.num_bytes for site in summary.call_sites] == [65 * MIB + KIB]


def test_who_made_a_block_that_was_there_before_and_freed_is_not_known() -> None:
    data = without_failure()
    data["device_traces"][0] = data["device_traces"][0][6:]
    summary = summarize(parse_snapshot(data).devices[0], {})
    assert summary.peak_allocated_bytes == 73 * MIB + KIB
    assert summary.live == (
        LiveBlock(30 * MIB, None, FORWARD),
        LiveBlock(26 * MIB, None, ()),
        LiveBlock(9 * MIB, 1, FORWARD),
        LiveBlock(8 * MIB, None, STEP),
        LiveBlock(KIB, None, FORWARD),
    )


def test_fragmentation_at_the_end(summary: SnapshotSummary) -> None:
    assert summary.fragmentation == Fragmentation(
        free_bytes=12 * MIB + 2 * MIB - KIB,
        num_free_blocks=2,
        largest_free_bytes=12 * MIB,
        returnable_bytes=0,
        rounding_bytes=24,
    )
    assert summary.fragmentation.stuck_bytes == summary.fragmentation.free_bytes


def test_free_segments_could_go_back() -> None:
    data = snapshot_data()
    segment = data["segments"][1]
    (block,) = segment["blocks"]
    block["state"] = "inactive"
    fragmentation = summarize(parse_snapshot({"segments": [segment]}).devices[0], {}).fragmentation
    assert (fragmentation.returnable_bytes, fragmentation.stuck_bytes) == (30 * MIB, 0)


def test_what_an_allocation_was_short_of(summary: SnapshotSummary) -> None:
    assert summary.shortages == (
        Shortage(
            event=14,
            requested_bytes=60 * MIB,
            needed_bytes=60 * MIB,
            device_free_bytes=48 * MIB,
            allocated_bytes=38 * MIB + KIB,
            reserved_bytes=52 * MIB,
            largest_free_bytes=12 * MIB,
            frames=FORWARD,
        ),
    )
    assert summary.shortages[0].short_bytes == 12 * MIB


def test_a_shortage_without_what_the_device_had_left() -> None:
    data = snapshot_data()
    del data["device_traces"][0][14]["device_free"]
    (failure,) = summarize(parse_snapshot(data).devices[0], {}).shortages
    assert (failure.device_free_bytes, failure.short_bytes) == (None, None)


def test_without_events_the_end_is_the_peak() -> None:
    summary = summarize(parse_snapshot({"segments": snapshot_data()["segments"]}).devices[0], {})
    assert (summary.allocated_bytes, summary.reserved_bytes) == ((38 * MIB + KIB,), (52 * MIB,))
    assert [block.num_bytes for block in summary.live] == [30 * MIB, 8 * MIB, KIB]


def test_settings_that_are_not_modelled_are_named() -> None:
    snapshot = parse_snapshot(snapshot_data())
    summary = summarize(snapshot.devices[0], {"garbage_collection_threshold": 0.8})
    assert summary.not_modelled.startswith("garbage_collection_threshold=0.8 changes when torch takes")
    assert summary.peak_reserved_bytes == 98 * MIB  # as recorded


def test_frames_of_torch_lightning_and_cpp_are_nobodys_own() -> None:
    mine = (Frame("/home/me/model.py", 12, "forward"), Frame("<ipython-input-3>", 1, "<module>"))
    others = (
        Frame("??", 0, "malloc"),
        Frame("/pytorch/aten/src/ATen/native/Blas.cpp", 9, "addmm"),
        Frame("/venv/torch/nn/functional.py", 1, "linear"),
        Frame("/venv/lightning/pytorch/trainer/call.py", 1, "_call"),
        Frame("<frozen runpy>", 198, "_run_module_as_main"),
    )
    assert own_frames((*others, *mine)) == mine
    assert own_frames(others) == others  # better than nothing
    assert own_frames(()) == ()
