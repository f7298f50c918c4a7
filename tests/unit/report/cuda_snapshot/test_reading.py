from __future__ import annotations

import copy
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from lightning_memtrain.core import MIB
from lightning_memtrain.report.cuda_snapshot import load_snapshot, parse_snapshot
from lightning_memtrain.tracing.allocator import BlockRecord
from tests.helpers.snapshots import FORWARD, STEP, snapshot_data


def saved(tmp_path: Path, data: Any, protocol: int | None = None) -> Path:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_snapshot_is_read(tmp_path: Path, protocol: int) -> None:
    snapshot = load_snapshot(saved(tmp_path, snapshot_data(), protocol))
    assert snapshot.name == "snapshot.pickle"
    assert snapshot.allocator_settings["expandable_segments"] is False
    (device,) = snapshot.devices
    assert device.index == 0
    assert [event.action for event in device.events] == [
        *("segment_alloc", "alloc", "segment_alloc", "alloc", "segment_alloc", "alloc"),
        *("segment_alloc", "alloc", "free_requested", "free_completed", "free_requested", "free_completed"),
        *("segment_free", "segment_free", "oom"),
    ]
    assert device.events[1][2:] == (30 * MIB, 0)
    assert device.events[7][2:] == (9 * MIB, 7)
    assert device.frames == (FORWARD,) * 15
    assert device.device_free == {14: 48 * MIB}
    assert [segment.size for segment in device.segments] == [20 * MIB, 30 * MIB, 2 * MIB]
    address = device.segments[0].address
    assert device.segments[0].blocks[0] == BlockRecord(address, 8 * MIB, 8 * MIB, "active_allocated")
    assert device.block_frames[address] == STEP


def test_call_stacks_that_torch_shares_are_made_once(tmp_path: Path) -> None:
    (device,) = load_snapshot(saved(tmp_path, snapshot_data())).devices
    assert len({id(frames) for frames in device.frames}) <= len(device.frames)
    data = snapshot_data()
    for entry in data["device_traces"][0]:
        entry["frames"] = data["device_traces"][0][0]["frames"]
    (device,) = load_snapshot(saved(tmp_path, data)).devices
    assert len({id(frames) for frames in device.frames}) == 1


def test_several_devices_are_told_apart() -> None:
    data = snapshot_data()
    other = copy.deepcopy(data)
    for segment in other["segments"]:
        segment["device"] = 2
    data["segments"] += other["segments"]
    data["device_traces"] += [[], other["device_traces"][0]]
    first, second = parse_snapshot(data).devices
    assert (first.index, second.index) == (0, 2)
    assert first.segments == second.segments
    assert first.events == second.events


def test_what_old_versions_of_torch_wrote_is_read() -> None:
    data = snapshot_data()
    for segment in data["segments"]:
        del segment["is_expandable"], segment["segment_pool_id"], segment["device"]
        for block in segment["blocks"]:
            del block["address"], block["frames"]
            if block["state"] == "inactive":
                del block["requested_size"]
    whole = parse_snapshot(snapshot_data()).devices[0]
    (device,) = parse_snapshot(data["segments"]).devices  # only segments
    assert device.segments == whole.segments
    assert (device.events, device.block_frames) == ((), {})


def test_a_block_that_waits_for_a_stream_has_two_names() -> None:
    data = snapshot_data()
    for name in ("active_pending_free", "active_awaiting_free"):
        data["segments"][0]["blocks"][0]["state"] = name
        (device,) = parse_snapshot(data).devices
        assert device.segments[0].blocks[0].state == "active_pending_free"


def test_an_empty_snapshot_has_no_devices() -> None:
    assert parse_snapshot({"segments": [], "device_traces": [[], []]}).devices == ()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Expected a snapshot .* no such file\. Pass the file that"):
        load_snapshot(tmp_path / "none.pickle")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"kind": 1}', b"PK\x03\x04", b"\x93NUMPY"])
def test_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"Expected a snapshot .* but it is another kind of file \(.*_dump_snap"
    ):
        load_snapshot(path)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_that_was_cut_off(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, snapshot_data())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share) + 1])
    with pytest.raises(ValueError, match=r"Expected a snapshot .* but it was cut off \(.*\)\. Copy it again"):
        load_snapshot(path)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm was done",)


@pytest.mark.parametrize(
    ("inside", "named"),
    [
        (Harmful(), rf"{os.mkdir.__module__}.mkdir"),
        (OrderedDict(), "collections.OrderedDict"),
        ({1, 2}, None),
        (Path("x"), "pathlib"),
        (2j, "builtins.complex"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_file_that_names_a_class_is_refused_and_nothing_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: Any, named: str | None, protocol: int
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(tmp_path, {"segments": [], "device_traces": [[inside]]}, protocol)
    holds = named if named and protocol > 2 else r"\w+\.\w+"
    if named is None and protocol == 4:  # a set is plain there, but no part of a snapshot
        holds = None
    message = rf"it holds {holds}.*nothing that a file names is imported" if holds else "is missing or wrong"
    with pytest.raises(ValueError, match=message):
        load_snapshot(path)
    assert not (tmp_path / "harm was done").exists()


def test_a_pickle_with_persistent_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pickle"
    path.write_bytes(b"\x80\x04\x8c\x01aQ.")
    with pytest.raises(ValueError, match="holds the object 'a'"):
        load_snapshot(path)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ({"weights": 1}, r"the entries \['weights'\]"),
        ({"segments": 3}, r"the entries \['segments'\]"),
        (3, "int"),
        ("text", "str"),
    ],
)
def test_a_pickle_of_something_else(tmp_path: Path, data: Any, found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"with its 'segments', but got {found}\. Pass .*x?snapshot\.pickle"
    ):
        load_snapshot(saved(tmp_path, data))


def broken(change: str) -> Any:
    data = snapshot_data()
    trace, segment = data["device_traces"][0], data["segments"][0]
    if change == "no action":
        del trace[0]["action"]
    elif change == "no address":
        del trace[0]["addr"]
    elif change == "negative size":
        trace[0]["size"] = -1
    elif change == "text for a stream":
        trace[0]["stream"] = "0"
    elif change == "unknown state":
        segment["blocks"][0]["state"] = "used"
    elif change == "block lost":
        del segment["blocks"][0]
    elif change == "frame without line":
        del trace[0]["frames"][0]["line"]
    elif change == "trace is a number":
        data["device_traces"] = [3]
    return data


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("no action", "KeyError: 'action'"),
        ("no address", "KeyError: 'addr'"),
        ("negative size", "expected a whole number of at least 0, but got -1"),
        ("text for a stream", "but got '0'"),
        ("unknown state", "KeyError: 'used'"),
        ("block lost", "a segment of 20971520 bytes has blocks of 12582912"),
        ("frame without line", "KeyError: 'line'"),
        ("trace is a number", "TypeError"),
    ],
)
def test_an_entry_that_is_missing_or_wrong(change: str, found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"an entry is missing or wrong: .*{re.escape(found)}.*write it again"
    ):
        parse_snapshot(broken(change))
