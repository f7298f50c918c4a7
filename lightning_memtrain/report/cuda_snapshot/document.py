"""A snapshot of torch's CUDA memory as frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_memtrain.tracing.allocator import AllocatorEvent, SegmentRecord


class Frame(NamedTuple):
    """A line of a call stack.

    Args:
        filename: the file.
        line: number of the line in it.
        name: the function.
    """

    filename: str
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.filename}:{self.line} {self.name}"


# Innermost first, as torch has them.
Frames = tuple[Frame, ...]

# Parts of the names of files in which nobody looks for the origin of a block.
_NOT_OWN = ("/torch/", "/lightning/", "/pytorch_lightning/", "<frozen ", "/runpy.py")
_OF_CPP = ("", "??")


def own_frames(frames: Frames) -> Frames:
    """The frames that a reader can do something about.

    Args:
        frames: a call stack.

    Returns:
        Those of neither torch, Lightning, the interpreter nor C++; all, if there are none else.
    """
    own = tuple(
        frame
        for frame in frames
        if frame.filename not in _OF_CPP
        and frame.filename.endswith((".py", "]", ">"))
        and not any(part in frame.filename for part in _NOT_OWN)
    )
    return own or frames


@dataclass(frozen=True)
class DeviceSnapshot:
    """What a snapshot holds of one device.

    Args:
        index: number of the device.
        events: what its allocator did, the last ones if not all were kept.
        frames: the call stack of each event, empty where none was recorded.
        segments: what the allocator had from the device at the end, by address.
        block_frames: the call stacks of blocks in use at the end, by their address.
        device_free: bytes that the device had left at each ``oom`` event, by the event's position.
    """

    index: int
    events: tuple[AllocatorEvent, ...] = ()
    frames: tuple[Frames, ...] = ()
    segments: tuple[SegmentRecord, ...] = ()
    block_frames: Mapping[int, Frames] = field(default_factory=dict)
    device_free: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CudaSnapshot:
    """What ``torch.cuda.memory._dump_snapshot`` wrote.

    Args:
        name: of the file.
        devices: those that hold anything.
        allocator_settings: as torch recorded them, ``{}`` if it did not.
    """

    name: str
    devices: tuple[DeviceSnapshot, ...]
    allocator_settings: Mapping[str, Any] = field(default_factory=dict)
