"""Running something around every call of a module's `training_step`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # whoever only counts bytes need not wait for Lightning
    from lightning.pytorch import LightningModule

_STEP = "training_step"
_T = TypeVar("_T")

#: What is called in place of a step: with it, its arguments and its keyword arguments.
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def wrap_training_step(model: LightningModule, around: Around) -> Callable[[], None]:
    """Let every call of ``training_step`` go through a function.

    The loop, the strategies and other callbacks see the method that they saw before; chunks of a batch come
    by one after the other.

    Args:
        model: the module that is trained.
        around: called with the method, its arguments and its keyword arguments; returns what it returns.

    Returns:
        A function that takes it back, in whatever order several are taken back; further calls do nothing.
    """
    step = _WrappedStep(model.training_step, around, model.__dict__.get(_STEP))
    model.__dict__[_STEP] = step

    def undo() -> None:
        outer, found = None, model.__dict__.get(_STEP)
        while isinstance(found, _WrappedStep) and found is not step:
            outer, found = found, found.inside
        if found is not step:
            step.around = _alone  # somebody else's wrapper goes on calling this one, or it is gone already
        elif outer is not None:
            outer.step, outer.inside = step.step, step.inside
        elif step.inside is None:
            del model.__dict__[_STEP]
        else:
            model.__dict__[_STEP] = step.inside

    return undo


class _WrappedStep:
    """Stands in for a model's ``training_step``.

    Args:
        step: what it runs.
        around: see :func:`wrap_training_step`.
        inside: the model's own attribute that this one takes the place of; ``None`` if there was none.
    """

    def __init__(self, step: Callable[..., Any], around: Around, inside: Any) -> None:
        functools.update_wrapper(self, step)
        # Lightning looks at signature and code, but through one wrapper only.
        self.__wrapped__ = inspect.unwrap(step)
        self.step = step
        self.around = around
        self.inside = inside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.step, args, kwargs)

    # A copy of the model trains as it would without: its step would otherwise run the original's.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.step, memo)

    def __reduce__(self) -> Any:
        return _itself, (self.step,)


def _alone(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return step(*args, **kwargs)


def _itself(step: _T) -> _T:
    return step
