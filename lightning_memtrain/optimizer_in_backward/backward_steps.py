"""Follows one optimizer's parameters through backward and steps each when its gradient is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_memtrain.compat.torch_private import current_graph_task_id
from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.optimizer_in_backward.gradient_accumulation import (
    Accumulation,
    suggested_accumulation,
)
from lightning_memtrain.optimizer_in_backward.gradient_averages import GradientAverages
from lightning_memtrain.optimizer_in_backward.pending_steps import PendingSteps, StepParameter
from lightning_memtrain.optimizer_steps.accumulation_hooks import AccumulationHooks


class BackwardSteps:
    """Steps parameters during backward.

    In a loop of one's own :meth:`backward` takes the place of ``loss.backward()``; a training loop that calls
    that itself has :meth:`begin` and :meth:`end` called around it. Between backwards there are no hooks on
    the parameters.

    Args:
        optimizer: its step as a whole is left to the training loop, which finds no gradients then.
        step_parameter: steps one parameter by its gradient; if it is that of this library, small ones are
            stepped together.
        accumulation: how gradients of several backwards are accumulated; ``None`` if there is one per step.
        clip_value: gradients are clipped to this magnitude, if it is given.
        averages: over ranks; ``None`` if there is one.

    Raises:
        ArgumentError: if the optimizer cannot be stepped in parts; some show that at a step only.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        step_parameter: StepParameter,
        accumulation: Accumulation | None = None,
        clip_value: float | None = None,
        averages: GradientAverages | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._accumulation = accumulation
        self._clip_value = clip_value
        self._averages = averages
        self._pending = PendingSteps(optimizer, step_parameter)
        self._groups: dict[int, dict[str, Any]] = {}
        # Parameters whose gradients are being accumulated, and whether they had state before.
        self._accumulating: dict[Tensor, bool] = {}
        # By identity, which is faster to look up than a tensor.
        self._deferred: dict[int, Tensor] = {}
        self._completed: set[int] = set()
        self._outermost: int | None = None
        self._handles: list[RemovableHandle] = []
        self._on_complete: Callable[[Tensor], None] = self._step
        only_steps = accumulation is None and averages is None and clip_value is None
        fast = only_steps and self._pending.steps_together
        self._hooks = AccumulationHooks(self._fast_hook() if fast else self._on_accumulated)
        self._is_last = True
        self._scale: Tensor | None = None
        self._num_accumulated_steps = 0
        self.num_deferred = 0
        """Steps of single parameters that had to wait for the end of backward."""

    @property
    def num_stepped(self) -> int:
        """Steps of single parameters so far."""
        return self._num_accumulated_steps + self._pending.num_stepped

    # ------------------------------------------------------------------ a backward

    def backward(self, loss: Tensor, *, last: bool = True, max_norm: float | None = None) -> None:
        """Run backward, and step each parameter as soon as its gradient is complete.

        Args:
            loss: of one number and any floating-point dtype, with a graph.
            last: whether this is the last backward before a step; others need an ``accumulation``.
            max_norm: clip the norm of all gradients to this, which runs backward twice; greater than 0.

        Raises:
            ArgumentError: if gradients are to be accumulated without an ``accumulation``, or clipped with
                one.
        """
        if max_norm is not None and (not max_norm > 0 or self._accumulation is not None):
            raise ArgumentError(
                "`backward(max_norm)` must be greater than 0, and goes without an `accumulation`, by which "
                f"the sum of the gradients never exists, but got max_norm={max_norm!r} and "
                f"accumulation={self._accumulation!r}. Leave out one of them."
            )
        if not last and self._accumulation is None:
            choice = suggested_accumulation(self._optimizer)
            cure = "SGD with momentum or AdamW" if choice is None else f"`accumulation={choice}`"
            raise ArgumentError(
                "`backward(last)` must be True where each gradient is freed at once, but got last=False. "
                f"Use {cure}, or one backward per step."
            )
        self.begin(loss, last=last)
        try:
            if max_norm is not None:
                self.measure(loss, max_norm)
            loss.backward()  # type: ignore[no-untyped-call]
        except BaseException:
            self.abandon()
            raise
        self.end()
        if last:
            self.finish()

    def begin(self, loss: Tensor, *, last: bool) -> None:
        """Follow a backward that begins now.

        Hooks are put on anew, so that parameters may be frozen, thawed and added meanwhile, and so that they
        run after those of all who watch gradients, and would find them gone.

        Args:
            loss: what backward begins with; of one number.
            last: whether the optimizer steps after this backward.
        """
        self._is_last = last
        self._remove_hooks()
        parameters = [parameter for parameter in self._parameters() if parameter.requires_grad]
        if self._accumulation is None:
            self._pending.begin(parameters)
        else:
            self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        if not loss.requires_grad:
            return  # backward says so
        self._handles.append(loss.register_hook(self._note_outermost))  # type: ignore[no-untyped-call]
        if self._accumulation is not None:
            self._handles += [self._before_hook(parameter) for parameter in parameters]
        self._hooks.register(parameters)

    @torch.no_grad()
    def end(self) -> None:
        """End a backward: complete what had to wait."""
        self._remove_hooks()
        self._complete_deferred()
        self._pending.end()

    def _remove_hooks(self) -> None:
        self._hooks.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def finish(self) -> None:
        """End an accumulation: step parameters that got their last gradient in an earlier backward."""
        for parameter in list(self._accumulating):
            self._step(parameter)

    def abandon(self) -> None:
        """Forget a backward that failed."""
        self._remove_hooks()
        self._pending.clear()
        self._deferred.clear()
        self._completed.clear()

    # ------------------------------------------------------------------ clipping by norm

    def measure(self, loss: Tensor, max_norm: float) -> None:
        """Run a backward that only measures the norm of all gradients; the next one steps with it.

        Args:
            loss: what backward begins with, of one number; its graph is kept.
            max_norm: what the norm is clipped to.
        """
        norms: dict[Tensor, Tensor] = {}

        def measure(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            wide = torch.float32 if gradient.dtype in (torch.float16, torch.bfloat16) else None
            norms[parameter] = torch.linalg.vector_norm(gradient, dtype=wide)

        with self._completing(measure), torch.no_grad():
            with torch.enable_grad():
                loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
            self._complete_deferred()
        # In the order of the parameters, as torch.nn.utils.clip_grad_norm_ adds them up.
        found = [norms[parameter] for parameter in self._parameters() if parameter in norms]
        if found:
            device = found[0].device
            norm = torch.linalg.vector_norm(torch.stack([one.to(device) for one in found]))
            self._scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)

    @contextmanager
    def _completing(self, action: Callable[[Tensor], None]) -> Iterator[None]:
        before, self._on_complete = self._on_complete, action
        try:
            yield
        finally:
            self._on_complete = before

    # ------------------------------------------------------------------ an accumulation that is saved

    def accumulating(self) -> dict[int, bool]:
        """Which parameters, by number, accumulate gradients, and whether they had state before that."""
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters())}
        return {numbers[id(parameter)]: had_state for parameter, had_state in self._accumulating.items()}

    def resume_accumulating(self, accumulating: dict[int, bool]) -> None:
        """Go on with an accumulation that was saved.

        Args:
            accumulating: of :meth:`accumulating`.

        Raises:
            ArgumentError: if there is nothing to accumulate gradients in.
        """
        if self._accumulation is None:
            choice = suggested_accumulation(self._optimizer) or "the one that it was written with"
            raise ArgumentError(
                "`OptimizerInBackward(accumulation)` must be that of the run whose checkpoint is resumed, "
                "since it was written amid an accumulation, whose first gradients are in the optimizer's "
                f"state, but got accumulation=None. Use accumulation={choice}, or a checkpoint written after "
                "a step."
            )
        parameters = list(self._parameters())
        for number, had_state in accumulating.items():
            parameter = parameters[number]
            self._accumulating[parameter] = had_state
            self._accumulation.resume(parameter, self._optimizer.state[parameter])

    # ------------------------------------------------------------------ a gradient

    def _parameters(self) -> Iterable[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _note_outermost(self, gradient: Tensor) -> None:
        self._outermost = current_graph_task_id()

    def _before_hook(self, parameter: Tensor) -> Any:
        @torch.no_grad()
        def before(gradient: Tensor) -> None:
            if dry_run_depth() or parameter in self._accumulating:
                return
            assert self._accumulation is not None
            state = self._optimizer.state[parameter]
            had_state = self._accumulation.begin(parameter, state, self._groups[id(parameter)])
            self._accumulating[parameter] = had_state

        return parameter.register_hook(before)  # type: ignore[no-untyped-call]

    def _on_accumulated(self, parameter: Tensor) -> None:
        if dry_run_depth():
            return
        if torch.is_grad_enabled():  # with create_graph=True
            with torch.no_grad():
                self._on_accumulated(parameter)
            return
        if current_graph_task_id() != self._outermost:
            # A backward inside of the backward, e.g. that of a reentrant checkpoint: another one may bring
            # more of this gradient, and the weight may be needed for a recomputation before.
            self._refuse_late(parameter)
            self._deferred[id(parameter)] = parameter
        elif id(parameter) not in self._deferred:
            self._refuse_late(parameter)
            self._complete(parameter)

    def _fast_hook(self) -> Callable[[Tensor], None]:
        """As :meth:`_on_accumulated`, where nothing but a step is to be done: it runs for every parameter."""
        step, running, completed = self._on_complete, current_graph_task_id, self._completed
        pending = self._pending

        def on_accumulated(parameter: Tensor) -> None:
            key = id(parameter)
            if (
                running() != self._outermost
                or key in completed
                or self._deferred
                or self._scale is not None
                or not pending.tested
                or self._on_complete is not step
                or not self._is_last
                or dry_run_depth()
                or torch.is_grad_enabled()
            ):
                self._on_accumulated(parameter)
                return
            completed.add(key)
            pending.add(parameter)

        return on_accumulated

    def _refuse_late(self, parameter: Tensor) -> None:
        if id(parameter) in self._completed:
            raise RuntimeError(
                f"`OptimizerInBackward` has used the gradient of a parameter of shape "
                f"{tuple(parameter.shape)}, and backward brought more of it: it is used in a checkpoint that "
                "runs a backward of its own, and outside of it. Use checkpoint(..., use_reentrant=False)."
            )

    def _complete_deferred(self) -> None:
        deferred, self._deferred = self._deferred, {}
        self.num_deferred += len(deferred)
        for parameter in deferred.values():
            self._complete(parameter)
        if self._averages is not None and self._is_last:
            for parameter in self._averages.flush():
                self._on_complete(parameter)
        self._pending.step()
        self._outermost = None
        self._completed.clear()

    def _complete(self, parameter: Tensor) -> None:
        """This backward will add nothing more to the gradient."""
        self._completed.add(id(parameter))
        if self._accumulation is not None:
            state = self._optimizer.state[parameter]
            self._accumulation.add(parameter, state, self._groups[id(parameter)])
        if not self._is_last:
            return
        if self._averages is None:
            self._on_complete(parameter)
            return
        for ready in self._averages.ready(parameter):
            self._on_complete(ready)

    def _step(self, parameter: Tensor) -> None:
        if self._accumulation is not None:
            self._num_accumulated_steps += 1
            state, group = self._optimizer.state[parameter], self._groups[id(parameter)]
            self._accumulation.step(parameter, state, group, self._accumulating.pop(parameter))
            return
        gradient = parameter.grad
        assert gradient is not None
        if self._scale is not None:
            gradient.mul_(self._scale.to(gradient.device))
        if self._clip_value is not None:
            gradient.clamp_(-self._clip_value, self._clip_value)
        self._pending.add(parameter)
