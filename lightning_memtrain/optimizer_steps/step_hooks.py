"""An optimizer's own step without its hooks, and hooks that run once around several such steps."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import (
    global_optimizer_post_hooks,
    global_optimizer_pre_hooks,
    note_step,
    step_hook_names,
)


@contextmanager
def unhooked_step(optimizer: Optimizer) -> Iterator[Callable[..., Any]]:
    """The code of an optimizer's step, without what others have put around it.

    Args:
        optimizer: any; in the block it has no step hooks.

    Yields:
        The ``step`` of its class, to be called with the optimizer.
    """
    # Optimizers that wrap another one and do without the constructor of their class have no hooks.
    hooks = {name: vars(optimizer)[name] for name in step_hook_names() if name in vars(optimizer)}
    step: Any = type(optimizer).step
    step = step.__wrapped__ if getattr(step, "hooked", False) else step
    # A step that calls that of a parent class would come upon the hooks again.
    vars(optimizer).update((name, OrderedDict()) for name in hooks)
    try:
        yield step
    finally:
        vars(optimizer).update(hooks)


@contextmanager
def hooks_run_once(optimizer: Optimizer, kwargs: dict[str, Any]) -> Iterator[Callable[..., Any]]:
    """Let step hooks and schedulers see one step, whatever number of calls it is made of.

    Args:
        optimizer: any.
        kwargs: arguments of the whole step, which hooks may change.

    Yields:
        The optimizer's own step, with the arguments that hooks have left; to be called any number of times.
    """
    # Optimizers that wrap another one and do without the constructor of their class have no hooks.
    own_hooks = [getattr(optimizer, name, {}) for name in step_hook_names()]
    arguments: tuple[Any, Any] = ((optimizer,), kwargs)
    for before in (*global_optimizer_pre_hooks.values(), *own_hooks[0].values()):
        arguments = before(optimizer, *arguments) or arguments
    with unhooked_step(optimizer) as step:
        yield partial(step, *arguments[0], **arguments[1])
    for after in (*own_hooks[1].values(), *global_optimizer_post_hooks.values()):
        after(optimizer, *arguments)
    note_step(optimizer)
