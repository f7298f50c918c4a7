"""Optimizer in backward, in a loop of one's own."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import (
    check_functions,
    check_kinds,
    check_numbers,
    check_optimizer,
)
from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_in_backward.gradient_accumulation import Accumulation
from lightning_memtrain.optimizer_in_backward.pending_steps import StepParameter
from lightning_memtrain.optimizer_steps import step_parameter as step_parameter_plainly


def step_in_backward(
    optimizer: Optimizer,
    *,
    accumulation: Accumulation | None = None,
    clip_value: float | None = None,
    step_parameter: StepParameter = step_parameter_plainly,
) -> BackwardSteps:
    """Let backward step each parameter as soon as its gradient is complete, and free the gradient.

    What is returned has a method ``backward``, which takes the place of ``loss.backward()``; nothing is put
    on the model or the optimizer between two calls. Weights become those of ``loss.backward()`` and
    ``optimizer.step()``, to the bit. A call of ``optimizer.step()`` afterwards finds no gradients and changes
    nothing, but lets learning rate schedulers and step hooks see a step.

    Args:
        optimizer: of any parameters; it treats each of them by itself.
        accumulation: :class:`ExactMomentum` or :class:`AdamA`, for steps that are made of several backwards.
        clip_value: clip gradients to this magnitude, greater than 0.
        step_parameter: steps one parameter; e.g. ``lambda _, p: bucketed.step_parameter(p)`` beside a
            :class:`~lightning_memtrain.precision.BucketedStep`.

    Returns:
        Runs backward by ``backward(loss)``, or ``backward(loss, max_norm=1.0)`` to clip the norm of all
        gradients; ``backward(loss, last=False)`` accumulates.

    Raises:
        ArgumentError: if the optimizer cannot be stepped in parts, which some show at a step
            only, or does not go with the accumulation.
        ArgumentError: if ``clip_value`` is out of its range, or given beside an accumulation.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> stepping = step_in_backward(optimizer)
        >>> for batch in torch.randn(3, 8, 4):
        ...     stepping.backward(model(batch).square().mean())
        >>> stepping.num_stepped, [p.grad for p in model.parameters()]
        (12, [None, None, None, None])
    """
    check_optimizer("step_in_backward", optimizer=optimizer)
    check_functions("step_in_backward", step_parameter=step_parameter)
    expected, cure = "ExactMomentum(), AdamA() or None", "Use one of them."
    kinds = Accumulation, type(None)
    check_kinds("step_in_backward", kinds, expected, cure, accumulation=accumulation)
    if clip_value is not None:
        cure = "Leave it out for no clipping."
        check_numbers("step_in_backward", "greater than 0", lambda x: x > 0, cure, clip_value=clip_value)
    if accumulation is not None:
        if clip_value is not None:
            raise ArgumentError(
                f"`step_in_backward(accumulation={accumulation!r})` cannot clip, since the sum of the "
                f"gradients never exists, but got clip_value={clip_value!r}. Leave out one of them."
            )
        accumulation.check(optimizer)
    return BackwardSteps(optimizer, step_parameter, accumulation, clip_value)
