"""The policy that chooses by itself what to recompute: within a limit, or at the knee of memory and time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from lightning_memtrain.checkpointing.policies import Groups, RecomputationPolicy
from lightning_memtrain.core import ArgumentError, ByteLimit
from lightning_memtrain.core.devices.device_memory import free_device_bytes

DEVICE = "device"
"""Stands for what the device has free."""


@dataclass(frozen=True)
class MemoryBudget(RecomputationPolicy):
    """Recomputes what brings the step within a limit in the least time, found by running it without data.

    The first call of ``training_step`` runs once with weights, gradients and optimizer state that hold no
    data, nor does what they make, so nothing to speak of is allocated. That shows for every module call which
    bytes it holds at the peak, and every operator is timed on the device, alone. What is recomputed, alone or
    together with what follows, is then chosen by dynamic programming, and the choice is run in the same way
    in turn. It is made again before a step that would need more: larger batches, thawed parameters, another
    optimizer.

    Args:
        limit: most bytes that the step may hold, e.g. ``"4GiB"``, ``"800MB"`` or a number of bytes; weights,
            gradients, optimizer state and workspace of operators among them. A float is a share of the
            device's memory: 0.9. ``"device"`` for what the device has free. ``None`` for the knee of the
            curve: the least product of peak and time, so nothing that hardly lowers the peak.

    Raises:
        ArgumentError: if ``limit`` is no size; at the first step, if it cannot be reached.
    """

    limit: int | str | float | None = None

    def __post_init__(self) -> None:
        _ = self._byte_limit

    @property
    def _byte_limit(self) -> ByteLimit | None:
        if self.limit is None or self.limit == DEVICE:
            return None
        return ByteLimit(self.limit, "MemoryBudget(limit)")

    @property
    def limit_bytes(self) -> int | None:
        """The limit in bytes; ``None`` if there is none, or the device is to tell."""
        limit = self._byte_limit
        return None if limit is None else limit.num_bytes

    @property
    def has_limit(self) -> bool:
        """Whether there is a limit to keep."""
        return self.limit is not None

    def limit_bytes_on(self, device: torch.device) -> int | None:
        """The limit on a device.

        Args:
            device: where the step runs.

        Returns:
            The bytes; ``None`` for no limit.

        Raises:
            ArgumentError: if the device is to tell, and does not.
        """
        limit = self._byte_limit
        if limit is not None:
            return limit.on(device)
        if self.limit is None:
            return None
        free_bytes = free_device_bytes(device)
        if free_bytes is None:
            raise ArgumentError(
                f"`MemoryBudget(limit)` must be a size on {device.type}, which does not tell what it has "
                "free, but got limit='device'. Write what the step may take, e.g. MemoryBudget('4GiB')."
            )
        return free_bytes

    def groups(self, model: nn.Module) -> Groups:
        """Not known before the first step."""
        raise NotImplementedError(
            "`MemoryBudget` is chosen from a training step, so it cannot say what to recompute in a model "
            f"alone. Give it to the callback, `ActivationCheckpointing({self!r})`; for `insert_checkpoints` "
            "use `plan_recomputation(model, step, arguments).groups`, or another policy, e.g. `Full()`."
        )
