"""Which sizes torch's caching allocator takes, rounds to and splits at.

Constants and rules are those of ``c10/core/AllocatorConfig.h`` and ``c10/cuda/CUDACachingAllocator.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_memtrain.core import GIB, MIB, ArgumentError

# Every block is a multiple of this (kMinBlockSize).
BLOCK_BYTES = 512
# A block of at most this size comes from the small pool (kSmallSize).
SMALL_BYTES = MIB
# What the small pool takes from the device at once (kSmallBuffer).
SMALL_SEGMENT_BYTES = 2 * MIB
# What the large pool takes at once for a block below LARGE_ALLOCATION_BYTES (kLargeBuffer, kMinLargeAlloc).
LARGE_SEGMENT_BYTES = 20 * MIB
LARGE_ALLOCATION_BYTES = 10 * MIB
# A larger block gets a segment of its own, of a multiple of this (kRoundLarge).
SEGMENT_MULTIPLE_BYTES = 2 * MIB

# Names in PYTORCH_CUDA_ALLOC_CONF that change how much is reserved, or when, and that the model lacks. All
# others are about pinned host memory, locks, graphs or the driver, and change nothing here.
_NOT_MODELLED = ("garbage_collection_threshold", "large_segment_size_mb", "max_non_split_rounding_mb")
# What they are unless they are set, if it is not 0.
_DEFAULTS = {"large_segment_size_mb": 20, "max_non_split_rounding_mb": 20}
# Entries of a snapshot with the text that was set; not all of it has entries of its own.
_TEXTS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def round_up(num_bytes: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``num_bytes``.

    Args:
        num_bytes: at least 0.
        multiple: at least 1.

    Returns:
        The multiple.

    Example:
        >>> round_up(513, 512)
        1024
    """
    return -(-num_bytes // multiple) * multiple


def page_bytes(*, small: bool) -> int:
    """What an expandable segment maps and unmaps at once.

    Args:
        small: whether it belongs to the small pool.

    Returns:
        Bytes.
    """
    return SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES


@dataclass(frozen=True)
class AllocatorSettings:
    """What of ``PYTORCH_CUDA_ALLOC_CONF`` changes addresses and reserved bytes.

    Args:
        expandable_segments: whether a pool has one range of addresses into which pages are mapped as needed,
            instead of many segments.
        max_split_size_bytes: blocks of this size and more are never split, and are kept for allocations of
            this size and more; above 20 MiB, ``None`` for no such limit.
        roundup_power2_divisions: by power of two from 1 MiB to 32 GiB, in as many steps sizes between it and
            the next are rounded up (a size below counts as 1 MiB, one above as 32 GiB); 0 and 1 are none.
    """

    expandable_segments: bool = False
    max_split_size_bytes: int | None = None
    roundup_power2_divisions: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        limit = self.max_split_size_bytes
        if limit is not None and limit <= LARGE_SEGMENT_BYTES:
            raise ArgumentError(
                f"`AllocatorSettings(max_split_size_bytes)` must be more than {LARGE_SEGMENT_BYTES:,} "
                f"(20 MiB), as torch asks for, but got {limit:,}."
            )
        for power, divisions in self.roundup_power2_divisions:
            if divisions < 0 or divisions & (divisions - 1) or power not in _POWERS:
                raise ArgumentError(
                    "`AllocatorSettings(roundup_power2_divisions)` must be pairs of a power of two from "
                    f"1 MiB to 32 GiB, in bytes, and 0 or a power of two, but got {(power, divisions)}."
                )

    @classmethod
    def parse(cls, configuration: str) -> AllocatorSettings:
        """Read a value of ``PYTORCH_CUDA_ALLOC_CONF``.

        Args:
            configuration: as the variable has it, e.g. ``"expandable_segments:True,max_split_size_mb:128"``.

        Returns:
            The settings.

        Raises:
            ArgumentError: if a setting that changes reserved bytes cannot be read or is not modelled.

        Example:
            >>> AllocatorSettings.parse("expandable_segments:True").expandable_segments
            True
        """
        found = dict(re.findall(r"(\w+)\s*:\s*(\[[^\]]*\]|[^,\s]+)", configuration))
        try:
            split_mb = found.get("max_split_size_mb")
            return cls.from_snapshot(
                {
                    "expandable_segments": _FLAGS[found.get("expandable_segments", "False")],
                    "max_split_size": -1 if split_mb is None else int(split_mb) * MIB,
                    "roundup_power2_divisions": _parse_divisions(found.get("roundup_power2_divisions", "0")),
                    **{name: float(found[name]) for name in _NOT_MODELLED if name in found},
                }
            )
        except (KeyError, ValueError) as error:
            raise ArgumentError(
                "`AllocatorSettings.parse(configuration)` must be what PYTORCH_CUDA_ALLOC_CONF may be, but "
                f"got {configuration!r}, where this is wrong: {error}"
            ) from error

    @classmethod
    def from_snapshot(cls, recorded: Mapping[str, Any]) -> AllocatorSettings:
        """Read the settings that torch writes into a snapshot of its memory.

        Args:
            recorded: the entry ``allocator_settings`` of the snapshot; ``{}`` for torch's defaults.

        Returns:
            The settings.

        Raises:
            ValueError: if a setting was in force that the model lacks.
        """
        for name in _NOT_MODELLED:
            value = _recorded_number(recorded, name)
            if value > 0 and value != _DEFAULTS.get(name):
                raise ValueError(
                    f"{name}={value:g} changes when torch takes and gives back memory, which is not "
                    f"modelled; leave it out."
                )
        # As torch writes it: MiB as text, e.g. {"1": 0, "2": 4}.
        divisions = (recorded.get("roundup_power2_divisions") or {}).items()
        split = recorded.get("max_split_size", -1)
        # -1, or all bits of a size_t: no limit.
        return cls(
            expandable_segments=bool(recorded.get("expandable_segments", False)),
            max_split_size_bytes=split if 0 < split < 2**62 else None,
            roundup_power2_divisions=tuple((int(mib) * MIB, count) for mib, count in divisions if count > 1),
        )

    @classmethod
    def nearest(cls, recorded: Mapping[str, Any]) -> tuple[AllocatorSettings, str]:
        """Read the settings of a snapshot as far as they are modelled.

        Args:
            recorded: the entry ``allocator_settings`` of the snapshot.

        Returns:
            The settings, and what about them is not modelled: ``""`` if all is.
        """
        try:
            return cls.from_snapshot(recorded), ""
        except ValueError as error:
            left_out = (*_NOT_MODELLED, *_TEXTS)
            modelled = {name: value for name, value in recorded.items() if name not in left_out}
            return cls.from_snapshot(modelled), str(error)

    def block_bytes(self, num_bytes: int) -> int:
        """What an allocation of ``num_bytes`` takes at least."""
        if num_bytes < BLOCK_BYTES:
            return BLOCK_BYTES
        divisions = self._divisions(num_bytes) if self.roundup_power2_divisions else 0
        if divisions <= 1 or num_bytes <= BLOCK_BYTES * divisions:
            return round_up(num_bytes, BLOCK_BYTES)
        step = max((1 << (num_bytes.bit_length() - 1)) // divisions, 1)
        return round_up(num_bytes, step)

    def segment_bytes(self, block_bytes: int) -> int:
        """What is taken from the device where no free block is of use for one of ``block_bytes``.

        An expandable segment takes less where the last of its mapped bytes are free.
        """
        if self.expandable_segments:
            return round_up(block_bytes, page_bytes(small=block_bytes <= SMALL_BYTES))
        if block_bytes <= SMALL_BYTES:
            return SMALL_SEGMENT_BYTES
        if block_bytes < LARGE_ALLOCATION_BYTES:
            return LARGE_SEGMENT_BYTES
        return round_up(block_bytes, SEGMENT_MULTIPLE_BYTES)

    def splits(self, block_bytes: int, rest_bytes: int, *, small: bool) -> bool:
        """Whether the rest of a block is split off where ``block_bytes`` of it are needed."""
        if small or self.expandable_segments:
            return rest_bytes >= BLOCK_BYTES
        return rest_bytes > SMALL_BYTES and not self.is_oversize(block_bytes)

    def is_oversize(self, block_bytes: int) -> bool:
        """Whether a block of this size is never split."""
        return self.max_split_size_bytes is not None and block_bytes >= self.max_split_size_bytes

    def _divisions(self, num_bytes: int) -> int:
        power = 1 << (num_bytes.bit_length() - 1)
        power = min(max(power, _POWERS[0]), _POWERS[-1])
        return dict(self.roundup_power2_divisions).get(power, 0)


_POWERS = [MIB << exponent for exponent in range(16)]
assert _POWERS[-1] == 32 * GIB
_FLAGS = {"True": True, "False": False}


def _recorded_number(recorded: Mapping[str, Any], name: str) -> float:
    """A number among the settings of a snapshot, or in the text that was set; 0 if it is in neither."""
    if name in recorded:
        return float(recorded[name])
    text = ",".join(str(recorded.get(entry) or "") for entry in _TEXTS)
    found = re.search(rf"\b{name}\s*:\s*([\d.]+)", text)
    return float(found[1]) if found else 0.0


def _parse_divisions(text: str) -> dict[str, int]:
    """Divisions by MiB, from ``"4"`` or ``"[256:1,512:2,>:4]"``.

    The first of a list also holds for all below it, ``>`` for all above the last.
    """
    powers = [power // MIB for power in _POWERS]
    if not text.startswith("["):
        return {str(power): int(text) for power in powers}
    by_power: dict[int, int] = {}
    for pair in text[1:-1].split(","):
        limit, count = (part.strip() for part in pair.split(":"))
        last = max(by_power, default=0)
        if limit == ">":
            reached = [power for power in powers if power > last]
        else:
            reached = [power for power in powers if power == int(limit) or (not last and power < int(limit))]
        by_power.update(dict.fromkeys(reached, int(count)))
    return {str(power): count for power, count in by_power.items()}
