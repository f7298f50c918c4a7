"""The plan: which way to run, what else there was, and what it holds for."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memtrain.planning.fit.fingerprint import Fingerprint
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Way
from lightning_memtrain.tracing.device import Device


@dataclass(frozen=True)
class Plan:
    """How a run keeps a limit: the way to take, all others worth having, and the run that it is made for.

    Args:
        found: what the search came to.
        device: what the run uses.
        limit_bytes: most bytes to use: reserved ones and the context on a GPU, allocated ones on the CPU.
        allow: what may change the result, by name.
        fingerprint: the run that it holds for.
    """

    found: FoundWays
    device: Device
    limit_bytes: int
    allow: tuple[str, ...]
    fingerprint: Fingerprint

    @property
    def chosen(self) -> Way | None:
        """The way to take; ``None`` if nothing keeps the limit."""
        return self.found.chosen

    @property
    def plain(self) -> Way:
        """The run as it is."""
        return self.found.plain

    @property
    def front(self) -> tuple[Way, ...]:
        """The Pareto front of bytes and time, most bytes first."""
        return self.found.front

    @property
    def floor(self) -> Floor:
        """The least that the run needs."""
        return self.found.floor

    @property
    def fits(self) -> bool:
        """Whether there is a way that keeps the limit."""
        return self.chosen is not None

    def needed_bytes(self, way: Way) -> int | None:
        """What a way needs of the device, to be compared with the limit.

        Args:
            way: any.

        Returns:
            Reserved bytes and the context of a GPU; ``None`` if nobody predicted it.
        """
        return None if way.reserved_bytes is None else way.reserved_bytes + self.device.context_bytes
