"""The optimizers of a step on fake tensors: their steps, and the state that they make in the first one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import optimizer_step_post_hooks, optimizer_step_pre_hooks
from lightning_memtrain.ledger.training_state import state_bytes
from lightning_memtrain.optimizer_steps.closures import needs_closure
from lightning_memtrain.tracing.step.recorded_values import UnknownValueError

ClosureStep = Callable[[Optimizer, Callable[[], Any]], Any]
"""Steps an optimizer, which calls the closure once or several times."""


class FakeOptimizers:
    """Lets optimizers step on fake tensors, as far as they can without data.

    Args:
        optimizers: these.
        closure_step: steps one as the run does it; by default its ``step()``.
    """

    def __init__(self, optimizers: Sequence[Optimizer], closure_step: ClosureStep | None) -> None:
        self._optimizers = optimizers
        self._closure_step = closure_step
        self._made: list[dict[Any, Any]] = [{} for _ in optimizers]
        self.uncounted: dict[str, str] = {}
        """Names of optimizers whose bytes are not all known, since they cannot step without data, and why."""
        self.state_bytes = 0
        """What the optimizers hold, as far as it is known."""

    def remove_step_hooks(self) -> None:
        """Leave the steps of the optimizers' classes: schedulers wrap them, and profilers hook them."""
        for optimizer in self._optimizers:
            optimizer.__dict__.pop("step", None)
            for hooks in (optimizer_step_pre_hooks(optimizer), optimizer_step_post_hooks(optimizer)):
                hooks.clear()

    def make_state(self) -> None:
        """Let them step once: they make their state then, and every step after that one holds it."""
        stateless = [optimizer for optimizer in self._optimizers if not optimizer.state]
        # What calls the model holds its own state beside what the model does.
        self._note_uncounted(
            (optimizer, reason)
            for optimizer, reason in self._step_all()
            if optimizer in stateless or needs_closure(optimizer)
        )
        self.state_bytes = state_bytes(self._optimizers)
        self._made = [
            {key: _copied(value) for key, value in optimizer.state.items()} for optimizer in self._optimizers
        ]

    def set_state(self) -> None:
        """Give them the state that they have made."""
        for optimizer, made in zip(self._optimizers, self._made, strict=True):
            optimizer.state.update({key: _copied(value) for key, value in made.items()})

    def zero_grad(self) -> None:
        """Drop the gradients of all of them."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Let those step that can, without closure, and note the others."""
        self._note_uncounted(self._step_all())

    def note_uncounted(self, optimizer: Optimizer, error: Exception) -> None:
        """Note that an optimizer cannot step without data.

        Args:
            optimizer: which.
            error: what its step raised.
        """
        self._note_uncounted([(optimizer, _reason(error))])

    def _step_all(self) -> list[tuple[Optimizer, str]]:
        others: list[tuple[Optimizer, str]] = []
        for optimizer in self._optimizers:
            try:
                if self._closure_step is not None:
                    self._closure_step(optimizer, _nothing)
                else:
                    optimizer.step()
            except Exception as error:  # wants data, a closure, or another precision
                others.append((optimizer, _reason(error)))
        return others

    def _note_uncounted(self, others: Iterable[tuple[Optimizer, str]]) -> None:
        for optimizer, reason in others:
            self.uncounted[type(optimizer).__name__] = reason


def _nothing() -> None:
    return None


def _reason(error: Exception) -> str:
    # Not the error itself: its traceback would keep what the real step's frames hold.
    kind = "" if isinstance(error, UnknownValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0]


def _copied(state: Any) -> Any:
    return dict(state) if isinstance(state, dict) else state
