"""The fixed names under which a breakdown is logged."""

from __future__ import annotations

from lightning_memtrain.core import MIB, Category, MemoryBreakdown
from lightning_memtrain.report.memory_report import MemoryReport


def breakdown_metrics(
    breakdown: MemoryBreakdown, stage: str = "fit", growth_bytes: int = 0
) -> dict[str, float]:
    """Write a breakdown as scalars in MiB, always with the same keys.

    The ``at_peak`` rows add up to ``peak_mib``.

    Args:
        breakdown: a step's bytes.
        stage: ``"fit"`` has its keys right under ``memory/``, other stages under ``memory/<stage>/``.
        growth_bytes: bytes that outlived their step.

    Returns:
        Values in MiB by key, e.g. ``memory/peak_mib`` or ``memory/validate/at_peak/activations_mib``.
    """
    sizes = {"peak": breakdown.peak_bytes, "ledger_peak": breakdown.ledger_peak_bytes}
    sizes |= {f"at_peak/{category}": held for category, held in breakdown.at_peak.items()}
    # Workspace is known only at the peak.
    sizes |= {f"max/{c}": held for c, held in breakdown.maxima.items() if c is not Category.WORKSPACE}
    sizes |= {"recomputed": breakdown.recomputed_at_peak_bytes, "growth": growth_bytes}
    prefix = "memory" if stage == "fit" else f"memory/{stage}"
    return {f"{prefix}/{name}_mib": size / MIB for name, size in sizes.items()}


def comparison_metrics(report: MemoryReport) -> dict[str, float]:
    """Write what was predicted as scalars, and by how much that was off.

    Args:
        report: of a run that was predicted.

    Returns:
        Values by key: ``memory/predicted/ledger_mib`` and ``memory/predicted/ledger_off_percent``; likewise
        for the allocator's peak and what it reserved, where both are known.
    """
    metrics: dict[str, float] = {}
    for row in report.compared:
        if row.name in ("ledger", "allocator", "reserved") and row.off is not None:
            metrics[f"memory/predicted/{row.name}_mib"] = row.predicted_bytes / MIB
            metrics[f"memory/predicted/{row.name}_off_percent"] = row.off * 100
    return metrics
