"""Zeroing gradients before a forward, for models that do something when Lightning would zero them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.coordination import RestorableState, backward_is_partial, register_restorable
from lightning_memtrain.microbatching import training_loop
from lightning_memtrain.microbatching.training_loop import Backward


def zero_grad_hooks(trainer: Any, model: Any) -> list[str]:
    """Who does something before gradients are zeroed, which plain Lightning does after the forward.

    A teacher that is averaged there, for instance, is a step older in the forward than it is afterwards.

    Args:
        trainer: the trainer that fits.
        model: its module.

    Returns:
        Class names of the module and of callbacks with an ``on_before_zero_grad`` of their own.
    """
    owners = [model, *trainer.callbacks]
    return [type(owner).__name__ for owner in owners if _has_hook_of_its_own(owner)]


def _has_hook_of_its_own(owner: Any) -> bool:
    hook = getattr(owner, "on_before_zero_grad", None)
    package = (getattr(hook, "__module__", None) or "").split(".")[0]
    return hook is not None and package not in ("lightning", "pytorch_lightning", "lightning_memtrain")


class PastGradients:
    """Puts the gradients of the step before aside while a batch runs, and zeroes them when it has run.

    So whoever is called before they are zeroed finds what plain Lightning would show: gradients, and weights
    that no forward of the batch will use any more. It costs the bytes of the gradients.

    Args:
        parameters: all that may have a gradient.
        zero_grad: Lightning's own, with all its hooks.
        strategy: the trainer's.
    """

    def __init__(self, parameters: Iterable[Tensor], zero_grad: Callable[[], None], strategy: Any) -> None:
        self._zero_grad = zero_grad
        self._zeroed = False
        in_buckets = training_loop.gradients_are_bucket_views(strategy)
        # DDP's buckets would be written to by the backward of this batch.
        self._past = {
            parameter: parameter.grad.clone() if in_buckets and parameter.grad is not None else parameter.grad
            for parameter in dict.fromkeys(parameters)
        }
        self._uncount: Callable[[], None] = lambda: None

    def __enter__(self) -> PastGradients:
        for parameter in self._past:
            parameter.grad = None
        self._uncount = register_restorable(self._kept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._uncount()
        if kind is None:
            self.zero()
        self._past.clear()

    def before_last(self, backward: Backward) -> Backward:
        """Zero before the last backward of the batch, as plain Lightning does before its only one.

        Args:
            backward: of a loss; ``None`` to skip it.

        Returns:
            The same, with the zeroing in it.
        """
        if backward is None:
            return None

        def zero_and_run(loss: Tensor) -> None:
            if not backward_is_partial():
                self.zero()
            backward(loss)

        return zero_and_run

    @torch.no_grad()
    def zero(self) -> None:
        """Zero the gradients of the step before; those of this batch are kept. Further calls do nothing."""
        if self._zeroed:
            return
        self._zeroed = True
        gathered = {parameter: parameter.grad for parameter in self._past}
        for parameter, gradient in self._past.items():
            parameter.grad = gradient
        self._zero_grad()
        for parameter, gradient in gathered.items():
            if parameter.grad is None:
                parameter.grad = gradient
            elif gradient is not None:  # zeroed in place, or not the optimizer's
                parameter.grad.add_(gradient)
        self._past.clear()

    def _kept(self) -> RestorableState:
        # Told only so that they are counted: a batch that runs again does not touch them.
        return RestorableState(
            tuple(gradient for gradient in self._past.values() if gradient is not None), lambda: None
        )
