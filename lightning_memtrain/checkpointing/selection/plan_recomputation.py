"""The choice for a loop of plain torch, as one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_memtrain.checkpointing.memory_budget import DEVICE, MemoryBudget
from lightning_memtrain.checkpointing.selection.recomputation_plan import RecomputationPlan
from lightning_memtrain.checkpointing.selection.step_curve import StepCurve
from lightning_memtrain.core import ArgumentError, ByteLimit
from lightning_memtrain.core.arguments.value_checks import (
    check_functions,
    check_kinds,
    check_modules,
    check_optimizers,
)
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.tracing.step.fake_step import FakeStep
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors


def plan_recomputation(
    model: nn.Module,
    step: Callable[..., Any],
    arguments: Sequence[Any],
    optimizers: Sequence[Optimizer] = (),
    *,
    limit: int | str | float | None = None,
) -> RecomputationPlan:
    """Plan what to recompute in a training step, by running it once without data.

    The step runs with weights, gradients and optimizer state that hold no data, and leaves no trace: see
    :class:`MemoryBudget`, which does the same for a ``Trainer`` before each step that would need more.

    Args:
        model: the module that is trained.
        step: computes the loss, or a dictionary with it under ``"loss"``, from ``arguments``; backward and
            the optimizers' steps follow it by themselves.
        arguments: what ``step`` is called with, such as a batch of tensors of any shape and dtype.
        optimizers: those that step afterwards; their state counts.
        limit: most bytes that the step may hold, see :class:`MemoryBudget`; ``None`` for the knee of the
            curve of memory against time.

    Returns:
        The plan; pass its ``groups`` to :func:`insert_checkpoints`.

    Raises:
        ArgumentError: if ``limit`` is no size or cannot be reached, or the step has no loss
            with a gradient.

    Example:
        >>> layers = (nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Tanh()) for _ in range(4))
        >>> model = nn.Sequential(*layers)
        >>> step = lambda batch: model(batch).square().mean()
        >>> plan = plan_recomputation(model, step, [torch.ones(64, 32)], limit="1GiB")
        >>> plan.groups, plan.fits(2**30)
        ([], True)
    """
    check_modules("plan_recomputation", model=model)
    check_functions("plan_recomputation", step=step)
    cure = "Write e.g. [batch]."
    check_kinds("plan_recomputation", Sequence, "a list of what `step` takes", cure, arguments=arguments)
    check_optimizers("plan_recomputation", optimizers=optimizers)
    if limit is not None and limit != DEVICE:
        _ = ByteLimit(limit, "plan_recomputation(limit)")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    limit_bytes = MemoryBudget(limit).limit_bytes_on(device)
    states = [optimizer.state for optimizer in optimizers]
    held = () if limit_bytes is None else HeldTensors().within([model, step], leave=states)
    fake = FakeStep(model, step, arguments, optimizers, held=held)
    workspace = None if limit_bytes is None else OpWorkspace(device)
    curve = StepCurve(fake, OpTimes(device), workspace)
    if not fake.has_backward:
        raise ArgumentError(
            "`plan_recomputation(step)` must return a loss that has a gradient, or a dictionary with one "
            "under 'loss', but it returned none. Let it return the tensor that `backward()` is called on."
        )
    return curve.knee() if limit_bytes is None else curve.fitting(limit_bytes)
