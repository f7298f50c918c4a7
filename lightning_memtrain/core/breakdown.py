"""What the ledger yields: frozen records that can be printed, compared and written as JSON."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lightning_memtrain.core.categories import Category, CategoryBytes
from lightning_memtrain.core.notebooks import show
from lightning_memtrain.core.units import format_bytes


@dataclass(frozen=True)
class ModuleMemory:
    """Bytes of one module, live at the peak of the step.

    A byte belongs to the innermost module, never to its parents as well, so the rows of a breakdown can be
    added up. ``name`` is the module's path in the model (``""`` is the model itself and whatever ran
    outside of its submodules).

    Args:
        name: path of the module in the model, as in ``named_modules()``.
        type_name: class name of the module.
        parameters_bytes: its own parameters.
        buffers_bytes: its own buffers.
        gradients_bytes: gradients of its own parameters.
        optimizer_state_bytes: optimizer state of its own parameters.
        produced_bytes: activations and temporaries live at the peak that ran out of this module.
        saved_bytes: activations live at the peak that this module was the first to save for its backward.
    """

    name: str
    type_name: str
    parameters_bytes: int = 0
    buffers_bytes: int = 0
    gradients_bytes: int = 0
    optimizer_state_bytes: int = 0
    produced_bytes: int = 0
    saved_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """All that this module accounts for at the peak (what it saved is what some module produced)."""
        return (
            self.parameters_bytes
            + self.buffers_bytes
            + self.gradients_bytes
            + self.optimizer_state_bytes
            + self.produced_bytes
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain names and numbers, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModuleMemory:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


@dataclass(frozen=True)
class TimelineEvent:
    """Live bytes at one moment of the step.

    Args:
        index: position on the timeline, from 0.
        name: what happened, e.g. ``"forward block1.0.conv1"``, ``"backward"`` or ``"optimizer step"``.
        held: bytes per category right after it.
    """

    index: int
    name: str
    held: CategoryBytes

    def to_dict(self) -> dict[str, Any]:
        """Plain names and numbers, for JSON."""
        return {"index": self.index, "name": self.name, "held": self.held.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TimelineEvent:
        """The inverse of :meth:`to_dict`."""
        return cls(index=data["index"], name=data["name"], held=CategoryBytes(data["held"]))


@dataclass(frozen=True)
class CodeSite:
    """Storages that are live at the peak and that one line of the user's code has made.

    Args:
        file: path of the file, or the name of a notebook's cell; ``""`` if it is not known.
        line: number of the line, from 1; 0 if it is not known.
        function: in which it is.
        in_backward: whether the backward of the line has made them.
        was_there: whether they were there before the step, as parameters are.
        category: what they are used for, as :class:`~lightning_memtrain.core.Category` has it.
        module: path of the module that made them, or whose parameters they belong to.
        num_bytes: their bytes.
        num_storages: how many they are.
    """

    file: str
    line: int
    function: str
    category: str
    num_bytes: int
    num_storages: int
    module: str = ""
    in_backward: bool = False
    was_there: bool = False

    def __str__(self) -> str:
        """The line in short."""
        if not self.file:
            return "there before the step" if self.was_there else "not known"
        place = f"{self.file}:{self.line}"
        return f"backward of {place}" if self.in_backward else place

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CodeSite:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


@dataclass(frozen=True)
class Growth:
    """Storages that outlived the step in which they were made and are no part of the training state.

    Args:
        module: path of the module that made them; ``""`` is code outside of any submodule.
        num_bytes: their bytes.
        num_storages: how many there are.
    """

    module: str
    num_bytes: int
    num_storages: int

    def to_dict(self) -> dict[str, Any]:
        """Plain names and numbers, for JSON."""
        return {"module": self.module, "num_bytes": self.num_bytes, "num_storages": self.num_storages}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Growth:
        """The inverse of :meth:`to_dict`."""
        return cls(**data)


@dataclass(frozen=True, repr=False)
class MemoryBreakdown:
    """Where every byte of a training step went.

    Args:
        device: the device whose storages were counted, e.g. ``"cuda:0"``.
        at_peak: bytes per category at the moment when most bytes were live; adds up to :attr:`peak_bytes`.
        maxima: the largest bytes of each category at any time; not at one moment, so no total is meaningful.
        peak_event: the last timeline event before the peak.
        recomputed_at_peak_bytes: the part of the activations at the peak that checkpointing recomputed.
        recomputed_max_bytes: the largest part of the activations at any time that was recomputed.
        aside_peak_bytes: most bytes that were live at once in what ran within the step and is left out of all
            other figures, such as probes; 0 if nothing is left out.
        start_bytes: live bytes when the ledger was entered.
        end_bytes: live bytes when it was left.
        modules: one row per module that held anything at the peak.
        timeline: bytes per category at every event, in order.
        growth: what outlived its step, largest first.
        allocator_peak_bytes: the device allocator's own peak over the same time; ``None`` where it has none.
        reserved_bytes: most bytes that the allocator had taken from the device, its free blocks among them;
            ``None`` where it takes none ahead.
        num_alloc_retries: how often the allocator had to give its free blocks back to go on; ``None``
            likewise.
        sites: the user's lines of code that have made what is live at the peak, largest first; empty unless
            they were asked for.
    """

    device: str
    at_peak: CategoryBytes
    maxima: CategoryBytes
    peak_event: str = ""
    recomputed_at_peak_bytes: int = 0
    recomputed_max_bytes: int = 0
    aside_peak_bytes: int = 0
    start_bytes: int = 0
    end_bytes: int = 0
    modules: tuple[ModuleMemory, ...] = ()
    timeline: tuple[TimelineEvent, ...] = ()
    growth: tuple[Growth, ...] = ()
    allocator_peak_bytes: int | None = None
    reserved_bytes: int | None = None
    num_alloc_retries: int | None = None
    sites: tuple[CodeSite, ...] = ()

    def __repr__(self) -> str:
        return f"<MemoryBreakdown on {self.device}: peak {format_bytes(self.peak_bytes)}>"

    def __str__(self) -> str:
        """Bytes by category at the peak, largest first."""
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {size:>12}" for name, size in rows)

    def _repr_html_(self) -> str:
        """The same as a table, for notebooks."""
        rows = "".join(
            f"<tr><td style='text-align:left'>{name}</td><td>{size}</td></tr>" for name, size in self._rows()
        )
        return f"<table><caption>Memory on {html.escape(self.device)}</caption>{rows}</table>"

    def show(self) -> None:
        """Draw the table in a notebook, or print it."""
        show(self, str(self))

    def _rows(self) -> list[tuple[str, str]]:
        held = sorted(self.at_peak.items(), key=lambda one: -one[1])
        rows = [(category.value.replace("_", " "), format_bytes(size)) for category, size in held if size]
        return [*rows, ("peak", format_bytes(self.peak_bytes))]

    @property
    def ledger_peak_bytes(self) -> int:
        """Most bytes of tensor storages that were live at once."""
        return self.at_peak.total_bytes - self.at_peak[Category.WORKSPACE]

    @property
    def peak_bytes(self) -> int:
        """The device allocator's peak where it is known, else the ledger's: the sum of :attr:`at_peak`."""
        return self.at_peak.total_bytes

    @property
    def shown(self) -> tuple[Category, ...]:
        """The categories that a table has rows of: the usual ones, and what else held anything."""
        return tuple(one for one in Category if one.is_usual or self.maxima[one] or self.at_peak[one])

    @property
    def growth_bytes(self) -> int:
        """All bytes that outlived their step."""
        return sum(row.num_bytes for row in self.growth)

    def with_allocator_peak(
        self,
        allocator_peak_bytes: int | None,
        *,
        reserved_bytes: int | None = None,
        num_alloc_retries: int | None = None,
    ) -> MemoryBreakdown:
        """The same breakdown laid beside the device allocator's peak.

        The workspace row becomes ``allocator_peak_bytes - ledger_peak_bytes``, so that the rows add up to
        the allocator's peak exactly. It can be negative on an allocator that saw fewer bytes than the ledger.

        Args:
            allocator_peak_bytes: its peak over the same time, or ``None`` if unknown (workspace 0).
            reserved_bytes: see :attr:`reserved_bytes`.
            num_alloc_retries: see :attr:`num_alloc_retries`.

        Returns:
            A new breakdown.
        """
        workspace_bytes = 0 if allocator_peak_bytes is None else allocator_peak_bytes - self.ledger_peak_bytes
        return replace(
            self,
            at_peak=self.at_peak.with_workspace(workspace_bytes),
            allocator_peak_bytes=allocator_peak_bytes,
            reserved_bytes=reserved_bytes,
            num_alloc_retries=num_alloc_retries,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain names and numbers, for JSON."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("at_peak", "maxima"):
            plain[name] = plain[name].to_dict()
        for name in ("modules", "timeline", "growth", "sites"):
            plain[name] = [row.to_dict() for row in plain[name]]
        return plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> MemoryBreakdown:
        """The inverse of :meth:`to_dict`."""
        rows: dict[str, Any] = dict(data)
        for name in ("at_peak", "maxima"):
            rows[name] = CategoryBytes(rows[name])
        rows["modules"] = tuple(map(ModuleMemory.from_dict, rows["modules"]))
        rows["timeline"] = tuple(map(TimelineEvent.from_dict, rows["timeline"]))
        rows["growth"] = tuple(map(Growth.from_dict, rows["growth"]))
        rows["sites"] = tuple(map(CodeSite.from_dict, rows.get("sites", ())))  # older files have none
        return cls(**rows)
