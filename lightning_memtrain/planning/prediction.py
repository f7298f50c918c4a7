"""What a run will need on a device: the answer, with where every byte goes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_memtrain.core import MemoryBreakdown, format_bytes
from lightning_memtrain.report import MemoryReport
from lightning_memtrain.tracing.device import Device

#: Version of what :meth:`Prediction.to_dict` writes.
SCHEMA = 1


@dataclass(frozen=True)
class Prediction:
    """What training will need on a device.

    Args:
        device: the device.
        report: the report of the predicted steps, as :class:`~lightning_memtrain.MemoryProfiler` would make it.
        allocated_bytes: most bytes in blocks of torch's allocator, what libraries keep among them.
        reserved_bytes: most bytes that the allocator has from the device.
        context_bytes: what the process needs besides: the CUDA context, and kernels.
        workspace_bytes: what cuBLAS and cuBLASLt keep, a part of ``allocated_bytes``.
        unknown: numbers that the step asked for and nobody knows, taken for "not a number", by the line of
            the user's code that asked.
    """

    device: Device
    report: MemoryReport
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    workspace_bytes: int
    unknown: tuple[str, ...] = ()
    _stage: str = field(default="fit", repr=False)

    @property
    def breakdown(self) -> MemoryBreakdown:
        """Bytes by category, module and moment at the peak of the predicted step."""
        return self.report.stages[self._stage]

    @property
    def needed_bytes(self) -> int:
        """What the device must have for this process: reserved bytes and context."""
        return self.reserved_bytes + self.context_bytes

    @property
    def spare_bytes(self) -> int:
        """What is left on the device; negative if it does not fit."""
        return self.device.total_bytes - self.device.driver_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether the run fits on the device; by how much, :attr:`spare_bytes` says."""
        return self.spare_bytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON; ``schema`` is the version of their form."""
        return {
            "schema": SCHEMA,
            "device": {
                "name": self.device.name,
                "total_bytes": self.device.total_bytes,
                "driver_bytes": self.device.driver_bytes,
                "usable_bytes": self.device.usable_bytes,
            },
            "fits": self.fits,
            "spare_bytes": self.spare_bytes,
            "needed_bytes": self.needed_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "context_bytes": self.context_bytes,
            "workspace_bytes": self.workspace_bytes,
            "unknown": list(self.unknown),
            "breakdown": self.breakdown.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON.

        Args:
            path: the file.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        """A table for the terminal."""
        rows = [(str(category).replace("_", " "), num) for category, num in self.breakdown.at_peak.items() if num]
        rows += [("allocated", self.allocated_bytes), ("reserved", self.reserved_bytes)]
        rows += [("context (estimate)", self.context_bytes)]
        verdict = "spare" if self.fits else "too much"
        rows += [(f"{verdict} on {self.device.name}", abs(self.spare_bytes))]
        width = max(len(name) for name, _ in rows)
        lines = [f"{name.ljust(width)}  {format_bytes(num):>12}" for name, num in rows]
        return "\n".join([f"Predicted for {self.report.model} on {self.device.name}", *lines, *self.unknown])
