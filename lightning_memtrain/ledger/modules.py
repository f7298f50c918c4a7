"""Which module of the model is running, in forward, in recomputation and in backward."""

from __future__ import annotations

import functools
import sys
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_memtrain.ledger.operators import skip_in_dynamo

NOT_IN_BACKWARD = -1

# A module that has hooks takes one more frame of Python than one that has none, so that modules nested deeply
# enough would recur too deeply only because they are watched. The limit is raised by this many frames at a
# time, before they are needed; the first of them are for what runs around the innermost operator.
_FRAMES_AT_A_TIME = 100
_recursion_limit = threading.Lock()

_current_graph_task = torch._C._current_graph_task_id

# Before torch 2.8 there is no such function, and only the recomputation of modules is recognised.
_top_saved_tensors_hooks = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda tracing: None
)

# The number of autograd's nodes that accumulate gradients, which belong to no module.
_ACCUMULATES_GRADIENT = 2**64 - 1


class Moment(NamedTuple):
    """What is running at one moment.

    Args:
        in_backward: whether a backward is going on.
        recomputing: whether a checkpointed region is being recomputed: a forward inside of a backward.
        module: path of the module at work; ``""`` outside of all submodules.
    """

    in_backward: bool
    recomputing: bool
    module: str


class ModuleWatch:
    """Follows a model's submodules: their forward calls by hooks, their backward by autograd's numbering.

    Autograd numbers the nodes of a forward pass in the order of their making. The numbers that were handed
    out while a module ran tell, in backward, whose node is at work; so no backward hook is needed, which
    would change the graph.

    Args:
        model: the model; its submodules are watched, compiled ones as a whole and scripted ones not at all.
        mark: called with ``"forward <path>"`` when a module's forward begins.
        in_force: tells whether a call is one of those to be followed.
    """

    def __init__(self, model: nn.Module, mark: Callable[[str], None], in_force: Callable[[], bool]) -> None:
        self._model = model
        self._mark = mark
        self._in_force = in_force
        self._hooks: list[_Hooks] = []
        self._calls: list[_FollowedCall] = []
        self._stack: list[str] = []
        self._forward_moment = Moment(False, False, "")
        self._first_nodes: list[int] = [-1]
        self._modules_of_nodes: list[str] = [""]
        self._depth_at_backward: dict[int, int] = {}
        self._num_frames = 0
        self.type_names = {name: type(module).__name__ for name, module in model.named_modules()}

    def __enter__(self) -> ModuleWatch:
        self._make_room()
        for name, module in _watchable(self._model):
            enter = functools.partial(self._enter, name)
            if module._compiled_call_impl is None:
                self._hooks.append(_Hooks(module, enter, self._leave))
            else:
                self._calls.append(_FollowedCall(module, enter, self._leave))
        return self

    def __exit__(self, *exc_info: object) -> None:
        for hooks in self._hooks:
            hooks.remove()
        for call in self._calls:
            call.remove()
        self._hooks.clear()
        self._calls.clear()
        _raise_recursion_limit(-self._num_frames)
        self._num_frames = 0

    def hide(self) -> None:
        """Take the hooks off, until :meth:`show`: torch's compiler would compile for each ledger's anew."""
        for hooks in self._hooks:
            hooks.hide()

    def show(self) -> None:
        """Put the hooks on again."""
        for hooks in self._hooks:
            hooks.show()

    def now(self) -> Moment:
        """What is running now."""
        task = _current_graph_task()
        if task == NOT_IN_BACKWARD:
            return self._forward_moment  # asked after every operator, so it is kept ready
        if self._in_forward_of(task):
            return Moment(True, True, self._forward_moment.module)
        # A checkpointed function may call no module; then only checkpoint's own hooks tell.
        hooks = _top_saved_tensors_hooks(True)
        recomputing = hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else _ACCUMULATES_GRADIENT
        if number == _ACCUMULATES_GRADIENT:
            return Moment(True, recomputing, "")
        return Moment(True, recomputing, self._modules_of_nodes[bisect_right(self._first_nodes, number) - 1])

    def _in_forward_of(self, task: int) -> bool:
        # In backward, modules that were entered before it began do not count: a backward may be run by code
        # inside of a module's forward.
        return len(self._stack) > self._depth_at_backward.setdefault(task, len(self._stack))

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or not self._in_force():
            return
        task = _current_graph_task()
        if task != NOT_IN_BACKWARD:
            self._in_forward_of(task)  # notes a backward that begins with this module's recomputation
        self._stack.append(name)
        if len(self._stack) + _FRAMES_AT_A_TIME > self._num_frames:
            self._make_room()
        self._note_change()
        self._mark(f"forward {name}")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling() or not self._in_force():
            return
        if self._stack:
            self._stack.pop()
        self._note_change()

    def _make_room(self) -> None:
        _raise_recursion_limit(_FRAMES_AT_A_TIME)
        self._num_frames += _FRAMES_AT_A_TIME

    def _note_change(self) -> None:
        module = self._stack[-1] if self._stack else ""
        self._forward_moment = Moment(False, False, module)
        # Recomputed nodes are never run by backward, and another thread may number them from zero.
        if _current_graph_task() == NOT_IN_BACKWARD:
            self._first_nodes.append(torch._C._autograd._get_sequence_nr())
            self._modules_of_nodes.append(module)


def _raise_recursion_limit(num_frames: int) -> None:
    with _recursion_limit:  # which is that of all threads
        sys.setrecursionlimit(sys.getrecursionlimit() + num_frames)


class _Hooks:
    """Hooks around a module's forward that can be taken off for a while."""

    def __init__(self, module: nn.Module, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self._module = module
        self._before = module.register_forward_pre_hook(enter), enter
        self._after = module.register_forward_hook(leave, always_call=True), leave

    def remove(self) -> None:
        self._before[0].remove()
        self._after[0].remove()

    hide = remove

    def show(self) -> None:
        # Under the numbers that they had, by which they can still be removed.
        (before, enter), (after, leave) = self._before, self._after
        self._module._forward_pre_hooks[before.id] = enter
        self._module._forward_hooks[after.id] = leave
        self._module._forward_hooks_always_called[after.id] = True


class _FollowedCall:
    """Stands for the compiled call of a module that was compiled in place; its hooks are compiled with it."""

    def __init__(self, module: Any, enter: Callable[..., None], leave: Callable[..., None]) -> None:
        self._module = module
        self._enter = enter
        self._leave = leave
        self._call = module._compiled_call_impl
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._enter(self._module, args)
        try:
            return self._call(*args, **kwargs)
        finally:
            self._leave(self._module, args, None)

    def remove(self) -> None:
        above = self._module._compiled_call_impl
        if above is self:
            self._module._compiled_call_impl = self._call
        while isinstance(above, _FollowedCall):  # of a ledger that was entered later, but is left later, too
            if above._call is self:
                above._call = self._call
            above = above._call


def _watchable(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Submodules that are followed, by path: of compiled ones nothing that is inside."""
    # Importing dynamo takes seconds, and where nobody has, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo")
    opaque: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in opaque):
            continue
        compiled = module._compiled_call_impl is not None or (
            dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        )
        if compiled or isinstance(module, torch.jit.ScriptModule):
            opaque.append(f"{name}." if name else "")
        if name and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


skip_in_dynamo(ModuleWatch._enter, ModuleWatch._leave)
