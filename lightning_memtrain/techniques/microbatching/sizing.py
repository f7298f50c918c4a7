"""How many samples at a time: fixed, or found by a probe and corrected when memory runs out."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memtrain.core import format_bytes


class FixedSplit:
    """Always the same number of chunks, or chunks of at most the same size.

    Args:
        num_microbatches: chunks per batch.
        microbatch_size: most samples per chunk, if ``num_microbatches`` is ``None``.
    """

    def __init__(self, num_microbatches: int | None, microbatch_size: int | None) -> None:
        self.num_microbatches = num_microbatches
        self.microbatch_size = microbatch_size


class AutoSize:
    """The number of samples at a time that fits the memory.

    It starts from what a probe found, see :func:`~.probe.largest_fitting`. Running out of memory halves it;
    so does an allocator that had to free its cache and try again in two batches running. After a stretch of
    clean batches it doubles, up to what the probe found; each failure makes the stretch twice as long.

    Args:
        limit_bytes: most bytes to use; ``None`` for what the device has free.
        grow_after_batches: clean batches before a smaller size is doubled.
    """

    def __init__(self, limit_bytes: int | None, grow_after_batches: int) -> None:
        self.limit_bytes = limit_bytes
        self.events: list[str] = []
        self.size: int | None = None
        """Most samples per chunk; ``None`` before the probe."""
        self._ceiling = 0
        self._grow_after = grow_after_batches
        self._num_clean = 0
        self._num_retries = 0
        # The batch of the last probe, and whether that ran before the optimizer had made its state.
        self._probed_size = 0
        self._lacks_optimizer_state = False

    def is_unknown_for(self, batch_size: int, has_optimizer_state: bool) -> bool:
        """Whether the last probe, if any, says nothing about a batch.

        Args:
            batch_size: samples of the batch.
            has_optimizer_state: whether the optimizer has made its state by now.

        Returns:
            Whether to probe: at first, once there is optimizer state, and for a batch larger than one that
            fitted as a whole.
        """
        if self.size is None or (self._lacks_optimizer_state and has_optimizer_state):
            return True
        return batch_size > self._probed_size == self._ceiling

    def start(
        self,
        step: int,
        size: int,
        batch_size: int,
        peak_bytes: int | None,
        free_bytes: int,
        has_optimizer_state: bool,
    ) -> None:
        """Take a size that a probe found as the one to start from and never to exceed.

        Args:
            step: optimizer steps so far.
            size: most samples per chunk, on all ranks.
            batch_size: samples of the whole batch.
            peak_bytes: peak of a chunk of this rank's own choice; ``None`` if memory ran out.
            free_bytes: bytes that may be used in all.
            has_optimizer_state: whether the optimizer has made its state.
        """
        had_room = self._probed_size == self._ceiling == self.size
        self._lacks_optimizer_state, self._probed_size = not has_optimizer_state, batch_size
        if self.size is not None and not had_room:
            size = min(size, self.size)
        if size != self.size:
            found = "no size was found that fits" if peak_bytes is None else f"{format_bytes(peak_bytes)}"
            now = " with optimizer state" if has_optimizer_state and self.size is not None else ""
            self._say(
                step,
                f"microbatch_size={size} of {batch_size} samples{now}: {found} of {format_bytes(free_bytes)}",
            )
        self.size = self._ceiling = size

    def reduce_to(self, step: int, size: int, why: str) -> None:
        """Take a smaller size from now on.

        Args:
            step: optimizer steps so far.
            size: the new size.
            why: what to say in the report.
        """
        self._say(step, f"{why}; microbatch_size={size} from here")
        self.size = size
        self._num_clean = 0

    def failed(self, step: int, attempted: int) -> None:
        """Halve the size, because memory ran out.

        Args:
            step: optimizer steps so far.
            attempted: samples of the largest chunk that was tried, at least 2.
        """
        self._grow_after *= 2
        self.reduce_to(step, (attempted + 1) // 2, f"out of memory at microbatch_size={attempted}")

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
        if self._num_clean >= self._grow_after and self.size < self._ceiling:
            size = min(2 * self.size, self._ceiling)
            self._say(step, f"{self._num_clean} clean batches; microbatch_size={size} from here")
            self.size = size
            self._num_clean = 0

    def state_dict(self) -> dict[str, int | None]:
        """What a resumed run has to know."""
        return {
            "microbatch_size": self.size,
            "ceiling": self._ceiling,
            "grow_after_batches": self._grow_after,
            "num_clean_batches": self._num_clean,
            "num_retries": self._num_retries,
            "probed_size": self._probed_size,
            "lacks_optimizer_state": self._lacks_optimizer_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: what it returned.
        """
        self.size = state["microbatch_size"]
        self._ceiling = state["ceiling"]
        self._grow_after = state["grow_after_batches"]
        self._num_clean = state["num_clean_batches"]
        self._num_retries = state["num_retries"]
        self._probed_size = state["probed_size"]
        self._lacks_optimizer_state = state["lacks_optimizer_state"]

    def _say(self, step: int, what: str) -> None:
        self.events.append(f"step {step}: {what}")


def free_device_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still use on a device, with those that it uses already.

    Args:
        device: any device.

    Returns:
        The bytes; ``None`` where the device does not tell (the CPU, which lends more than it has).
    """
    module: Any = getattr(torch, device.type, None)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    if not hasattr(module, "mem_get_info"):
        return None
    free_bytes, _ = module.mem_get_info(device)
    return int(free_bytes + module.memory_reserved(device))


def allocation_retries(device: torch.device) -> int:
    """How often the device's allocator had to free its cache and try again, since the process began."""
    module: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(module, "memory_stats"):
        return 0
    return int(module.memory_stats(device).get("num_alloc_retries", 0))
