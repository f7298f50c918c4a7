"""What Lightning and torch keep private, in one place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.hooks import RemovableHandle


def accumulates(trainer: Trainer) -> bool:
    """Whether the current batch ends without an optimizer step."""
    return trainer.fit_loop._should_accumulate()


def backward_id() -> int:
    """Which backward is running; one inside of another has a number of its own."""
    return torch._C._current_graph_task_id()


# No number that torch gives to a handle.
_KEY = -1


class AccumulationHooks:
    """One hook that is called when gradients are accumulated, put on many parameters at once and often.

    ``register_post_accumulate_grad_hook`` makes a handle for each, which takes longer than all that the hook
    does; it is used where a parameter has such hooks already, so that this one runs after them.

    Args:
        hook: called with a parameter that has its gradient.
    """

    def __init__(self, hook: Callable[[Tensor], None]) -> None:
        self._hook = hook
        self._with_dict: list[Any] = []
        self._handles: list[RemovableHandle] = []

    def put_on(self, parameters: list[Tensor]) -> None:
        """Put the hook on parameters that require gradients; they are leaves, and have it not yet.

        Args:
            parameters: which.
        """
        hook = self._hook
        for parameter in parameters:
            holder: Any = parameter
            if holder._post_accumulate_grad_hooks:
                self._handles.append(holder.register_post_accumulate_grad_hook(hook))
            else:
                holder._post_accumulate_grad_hooks = OrderedDict({_KEY: hook})
                self._with_dict.append(holder)

    def take_off(self) -> None:
        """Leave parameters as they were found, with the hooks that others have put on meanwhile."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._with_dict:
            hooks = parameter._post_accumulate_grad_hooks
            if len(hooks) == 1:
                parameter._post_accumulate_grad_hooks = None
            else:
                hooks.pop(_KEY, None)
        self._handles, self._with_dict = [], []


def has_comm_hook(strategy: Any) -> bool:
    """Whether DDP is to communicate through a hook, given to the strategy or put on its wrapper."""
    on_wrapper = getattr(strategy.model, "_comm_hooks", None)
    return getattr(strategy, "_ddp_comm_hook", None) is not None or bool(on_wrapper)


def ddp_options(strategy: Any) -> dict[str, Any]:
    """What DDP is made with."""
    return dict(getattr(strategy, "_ddp_kwargs", {}))


def skip_clipping(plugin: Any) -> Callable[[], None]:
    """Keep a precision plugin from clipping gradients that are gone: torch fails on none.

    Args:
        plugin: the trainer's.

    Returns:
        A function that takes it back.
    """

    def clipped_already(*args: Any, **kwargs: Any) -> None:
        return None

    plugin.clip_gradients = clipped_already

    def undo() -> None:
        vars(plugin).pop("clip_gradients", None)

    return undo
