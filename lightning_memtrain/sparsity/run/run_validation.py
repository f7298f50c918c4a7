"""Runs that sparse training would spoil, each with the reason and a way out."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer

from lightning_memtrain.core import ArgumentError, NoEffectWarning
from lightning_memtrain.core.compiled_modules import is_compiled
from lightning_memtrain.sparsity import sharding
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.methods.update_schedules import RunLength, UpdateSteps

_STRATEGIES = (
    "FSDPStrategy",
    "DeepSpeedStrategy",
    "XLAStrategy",
    "XLAFSDPStrategy",
    "SingleDeviceXLAStrategy",
)
_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")


def refuse_run(trainer: Trainer, num_given: int, method: SparseMethod, leave: str = "sparse") -> None:
    """Refuse strategies that shard, and callbacks that look at weights by their place.

    Args:
        trainer: of the run.
        num_given: how many callbacks of the kind it has.
        method: that is at work.
        leave: what the run leaves.

    Raises:
        ArgumentError: if a strategy needs another method.
        MisconfigurationException: naming the strategy or the callback.
    """
    if num_given > 1:
        raise MisconfigurationException(
            "`SparseTraining` must be given once, but got it twice. Give layers sparsities of their own by "
            "Select(overrides=...)."
        )
    if _kind(trainer.strategy, _STRATEGIES):
        raise MisconfigurationException(
            "`SparseTraining` needs parameters that are whole on each device, since weights move between "
            f"positions, but got {type(trainer.strategy).__name__}. Train with ddp or on one device, or with "
            "ModelParallelStrategy and `fully_shard`."
        )
    if sharding.divides_parameters(trainer.strategy) and method.changes_nnz:
        raise ArgumentError(
            "`SparseTraining(method)` must keep the number of weights of each layer under "
            f"{type(trainer.strategy).__name__}, whose shards keep their size, but got {method!r}. Use RigL, "
            "SET or StaticSparse, or train with ddp or on one device."
        )
    if sharding.divides_parameters(trainer.strategy) and leave == "dense":
        raise MisconfigurationException(
            "`SparseTraining(leave='dense')` needs weights that are whole on each device, but got "
            f"{type(trainer.strategy).__name__}. Use leave='sparse', and load `export_dense(model)` after it."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _kind(callback, _AVERAGES):
            raise MisconfigurationException(
                f"`SparseTraining` cannot be combined with {type(callback).__name__}: an average of values "
                "whose positions moved mixes different weights. Leave it out, or average "
                "`export_dense(model)` yourself."
            )
        if _kind(callback, ("ModelPruning",)):
            raise MisconfigurationException(
                f"`SparseTraining` cannot be combined with {type(callback).__name__}, which masks dense "
                "weights. Leave it out; GradualMagnitudePruning prunes during sparse training."
            )


def _kind(candidate: Any, names: Iterable[str]) -> bool:
    return any(base.__name__ in names for base in type(candidate).__mro__)


def warn_of_recompiling(model: LightningModule, method: SparseMethod) -> None:
    """Warn of compiled layers that would soon not be compiled any more.

    Args:
        model: that is trained.
        method: that is at work.
    """
    # torch.compile brings it; without it nothing is compiled.
    config = getattr(sys.modules.get("torch._dynamo"), "config", None)
    if not method.changes_nnz or not getattr(config, "force_parameter_static_shapes", False):
        return
    if any(is_compiled(one) for one in model.modules()):
        warnings.warn(
            f"{type(method).__name__} changes the number of weights of compiled layers, each of which is "
            "compiled again then, until torch.compile gives up after "
            f"{getattr(config, 'recompile_limit', 8)} times. Set "
            "`torch._dynamo.config.force_parameter_static_shapes = False` before the run: then it is once.",
            stacklevel=2,
        )


def run_length(trainer: Trainer) -> RunLength:
    """Optimizer steps of a run, and of its epochs.

    Args:
        trainer: whose training data is set up.

    Returns:
        In optimizer steps, as far as it is known.
    """
    total, num_batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    return RunLength(
        int(total) if 0 < total < float("inf") else None,
        None
        if num_batches == float("inf")
        else max(1, math.ceil(num_batches / trainer.accumulate_grad_batches)),
    )


def validate_update_steps(
    update_steps: UpdateSteps, run: RunLength, method: SparseMethod, nnz: Mapping[str, int]
) -> None:
    """Refuse schedules without an end, and warn where the pattern does not change as was meant.

    Args:
        update_steps: when it changes.
        run: its length.
        method: that is at work.
        nnz: weights by layer.

    Raises:
        MisconfigurationException: if the method's schedule needs an end, and there is none.
    """
    if update_steps.last is None and method.needs_end:
        raise MisconfigurationException(
            f"`{method}` changes until updates end, so the updates need an end, but there is none. Set "
            "Trainer(max_steps=...), or update=UpdateEvery(..., stop=...) to a number of steps."
        )
    if run.total_steps is None:
        return
    steps = range(1, run.total_steps + 1)  # of which the first that is due answers both questions, as a rule
    if not any(update_steps.is_due(step) for step in steps):
        warnings.warn(
            f"`SparseTraining(update)` has no effect: no update is due in the {run.total_steps} steps of the "
            "run. Update more often, e.g. UpdateEvery(100).",
            NoEffectWarning,
            stacklevel=2,
        )
        return
    times = (method.update_time(step, update_steps) for step in steps if update_steps.is_due(step))
    if not any(method.has_effect(nnz, now) for now in times):
        warnings.warn(
            f"`SparseTraining(update)` has no effect: `{method}` moves less than one weight of each layer at "
            f"every update, and updates stop at step {update_steps.stop}. "
            "Update more often or stop later, so that the fraction is not 0 yet, or raise `drop`.",
            NoEffectWarning,
            stacklevel=2,
        )
    if update_steps.stop is not None and update_steps.stop > run.total_steps:
        warnings.warn(
            f"`SparseTraining(update)` stops at step {update_steps.stop}, but the run ends at step "
            f"{run.total_steps}, so schedules do not reach their end. Train longer, or use a fraction "
            "such as stop=0.75.",
            stacklevel=2,
        )
