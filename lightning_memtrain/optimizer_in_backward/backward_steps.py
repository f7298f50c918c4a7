"""Follows one optimizer's parameters through backward and steps each when its gradient is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.core import KIB
from lightning_memtrain.optimizer_in_backward import private_apis as _compat
from lightning_memtrain.optimizer_in_backward.gradient_accumulation import Accumulation, choice_for
from lightning_memtrain.optimizer_in_backward.gradient_averages import GradientAverages
from lightning_memtrain.optimizer_steps import step_parameter as step_parameter_plainly
from lightning_memtrain.optimizer_steps.accumulation_hooks import AccumulationHooks
from lightning_memtrain.optimizer_steps.parameter_steps import (
    changed_shared_state,
    shared_state,
    step_parameters,
)

StepParameter = Callable[[Optimizer, Tensor], None]

# Small gradients wait for each other, up to this part of all gradients, or this many bytes: a step of one
# parameter takes about as long as one of fifty.
_WAITING_PART = 1 / 32
_WAITING_BYTES = KIB


class BackwardSteps:
    """Steps parameters during backward.

    Args:
        optimizer: the run's; its step as a whole is left to the training loop, which finds no gradients then.
        step_parameter: steps one parameter by its gradient; if it is that of this library, small ones are
            stepped together.
        accumulation: how gradients of several backwards are taken up; ``None`` if there is one per step.
        clip_value: gradients are clipped to this magnitude, if it is given.
        averages: over ranks; ``None`` if there is one.
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
        self._step_parameter = step_parameter
        self._accumulation = accumulation
        self._clip_value = clip_value
        self._averages = averages
        self._groups: dict[int, dict[str, Any]] = {}
        # Parameters whose window has begun and not ended, and whether they had state before it.
        self._open: dict[Tensor, bool] = {}
        # By identity, which is faster to look up than a tensor.
        self._waiting: dict[int, Tensor] = {}
        self._completed: set[int] = set()
        self._outermost: int | None = None
        self._handles: list[RemovableHandle] = []
        # Complete gradients of small parameters, to be stepped together.
        self._ripe: list[Tensor] = []
        self._ripe_bytes = 0
        self._sizes: dict[int, int] = {}
        self._most_ripe_bytes = 0.0
        self._steps_together = step_parameter is step_parameter_plainly
        self._on_complete: Callable[[Tensor], None] = self._step
        goes_round = self._steps_together and accumulation is None and averages is None and clip_value is None
        self._hooks = AccumulationHooks(self._short_way() if goes_round else self._arrived)
        self._is_last = True
        self._checked = False
        self._scale: Tensor | None = None
        self.num_stepped = 0
        """Steps of single parameters so far."""
        self.num_deferred = 0
        """Those of them that had to wait for the end of backward."""

    # ------------------------------------------------------------------ a backward

    def begin(self, loss: Tensor, *, last: bool) -> None:
        """Follow a backward that begins now.

        Hooks are put on anew, so that parameters may be frozen, thawed and added meanwhile, and so that they
        run after those of all who watch gradients, and would find them gone.

        Args:
            loss: what backward begins with.
            last: whether the optimizer steps after this backward.
        """
        self._is_last = last
        self._remove_hooks()
        parameters = [parameter for parameter in self._parameters() if parameter.requires_grad]
        self._note_sizes(parameters)
        if self._accumulation is not None:
            self._groups = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        if not loss.requires_grad:
            return  # backward says so
        self._handles.append(loss.register_hook(self._note_outermost))  # type: ignore[no-untyped-call]
        if self._accumulation is not None:
            self._handles += [self._before_hook(parameter) for parameter in parameters]
        self._hooks.put_on(parameters)

    @torch.no_grad()
    def end(self) -> None:
        """End a backward: complete what had to wait."""
        self._remove_hooks()
        self._settle()

    def _note_sizes(self, parameters: list[Tensor]) -> None:
        if len(parameters) == len(self._sizes) and all(id(one) in self._sizes for one in parameters):
            return
        self._sizes = {id(parameter): parameter.nbytes for parameter in parameters}
        self._most_ripe_bytes = max(_WAITING_PART * sum(self._sizes.values()), _WAITING_BYTES)

    def _remove_hooks(self) -> None:
        self._hooks.take_off()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def finish(self) -> None:
        """End the window: step parameters that got their last gradient in a backward before the last one."""
        for parameter in list(self._open):
            self._step(parameter)

    def abandon(self) -> None:
        """Forget a backward that failed."""
        self._remove_hooks()
        self._ripe.clear()
        self._ripe_bytes = 0
        self._waiting.clear()
        self._completed.clear()

    # ------------------------------------------------------------------ clipping by norm

    def measure(self, loss: Tensor, max_norm: float) -> None:
        """Run a backward that only measures the norm of all gradients; the next one steps with it.

        Args:
            loss: what backward begins with; its graph is kept.
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
            self._settle()
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

    # ------------------------------------------------------------------ a window that is saved

    def window(self) -> dict[int, bool]:
        """Which parameters, by number, are within a window, and whether they had state before it."""
        numbers = {id(parameter): number for number, parameter in enumerate(self._parameters())}
        return {numbers[id(parameter)]: had_state for parameter, had_state in self._open.items()}

    def resume_window(self, window: dict[int, bool]) -> None:
        """Go on within a window.

        Args:
            window: of :meth:`window`.

        Raises:
            MisconfigurationException: if there is nothing to accumulate gradients in.
        """
        if self._accumulation is None:
            choice = choice_for(self._optimizer) or "the one that it was written with"
            raise MisconfigurationException(
                "`OptimizerInBackward(accumulation)` must be that of the run whose checkpoint is resumed, "
                "since it was written amid a window, whose first gradients are in the optimizer's state, "
                f"but got accumulation=None. Use accumulation={choice}, or a checkpoint written after a step."
            )
        parameters = list(self._parameters())
        for number, had_state in window.items():
            parameter = parameters[number]
            self._open[parameter] = had_state
            self._accumulation.resume(parameter, self._optimizer.state[parameter])

    # ------------------------------------------------------------------ a gradient

    def _parameters(self) -> Iterable[Tensor]:
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def _note_outermost(self, gradient: Tensor) -> None:
        self._outermost = _compat.backward_id()

    def _before_hook(self, parameter: Tensor) -> Any:
        @torch.no_grad()
        def before(gradient: Tensor) -> None:
            if dry_run_depth() or parameter in self._open:
                return
            assert self._accumulation is not None
            state = self._optimizer.state[parameter]
            self._open[parameter] = self._accumulation.open(parameter, state, self._groups[id(parameter)])

        return parameter.register_hook(before)  # type: ignore[no-untyped-call]

    def _arrived(self, parameter: Tensor) -> None:
        if dry_run_depth():
            return
        if torch.is_grad_enabled():  # with create_graph=True
            with torch.no_grad():
                self._arrived(parameter)
            return
        if _compat.backward_id() != self._outermost:
            # A backward inside of the backward, e.g. that of a reentrant checkpoint: another one may bring
            # more of this gradient, and the weight may be needed for a recomputation before.
            self._refuse_late(parameter)
            self._waiting[id(parameter)] = parameter
        elif id(parameter) not in self._waiting:
            self._refuse_late(parameter)
            self._complete(parameter)

    def _short_way(self) -> Callable[[Tensor], None]:
        """As :meth:`_arrived`, in a step that does nothing but step: this is run for every parameter."""
        step, running, ripe, completed = self._on_complete, _compat.backward_id, self._ripe, self._completed

        def arrived(parameter: Tensor) -> None:
            key = id(parameter)
            if (
                running() != self._outermost
                or key in completed
                or self._waiting
                or self._scale is not None
                or not self._checked
                or self._on_complete is not step
                or not self._is_last
                or dry_run_depth()
                or torch.is_grad_enabled()
            ):
                self._arrived(parameter)
                return
            completed.add(key)
            ripe.append(parameter)
            self._ripe_bytes += self._sizes[key]
            if self._ripe_bytes > self._most_ripe_bytes:
                self._step_ripe()

        return arrived

    def _refuse_late(self, parameter: Tensor) -> None:
        if id(parameter) in self._completed:
            raise RuntimeError(
                f"`OptimizerInBackward` has taken up the gradient of a parameter of shape "
                f"{tuple(parameter.shape)}, and backward brought more of it: it is used in a checkpoint that "
                "runs a backward of its own, and outside of it. Use checkpoint(..., use_reentrant=False)."
            )

    def _settle(self) -> None:
        waiting, self._waiting = self._waiting, {}
        self.num_deferred += len(waiting)
        for parameter in waiting.values():
            self._complete(parameter)
        if self._averages is not None and self._is_last:
            for parameter in self._averages.flush():
                self._on_complete(parameter)
        self._step_ripe()
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
            self.num_stepped += 1
            state, group = self._optimizer.state[parameter], self._groups[id(parameter)]
            self._accumulation.close(parameter, state, group, self._open.pop(parameter))
            return
        gradient = parameter.grad
        assert gradient is not None
        if self._scale is not None:
            gradient.mul_(self._scale.to(gradient.device))
        if self._clip_value is not None:
            gradient.clamp_(-self._clip_value, self._clip_value)
        self._ripe.append(parameter)
        self._ripe_bytes += self._sizes[id(parameter)]
        if not (self._steps_together and self._checked) or self._ripe_bytes > self._most_ripe_bytes:
            self._step_ripe()

    def _step_ripe(self) -> None:
        """Step parameters whose gradients are complete, and free these."""
        if not self._ripe:
            return
        ripe, self._ripe_bytes = list(self._ripe), 0
        self._ripe.clear()
        before = None if self._checked else shared_state(self._optimizer)
        if self._steps_together:
            step_parameters(self._optimizer, ripe)
        else:
            for parameter in ripe:
                self._step_parameter(self._optimizer, parameter)
        if before is not None:
            self._checked = True
            _refuse_shared_state(self._optimizer, changed_shared_state(before, self._optimizer))
        for parameter in ripe:
            parameter.grad = None
        self.num_stepped += len(ripe)


def _refuse_shared_state(optimizer: Optimizer, changed: list[str]) -> None:
    if changed:
        raise MisconfigurationException(
            "`OptimizerInBackward` needs an optimizer that treats each parameter by itself, since it steps "
            f"them one by one, but got {type(optimizer).__name__}, whose step changes {', '.join(changed)}. "
            "Use another optimizer, or train without `OptimizerInBackward`."
        )
