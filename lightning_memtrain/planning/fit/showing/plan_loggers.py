"""What loggers get of a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities import rank_zero_only

from lightning_memtrain.core import MIB
from lightning_memtrain.planning.fit.showing.plan_page import plan_page
from lightning_memtrain.planning.fit.way import FoundWays
from lightning_memtrain.report.outputs.loggers import logger_kind, training_goes_on
from lightning_memtrain.tracing.device import Device

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


@rank_zero_only
def log_plan(logger: Logger, model: str, found: FoundWays, device: Device, limit_bytes: int) -> None:
    """Send a plan to a logger that shows more than numbers: W&B gets the page, and the front as a chart.

    Args:
        logger: any Lightning logger.
        model: the name of the model's class.
        found: what the search came to.
        device: what the run uses.
        limit_bytes: the most that it may use.
    """
    with training_goes_on(logger):
        if logger_kind(logger) == "WandbLogger":
            _log_to_wandb(logger, model, found, device, limit_bytes)


def _log_to_wandb(logger: Any, model: str, found: FoundWays, device: Device, limit_bytes: int) -> None:
    import wandb

    run = logger.experiment
    columns: list[str | int] = ["way", "needed_mib", "time_ratio", "exact"]
    rows = [
        [str(way), (way.reserved_bytes + device.context_bytes) / MIB, way.time_ratio, way.exact]
        for way in dict.fromkeys((*filter(None, [found.chosen]), *found.front))
        if way.reserved_bytes is not None and way.time_ratio is not None
    ]
    page = plan_page(model, found, device, limit_bytes)
    front = wandb.plot.scatter(
        wandb.Table(columns, rows),
        "needed_mib",
        "time_ratio",
        title="Ways to fit: MiB against time of a step",
    )
    # No `step=`: W&B drops what is not newer than its last step, and Lightning counts otherwise.
    run.log({"memory_plan/page": wandb.Html(page, inject=False), "memory_plan/front": front})
    run.summary["memory_plan/limit_mib"] = limit_bytes / MIB
    if found.chosen is not None:
        run.summary["memory_plan/way"] = str(found.chosen)
