"""The columns of a module's row in tables for loggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_memtrain.core import ModuleMemory

MODULE_COLUMNS: dict[str, Callable[[ModuleMemory], int]] = {
    "total": lambda row: row.total_bytes,
    "produced": lambda row: row.produced_bytes,
    "saved": lambda row: row.saved_bytes,
    "parameters": lambda row: row.parameters_bytes,
    "buffers": lambda row: row.buffers_bytes,
    "gradients": lambda row: row.gradients_bytes,
    "optimizer_state": lambda row: row.optimizer_state_bytes,
}


def module_row(row: ModuleMemory, unit_bytes: int) -> list[Any]:
    """A module's name, its class and its sizes.

    Args:
        row: of a breakdown.
        unit_bytes: bytes of the unit of the sizes.

    Returns:
        Name, class and one number per column.
    """
    return [row.name, row.type_name, *(size(row) / unit_bytes for size in MODULE_COLUMNS.values())]
