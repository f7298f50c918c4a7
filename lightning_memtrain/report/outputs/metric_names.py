"""The fixed names under which a breakdown is logged."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_memtrain.core import GIB, MIB, Category, MemoryBreakdown
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


# Of the categories, those that hold most of nearly every run; the others are summed up beside them.
_SHOWN = (
    *(Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.ACTIVATIONS),
    Category.WORKSPACE,
)
_BESIDE = ("peak", "growth", "allocator_peak", "ranks/max_peak", "ranks/min_peak")
_OTHER_STAGES = ("validate", "test", "predict")
#: From here on an axis in MiB would have numbers of five digits.
FIVE_DIGITS_BYTES = 10_000 * MIB


def essential_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The most telling of a step's metrics, at most a dozen for a run.

    Args:
        metrics: of one stage, as :func:`breakdown_metrics` names them.

    Returns:
        Of training the peak, what it is made of (small categories summed up as ``at_peak/other``, so that
        the rows still add up) and what grows; of other stages the peak. What is no metric of a stage stays.
    """
    found: dict[str, float] = {}
    for key, value in metrics.items():
        name = key.removeprefix("memory/").removesuffix("_mib")
        stage, _, rest = name.partition("/")
        if stage in _OTHER_STAGES:
            if rest == "peak":
                found[key] = value
        elif name in _BESIDE or stage == "predicted":
            found[key] = value
        elif name.startswith("at_peak/"):
            category = Category(name.removeprefix("at_peak/"))
            shown = key if category in _SHOWN else "memory/at_peak/other_mib"
            found[shown] = found.get(shown, 0.0) + value
    return found


def in_gib(metrics: Mapping[str, float]) -> dict[str, float]:
    """The same metrics in GiB, which their names say.

    Args:
        metrics: values by key; what is not in MiB stays as it is.

    Returns:
        Values by key.

    Example:
        >>> in_gib({"memory/peak_mib": 20480.0, "memory/predicted/ledger_off_percent": 1.5})
        {'memory/peak_gib': 20.0, 'memory/predicted/ledger_off_percent': 1.5}
    """
    return {
        f"{key.removesuffix('_mib')}_gib" if key.endswith("_mib") else key: (
            value * MIB / GIB if key.endswith("_mib") else value
        )
        for key, value in metrics.items()
    }
