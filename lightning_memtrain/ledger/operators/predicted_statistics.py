"""What the allocator would say of a step without data, in the place of the allocator's own figures."""

from __future__ import annotations

from collections.abc import Callable

from lightning_memtrain.ledger.device_allocator import AllocatorReading, AllocatorStatistics
from lightning_memtrain.ledger.operators.workspace import OpWorkspace


class PredictedStatistics(AllocatorStatistics):
    """Reads the peak that a ledger predicts, of a device whose allocator keeps nothing ahead.

    Args:
        workspace: what operators hold while they run; for the ledger.
    """

    def __init__(self, workspace: OpWorkspace) -> None:
        self.workspace = workspace
        self.granularity_bytes = workspace.granularity_bytes
        self.predicted_peak_bytes: Callable[[], int] | None = None
        """Asked at the end of a stretch; whoever makes the ledger sets it."""

    def start(self) -> None:
        """A ledger begins by itself."""

    def stop(self, start_bytes: int = 0, end_bytes: int | None = None) -> AllocatorReading | None:
        """End the stretch.

        Args:
            start_bytes: bytes that were live at the start.
            end_bytes: not needed.

        Returns:
            The predicted figures; ``None`` if no ledger has run.
        """
        predicted, self.predicted_peak_bytes = self.predicted_peak_bytes, None
        if predicted is None:
            return None
        peak_bytes = predicted()
        return AllocatorReading(peak_bytes=peak_bytes, over_start_bytes=peak_bytes - start_bytes)
