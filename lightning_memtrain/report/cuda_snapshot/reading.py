"""Reads a snapshot file without trusting it: no class that it names is imported, nothing is called."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_memtrain.report.cuda_snapshot.document import CudaSnapshot, DeviceSnapshot, Frame, Frames
from lightning_memtrain.tracing.allocator import AllocatorEvent, BlockRecord, SegmentRecord
from lightning_memtrain.tracing.allocator.events import (
    ALLOC,
    ALLOCATED,
    AWAITING_FREE,
    FREE_COMPLETED,
    FREE_REQUESTED,
    INACTIVE,
    OUT_OF_MEMORY,
    SEGMENT_ALLOC,
    SEGMENT_FREE,
    SEGMENT_MAP,
    SEGMENT_UNMAP,
)

_ACTIONS = frozenset(
    {
        ALLOC,
        FREE_REQUESTED,
        FREE_COMPLETED,
        SEGMENT_ALLOC,
        SEGMENT_FREE,
        SEGMENT_MAP,
        SEGMENT_UNMAP,
        OUT_OF_MEMORY,
    }
)
# The second is what torch's documentation calls the state.
_STATES = {
    ALLOCATED: ALLOCATED,
    AWAITING_FREE: AWAITING_FREE,
    "active_awaiting_free": AWAITING_FREE,
    INACTIVE: INACTIVE,
}
_HOW = (
    "Pass the file that `torch.cuda.memory._dump_snapshot(path)` wrote, after "
    "`torch.cuda.memory._record_memory_history()`."
)


class _HoldsClass(Exception):
    """The pickle names a class or function."""


class _PlainUnpickler(pickle.Unpickler):
    """Makes dictionaries, lists, tuples, texts and numbers, and nothing else."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise _HoldsClass(f"{module}.{name}")

    def persistent_load(self, identifier: Any) -> NoReturn:
        raise _HoldsClass(f"the object {identifier!r}")


def load_snapshot(path: Path) -> CudaSnapshot:
    """Read what ``torch.cuda.memory._dump_snapshot`` wrote.

    Args:
        path: the file.

    Returns:
        The snapshot.

    Raises:
        FileNotFoundError: if there is no file at ``path``.
        ValueError: if the file is no pickle, is cut off, names a class, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected a snapshot of CUDA memory at {str(path)!r}, but there is no such file. {_HOW}"
        )
    with path.open("rb") as file:
        is_pickle = file.read(1) == pickle.PROTO
        file.seek(0)
        try:
            data = _PlainUnpickler(file).load()
        except _HoldsClass as error:
            raise ValueError(
                f"Expected a snapshot of CUDA memory in {str(path)!r}, but it holds {error}: a snapshot has "
                f"plain dictionaries, lists, texts and numbers, and nothing that a file names is imported. "
                f"{_HOW}"
            ) from None
        except Exception as error:
            if is_pickle and isinstance(error, EOFError | pickle.UnpicklingError):
                what = "it was cut off"
                cure = "Copy it again, or let the program that writes it end."
            else:
                what, cure = "it is another kind of file", _HOW
            raise ValueError(
                f"Expected a snapshot of CUDA memory in {str(path)!r}, but {what} "
                f"({type(error).__name__}: {error}). {cure}"
            ) from error
    try:
        return parse_snapshot(data, path.name)
    except ValueError as error:
        raise ValueError(f"{error} (File: {str(path)!r}.)") from error


def parse_snapshot(data: Any, name: str = "snapshot") -> CudaSnapshot:
    """Read what ``torch.cuda.memory._snapshot`` returned.

    Args:
        data: the dictionary, or only its list of segments.
        name: what the report calls it.

    Returns:
        The snapshot.

    Raises:
        ValueError: if ``data`` is something else, or an entry is missing or wrong.
    """
    if isinstance(data, list):  # what old versions wrote
        data = {"segments": data}
    if not isinstance(data, dict) or not isinstance(data.get("segments"), list):
        found = f"the entries {sorted(map(str, data))[:5]}" if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"Expected a snapshot of CUDA memory with its 'segments', but got {found}. {_HOW}")
    try:
        return _parse(data, name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"Expected a complete snapshot of CUDA memory, but an entry is missing or wrong: "
            f"{type(error).__name__}: {error}. The file was changed after torch wrote it; write it again."
        ) from error


def _parse(data: Mapping[str, Any], name: str) -> CudaSnapshot:
    stacks = _Stacks()
    traces = data.get("device_traces") or []
    by_device: dict[int, list[Mapping[str, Any]]] = {}
    for segment in data["segments"]:
        by_device.setdefault(segment.get("device", 0), []).append(segment)
    devices = []
    for index in range(max([len(traces), *(device + 1 for device in by_device)])):
        trace = traces[index] if index < len(traces) else []
        device = _parse_device(index, trace, by_device.get(index, []), stacks)
        if device.events or device.segments:
            devices.append(device)
    return CudaSnapshot(name, tuple(devices), dict(data.get("allocator_settings") or {}))


def _parse_device(
    index: int, trace: Sequence[Mapping[str, Any]], segments: Sequence[Mapping[str, Any]], stacks: _Stacks
) -> DeviceSnapshot:
    events: list[AllocatorEvent] = []
    frames: list[Frames] = []
    device_free: dict[int, int] = {}
    for entry in trace:
        action = entry["action"]
        if action not in _ACTIONS:  # e.g. that the snapshot was taken
            continue
        if action == OUT_OF_MEMORY and "device_free" in entry:
            device_free[len(events)] = _number(entry["device_free"])
        address = _number(entry.get("addr", 0) if action == OUT_OF_MEMORY else entry["addr"])
        events.append(AllocatorEvent(action, address, _number(entry["size"]), _number(entry["stream"])))
        frames.append(stacks.read(entry.get("frames")))
    block_frames: dict[int, Frames] = {}
    records = [_parse_segment(segment, block_frames, stacks) for segment in segments]
    return DeviceSnapshot(
        index=index,
        events=tuple(events),
        frames=tuple(frames),
        segments=tuple(sorted(records, key=lambda record: record.address)),
        block_frames=block_frames,
        device_free=device_free,
    )


def _parse_segment(
    segment: Mapping[str, Any], block_frames: dict[int, Frames], stacks: _Stacks
) -> SegmentRecord:
    address = _number(segment["address"])
    blocks, end = [], address
    for block in segment["blocks"]:
        size, state = _number(block["size"]), _STATES[block["state"]]
        requested = 0 if state == INACTIVE else _number(block.get("requested_size", size))
        blocks.append(BlockRecord(end, size, requested, state))
        if state != INACTIVE and (frames := stacks.read(block.get("frames"))):
            block_frames[end] = frames
        end += size
    size = _number(segment["total_size"])
    if end - address != size:
        raise ValueError(f"a segment of {size} bytes has blocks of {end - address}")
    small, expandable = segment.get("segment_type") == "small", bool(segment.get("is_expandable", False))
    return SegmentRecord(address, size, _number(segment["stream"]), small, expandable, tuple(blocks))


class _Stacks:
    """Call stacks, each made once: torch writes one list for all events that share it."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, Frames]] = {}

    def read(self, frames: Sequence[Mapping[str, Any]] | None) -> Frames:
        if not frames:
            return ()
        if id(frames) not in self._made:
            made = tuple(
                Frame(str(frame["filename"]), _number(frame["line"]), str(frame["name"])) for frame in frames
            )
            # The list is kept, so that no other one can have its id.
            self._made[id(frames)] = (frames, made)
        return self._made[id(frames)][1]


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"expected a whole number of at least 0, but got {value!r}")
    return value
