"""The report of a loop of one's own, without a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.core import ArgumentError, MemoryBreakdown, TechniqueRecord
from lightning_memtrain.core.arguments.value_checks import check_modules
from lightning_memtrain.report.memory_report import MemoryReport, StepPeak
from lightning_memtrain.report.run_environment import environment


def report_of_steps(
    model: nn.Module,
    steps: MemoryBreakdown | Sequence[MemoryBreakdown],
    techniques: Sequence[TechniqueRecord] = (),
) -> MemoryReport:
    """Make a report, with its table and its page, of training steps that a ledger has counted.

    Args:
        model: that is trained.
        steps: what :meth:`MemoryLedger.breakdown() <lightning_memtrain.MemoryLedger.breakdown>` gave of each
            step, in order.
        techniques: what made them need less memory.

    Returns:
        The report; :meth:`~lightning_memtrain.MemoryReport.show` shows it, and
        :meth:`~lightning_memtrain.MemoryReport.save_html` writes its page.

    Raises:
        ArgumentError: if there is no step, or something else than breakdowns.

    Example:
        >>> from lightning_memtrain import MemoryLedger
        >>> model = nn.Linear(4, 2)
        >>> with MemoryLedger(model) as ledger:
        ...     model(torch.ones(8, 4)).sum().backward()
        >>> report_of_steps(model, ledger.breakdown())
        <MemoryReport of Linear: peak of fit 236 B>
    """
    check_modules("report_of_steps", model=model)
    given = [steps] if isinstance(steps, MemoryBreakdown) else steps
    if (
        not isinstance(given, Sequence)
        or not given
        or not all(isinstance(one, MemoryBreakdown) for one in given)
    ):
        raise ArgumentError(
            "`report_of_steps(steps)` must be one or more breakdowns of a MemoryLedger, but got "
            f"{given!r}. Pass `ledger.breakdown()`."
        )
    return MemoryReport(
        model=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters() if not is_lazy(p)),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        environment=environment(torch.device(given[0].device)),
        stages={"fit": max(given, key=lambda one: one.peak_bytes)},
        steps=tuple(StepPeak(i, "fit", one.peak_bytes, ledger=True) for i, one in enumerate(given)),
        growth={"fit": given[-1].growth},
        techniques=tuple(techniques),
    )
