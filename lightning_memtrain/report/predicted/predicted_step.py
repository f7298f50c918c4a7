"""What was predicted of a run before its first step, to be laid beside what was counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_memtrain.core import CategoryBytes, MemoryBreakdown


class Prediction(Protocol):
    """What the profiler reads of a prediction, as :class:`lightning_memtrain.planning.Prediction` has it."""

    @property
    def allocated_bytes(self) -> int:
        """Most bytes in blocks of the allocator."""

    @property
    def reserved_bytes(self) -> int:
        """Most bytes that the allocator has from the device."""

    @property
    def breakdown(self) -> MemoryBreakdown:
        """Bytes by category at the peak."""

    @property
    def unknown(self) -> tuple[str, ...]:
        """What of the step nobody knows beforehand."""


class Predictor(Protocol):
    """What predicts, as :func:`lightning_memtrain.predict` does."""

    def __call__(self, model: Any, *, datamodule: Any, trainer: Any, device: Any) -> Prediction:
        """Predict what training will need.

        Args:
            model: the module to train.
            datamodule: where batches come from; ``None`` for the module's own.
            trainer: as the run has it.
            device: name of the device; ``None`` for the GPU of this machine.

        Returns:
            The prediction.
        """


@dataclass(frozen=True)
class ComparedBytes:
    """One figure, predicted and counted.

    Args:
        name: of the figure.
        predicted_bytes: before the run.
        counted_bytes: in it.
    """

    name: str
    predicted_bytes: int
    counted_bytes: int

    @property
    def off(self) -> float | None:
        """By which part of what was counted the prediction was too high; ``None`` if nothing was counted."""
        return self.predicted_bytes / self.counted_bytes - 1 if self.counted_bytes else None


@dataclass(frozen=True)
class PredictedStep:
    """What was predicted of the training steps of a run.

    Args:
        ledger_peak_bytes: most bytes of tensors; ``None`` if nothing could be predicted.
        allocated_bytes: most bytes in the allocator's blocks; ``None`` likewise.
        reserved_bytes: most bytes that the allocator has from the device; ``None`` likewise, and where it
            takes none ahead.
        at_peak: bytes per category at the predicted peak.
        unknown: what of the step nobody knew.
        failure: why nothing was predicted; empty if something was.
        device: for which it was.
    """

    ledger_peak_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    at_peak: CategoryBytes | None = None
    unknown: tuple[str, ...] = ()
    failure: str = ""
    device: str = ""

    @classmethod
    def of(cls, prediction: Prediction) -> PredictedStep:
        """What of a prediction the report keeps.

        Args:
            prediction: of the run.

        Returns:
            Its figures.
        """
        breakdown = prediction.breakdown
        return cls(
            ledger_peak_bytes=breakdown.ledger_peak_bytes,
            allocated_bytes=prediction.allocated_bytes,
            reserved_bytes=prediction.reserved_bytes,
            at_peak=breakdown.at_peak,
            unknown=(*prediction.unknown, *getattr(prediction, "notes", ())),
            device=breakdown.device,
        )

    def beside(self, counted: MemoryBreakdown) -> tuple[ComparedBytes, ...]:
        """Lay the figures beside those of a step that has run.

        Args:
            counted: the step with the highest peak.

        Returns:
            The peaks that are known of both, and the categories that hold something at either peak.
        """
        if self.ledger_peak_bytes is None or self.at_peak is None:
            return ()
        peaks = (
            ("ledger", self.ledger_peak_bytes, counted.ledger_peak_bytes),
            ("allocator", self.allocated_bytes, counted.allocator_peak_bytes),
            ("reserved", self.reserved_bytes, counted.reserved_bytes),
        )
        rows = [ComparedBytes(name, ours, real) for name, ours, real in peaks if ours and real is not None]
        for category, ours in self.at_peak.items():
            if ours or counted.at_peak[category]:
                rows.append(ComparedBytes(f"{category} at the peak", ours, counted.at_peak[category]))
        return tuple(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON."""
        return {
            "ledger_peak_bytes": self.ledger_peak_bytes,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "at_peak": None if self.at_peak is None else self.at_peak.to_dict(),
            "unknown": list(self.unknown),
            "failure": self.failure,
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PredictedStep:
        """The inverse of :meth:`to_dict`."""
        at_peak = data["at_peak"]
        return cls(
            **{
                **data,
                "at_peak": None if at_peak is None else CategoryBytes(at_peak),
                "unknown": tuple(data["unknown"]),
            }
        )
