"""What a run will need on a device: the answer, with where every byte goes."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_memtrain.core import ArgumentError, MemoryBreakdown, TimelineEvent, format_bytes
from lightning_memtrain.core.notebooks import show
from lightning_memtrain.planning.prediction.largest import largest_that_fits
from lightning_memtrain.report import MemoryReport, save_html
from lightning_memtrain.tracing.device import Device

#: Version of what :meth:`Prediction.to_dict` returns.
SCHEMA_VERSION = 1

_KIND = "lightning_memtrain prediction"


@dataclass(frozen=True, repr=False)
class Prediction:
    """What training will need on a device.

    Args:
        device: the device.
        report: the report of the predicted steps, as :class:`~lightning_memtrain.MemoryProfiler` makes it.
        allocated_bytes: most bytes in blocks of torch's allocator, what libraries keep among them.
        reserved_bytes: most bytes that the allocator has from the device; on a CPU, whose allocator keeps
            nothing, what is allocated.
        context_bytes: what the process needs besides, an estimate: the CUDA context, and kernels; on a CPU
            what this process has in memory now beside model and batch, such as Python and its libraries.
        workspace_bytes: what cuBLAS and cuBLASLt keep, or on a CPU what operators hold only while they run at
            the peak; a part of ``allocated_bytes``.
        batch_size: samples in the batch; ``None`` where they cannot be told.
        unknown: numbers that the step asked for and nobody knows, taken for "not a number", with the line of
            the user's code that asked.
        unmeasured: operators of which it is not known what they hold while they run, and why; on a CPU.
        available_bytes: what this machine's other programs leave now, for a prediction for it.
        world_size: how many ranks the run has; all figures are those of the first of them.
        strategy: what the ranks exchange, ``"ddp"`` or ``"fsdp2"``; ``None`` for a run on one device.
        convolution_bound_bytes: what cuDNN may take besides, for as long as one convolution runs: the matrix
            of the largest one, if it were computed as one explicit product of matrices. Not in any other
            figure; 0 without convolutions.
        notes: what else is not known, and why.

    Example:
        >>> prediction = predict(model, batch, device="RTX 4090")  # doctest: +SKIP
        >>> prediction.fits  # doctest: +SKIP
        True
    """

    device: Device
    report: MemoryReport
    allocated_bytes: int
    reserved_bytes: int
    context_bytes: int
    workspace_bytes: int
    batch_size: int | None = None
    unknown: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()
    available_bytes: int | None = None
    world_size: int = 1
    strategy: str | None = None
    convolution_bound_bytes: int = 0
    notes: tuple[str, ...] = ()
    _of_size: Callable[[int], Prediction] | None = field(default=None, repr=False, compare=False)

    @property
    def breakdown(self) -> MemoryBreakdown:
        """Bytes by category, module and moment at the peak of the predicted step."""
        return self.report.stages["fit"]

    @property
    def timeline(self) -> tuple[TimelineEvent, ...]:
        """Bytes by category at every moment of the predicted step, that of its peak among them."""
        return self.breakdown.timeline

    @property
    def needed_bytes(self) -> int:
        """What the device must have for this process: reserved bytes and what it needs besides."""
        return self.reserved_bytes + self.context_bytes

    @property
    def spare_bytes(self) -> int:
        """What is left on the device; negative if it does not fit."""
        return self.device.total_bytes - self.device.driver_bytes - self.needed_bytes

    @property
    def fits(self) -> bool:
        """Whether the run fits on the device; by how much, :attr:`spare_bytes` says."""
        return self.spare_bytes >= 0

    @property
    def fits_surely(self) -> bool:
        """Whether it also fits if cuDNN takes :attr:`convolution_bound_bytes`."""
        return self.spare_bytes >= self.convolution_bound_bytes

    def largest_batch_size(self) -> int:
        """Find how many samples of the batch fit, by predicting again with more and fewer of them.

        Samples are taken from the batch in order, and from its first one again after the last.

        Returns:
            The number; 0 if not even one fits.

        Raises:
            ArgumentError: if the samples of the batch cannot be told.
        """
        if self._of_size is None or not self.batch_size:
            raise ArgumentError(
                "`Prediction.largest_batch_size()` needs a batch of tensors that share their first axis, the "
                "samples, but this prediction has none: it was made with `datamodule=`, or of a batch whose "
                "samples cannot be told. Pass `predict(batch)` such a batch, or predict with each size."
            )
        of_size, given = self._of_size, self.batch_size

        def spare(size: int) -> int:
            return self.spare_bytes if size == given else of_size(size).spare_bytes

        return largest_that_fits(spare, given)

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON.

        Returns:
            What :attr:`fits` and the other attributes are, under their names; ``kind`` and ``schema_version``
            tell what it is and in which form.
        """
        return {
            "kind": _KIND,
            "schema_version": SCHEMA_VERSION,
            "model": self.report.model,
            "num_parameters": self.report.num_parameters,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "strategy": self.strategy,
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
            "convolution_bound_bytes": self.convolution_bound_bytes,
            "fits_surely": self.fits_surely,
            "peak_event": self.breakdown.peak_event,
            "unknown": list(self.unknown),
            "unmeasured": list(self.unmeasured),
            "available_bytes": self.available_bytes,
            "notes": list(self.notes),
            "breakdown": self.breakdown.to_dict(),
        }

    def save(self, path: str | Path) -> None:
        """Write :meth:`to_dict` as JSON.

        Args:
            path: the file.
        """
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def save_html(self, path: str | Path) -> None:
        """Write the page of the report: bytes by category and module, and the timeline of the step.

        Args:
            path: the file.
        """
        save_html(self.report, Path(path))

    def __repr__(self) -> str:
        return f"<Prediction of {self._title()}, needs {format_bytes(self.needed_bytes)}>"

    def show(self) -> None:
        """Draw table and page in a notebook, or print the table."""
        show(self, str(self))

    def __str__(self) -> str:
        """A table for the terminal."""
        width = max(len(name) for name, _ in self._rows())
        lines = [f"{name.ljust(width)}  {value:>12}" for name, value in self._rows()]
        return "\n".join([self._title(), *lines, *self._remarks()])

    def _repr_html_(self) -> str:
        """A table for notebooks, and the page below."""
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{value}</td></tr>"
            for name, value in self._rows()
        )
        remarks = "".join(f"<p>{html.escape(remark)}</p>" for remark in self._remarks())
        return f"<table><caption>{html.escape(self._title())}</caption>{rows}</table>{remarks}" + (
            self.report._repr_html_()
        )

    def _title(self) -> str:
        ranks = "" if self.strategy is None else f", each of {self.world_size} by {self.strategy}"
        fits = "fits" if self.fits_surely else "fits, unless cuDNN takes too much"
        return f"{self.report.model} on {self.device.name}{ranks}: {fits if self.fits else 'does not fit'}"

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            (str(category).replace("_", " "), num) for category, num in self.breakdown.at_peak.items() if num
        ]
        rows += [
            ("allocated at the peak", self.allocated_bytes),
            *([("reserved by torch", self.reserved_bytes)] if self.device.is_cuda else []),
            (self._context_name, self.context_bytes),
            ("spare" if self.fits else "missing", abs(self.spare_bytes)),
        ]
        if self.convolution_bound_bytes:
            rows.append(("cuDNN for a while, at most", self.convolution_bound_bytes))
        return [(name, format_bytes(num)) for name, num in rows]

    @property
    def _context_name(self) -> str:
        return "CUDA context (estimate)" if self.device.is_cuda else "Python and libraries, as now"

    def _remarks(self) -> list[str]:
        remarks = [f"A number that nobody knows beforehand was asked for: {one}" for one in self.unknown]
        remarks += [f"What it holds while it runs is not known of {one}" for one in self.unmeasured]
        if self.available_bytes is not None and self.available_bytes < self.needed_bytes and self.fits:
            remarks.append(f"Other programs leave only {format_bytes(self.available_bytes)} of it now.")
        if self.fits and not self.fits_surely:
            remarks.append(
                f"cuDNN chooses how to compute convolutions on the GPU itself, and may take up to "
                f"{format_bytes(self.convolution_bound_bytes)} for the largest one, which is more than the "
                f"spare {format_bytes(self.spare_bytes)}"
            )
        return [*remarks, *self.notes]
