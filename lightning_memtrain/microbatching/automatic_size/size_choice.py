"""How many samples at a time: fixed, or found by a probe and corrected when memory runs out."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memtrain.core import format_bytes
from lightning_memtrain.microbatching.automatic_size.fitting_size import BatchConditions, FittingSize

# So many sizes are remembered for batches of different kinds.
_MOST_FOUND = 32


class AutoSize:
    """The number of samples at a time that fits the memory.

    It is what probes found, see :func:`~.size_search.largest_fitting`: the largest of those that are sure to
    hold for the batch at hand. Running out of memory halves it; so does an allocator that had to free its
    cache and try again in two batches running. After a stretch of clean batches it doubles, up to what
    probes found; each failure makes the stretch twice as long.

    Args:
        limit_bytes: most bytes to use; ``None`` for what the device has free.
        grow_after_batches: clean batches before a smaller size is doubled.
    """

    def __init__(self, limit_bytes: int | None, grow_after_batches: int) -> None:
        self.limit_bytes = limit_bytes
        self.events: list[str] = []
        self.size: int | None = None
        """Most samples per chunk; ``None`` before the first probe."""
        self._found: list[FittingSize] = []
        self._most: int | None = None  # since memory ran out
        self._grow_after = grow_after_batches
        self._num_clean = 0
        self._num_retries = 0

    def size_for(self, now: BatchConditions) -> int | None:
        """The size for a batch.

        Args:
            now: the batch.

        Returns:
            The size; ``None`` if no probe says anything about such a batch, so that it has to be probed.
        """
        sizes = [found.size for found in self._found if found.holds_for(now, self.limit_bytes)]
        if not sizes:
            return None
        return max(sizes) if self._most is None else min(max(sizes), self._most)

    def choose(self, now: BatchConditions) -> int | None:
        """Take the size for a batch, if it is known.

        Args:
            now: the batch.

        Returns:
            As :meth:`size_for`.
        """
        size = self.size_for(now)
        if size is not None:
            self.size = size
        return size

    def start(self, step: int, found: FittingSize) -> None:
        """Take what a probe found.

        Args:
            step: optimizer steps so far.
            found: the size, for the batch at hand.
        """
        now = found.made_for
        why = self._found[-1].lacks(now) if self._found else ""
        # What was found for less than this, and is no larger, will not be asked for again.
        self._found = [
            one
            for one in self._found
            if one.size > found.size or not found.holds_for(one.made_for, self.limit_bytes)
        ]
        self._found = [*self._found[1 - _MOST_FOUND :], found]
        before = self.size
        self.size = found.size if self._most is None else min(found.size, self._most)
        if self.size != before:
            peak_bytes = found.peak_bytes
            fits = "no size was found that fits" if peak_bytes is None else format_bytes(peak_bytes)
            self._say(
                step,
                f"microbatch_size={self.size} of {now.num_samples} samples{why}: {fits} of "
                f"{format_bytes(found.limit_bytes)}",
            )

    def reduce_to(self, step: int, size: int, why: str) -> None:
        """Take a smaller size from now on.

        Args:
            step: optimizer steps so far.
            size: the new size.
            why: what to say in the report.
        """
        self._say(step, f"{why}; microbatch_size={size} from here")
        self.size = self._most = size
        self._num_clean = 0

    def failed(self, step: int, attempted: int, why: str = "out of memory") -> None:
        """Halve the size, because it does not fit.

        Args:
            step: optimizer steps so far.
            attempted: samples of the largest chunk that was tried, at least 2.
            why: what to say in the report.
        """
        self._grow_after *= 2
        self.reduce_to(step, (attempted + 1) // 2, f"{why} at microbatch_size={attempted}")

    def succeeded(self, step: int, retried: bool) -> None:
        """Count a batch that went well; shrink or grow for the next ones.

        Args:
            step: optimizer steps so far.
            retried: whether the allocator had to free its cache and try again.
        """
        assert self.size is not None
        self._num_retries = self._num_retries + 1 if retried else 0
        if self._num_retries >= 2 and self.size > 1:
            self._num_retries = 0
            self._grow_after *= 2
            self.reduce_to(step, (self.size + 1) // 2, "the allocator had to retry in two batches running")
            return
        self._num_clean += 1
        ceiling = self._ceiling
        if self._most is not None and self._most < ceiling and self._num_clean >= self._grow_after:
            self._most = min(2 * self._most, ceiling)
            self._say(step, f"{self._num_clean} clean batches; microbatch_size={self._most} from here")
            self.size = self._most
            self._num_clean = 0

    @property
    def _ceiling(self) -> int:
        """What the size may grow to again."""
        return max((found.size for found in self._found), default=0)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know."""
        return {
            "microbatch_size": self.size,
            "most_since_failure": self._most,
            "grow_after_batches": self._grow_after,
            "num_clean_batches": self._num_clean,
            "num_retries": self._num_retries,
            "found": [found.to_list() for found in self._found],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: what it returned.
        """
        self.size = state["microbatch_size"]
        self._grow_after = state["grow_after_batches"]
        self._num_clean = state["num_clean_batches"]
        self._num_retries = state["num_retries"]
        # Older versions did not save what was found, so they probe again.
        self._found = [FittingSize.from_list(values) for values in state.get("found", ())]
        self._most = state.get("most_since_failure")
        # Below all that probes found, it can only be that memory ran out.
        if self._found and self.size is not None and self.size < min(found.size for found in self._found):
            self._most = self.size

    def _say(self, step: int, what: str) -> None:
        self.events.append(f"step {step}: {what}")


class GivenSize(AutoSize):
    """A size that somebody has chosen, which running out of memory makes smaller.

    No batch is probed: each is tried with this size.

    Args:
        size: samples at a time, at least 1.
        grow_after_batches: clean batches before a smaller size is doubled.
    """

    def __init__(self, size: int, grow_after_batches: int) -> None:
        super().__init__(None, grow_after_batches)
        self.given = size
        self.size = size

    def size_for(self, now: BatchConditions) -> int:
        """As given, or what was left of that.

        Args:
            now: the batch.

        Returns:
            The size.
        """
        return self.given if self._most is None else min(self.given, self._most)

    @property
    def _ceiling(self) -> int:
        return self.given


def allocation_retries(device: torch.device) -> int:
    """How often the device's allocator had to free its cache and try again, since the process began."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "memory_stats"):
        return 0
    return int(module.memory_stats(device).get("num_alloc_retries", 0))
