"""Which module of the model is running, in forward, in recomputation and in backward."""

from __future__ import annotations

import sys
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_memtrain.compat.torch_private import (
    current_autograd_node,
    current_graph_task_id,
    forward_hooks,
    forward_hooks_always_called,
    forward_pre_hooks,
    next_sequence_number,
    sequence_number_of,
    skip_in_dynamo,
    top_saved_tensors_hooks,
)

NOT_IN_BACKWARD = -1

# A module that has hooks takes one more frame of Python than one that has none, so that modules nested deeply
# enough would recur too deeply only because they are watched. The limit is raised by this many frames at a
# time, before they are needed; the first of them are for what runs around the innermost operator.
_FRAMES_AT_A_TIME = 100
_recursion_limit = threading.Lock()

current_graph_task = current_graph_task_id
_current_node = current_autograd_node
_next_node_number = next_sequence_number

# Before torch 2.8 there is no such function, and only the recomputation of modules is recognised.
_top_saved_tensors_hooks = top_saved_tensors_hooks

# The number of autograd's nodes that accumulate gradients, which belong to no module.
_ACCUMULATES_GRADIENT = 2**64 - 1


class RunningModule(NamedTuple):
    """What is running at one moment.

    Args:
        in_backward: whether a backward is going on.
        recomputing: whether a checkpointed region is being recomputed: a forward inside of a backward.
        module: path of the module at work; ``""`` outside of all submodules.
    """

    in_backward: bool
    recomputing: bool
    module: str


_MOMENTS_OUTSIDE = {recomputing: RunningModule(True, recomputing, "") for recomputing in (False, True)}


class ModuleTracker:
    """Follows a model's submodules: their forward calls by hooks, their backward by autograd's numbering.

    Autograd numbers the nodes of a forward pass in the order of their making. The numbers that were handed
    out while a module ran tell, in backward, whose node is at work; so no backward hook is needed, which
    would change the graph. Compiled modules are followed as a whole, and scripted ones not at all.

    Args:
        annotate: called with ``"forward <path>"`` when a module's forward begins.
        in_force: tells whether a call is one of those to be followed.
    """

    def __init__(self, annotate: Callable[[str], None], in_force: Callable[[], bool]) -> None:
        self._annotate = annotate
        self._in_force = in_force
        self._hooks = _Hooks()
        # By identity, since hooks are given nothing but the module; those that have hooks are kept meanwhile.
        self._names: dict[int, str] = {}
        self._calls: list[_FollowedCall] = []
        self._stack: list[str] = []
        self._forward_moment: RunningModule | None = None  # if it was asked for since the last change
        self._last_number, self._last_moment = -1, RunningModule(True, False, "")
        self._first_nodes: list[int] = [-1]
        self._modules_of_nodes: list[str] = [""]
        self._depth_at_backward: dict[int, int] = {}
        self._num_frames = 0
        self.type_names: dict[str, str] = {}

    def __reduce__(self) -> tuple[Callable[[], ModuleTracker], tuple[()]]:
        # A module that is copied or pickled while it is followed takes its hooks along, which follow nothing.
        return _follows_nothing, ()

    def begin(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Follow forward calls of modules by hooks until :meth:`end`.

        Args:
            modules: of the model, as :func:`~.submodules.named_submodules` lists them.
        """
        self.type_names = {name: type(module).__name__ for name, module in modules}
        self._make_room()
        hooked = []
        for name, module in _watchable(modules):
            self._names[id(module)] = name
            if module._compiled_call_impl is None:
                hooked.append(module)
            else:
                self._calls.append(_FollowedCall(module, self._enter, self._leave))
        self._hooks.put_on(hooked, self._enter, self._leave)

    def end(self) -> None:
        """Take all hooks off; what was followed so far stays known."""
        self._hooks.remove()
        for call in self._calls:
            call.remove()
        self._calls.clear()
        self._names.clear()
        _raise_recursion_limit(-self._num_frames)
        self._num_frames = 0

    def hide(self) -> None:
        """Take the hooks off, until :meth:`show`: torch's compiler would compile for each ledger's anew."""
        self._hooks.hide()

    def show(self) -> None:
        """Put the hooks on again that :meth:`hide` took off."""
        self._hooks.show()

    def is_still(self, moment: RunningModule | None) -> bool:
        """Whether backward is at the node at which :meth:`now` was last asked, and gave ``moment``.

        A recomputation within that node is not asked for, which makes this the cheapest of questions.
        """
        node = _current_node()
        return (
            moment is self._last_moment and node is not None and sequence_number_of(node) == self._last_number
        )

    def now(self) -> RunningModule:
        """Which module is running now, and whether in forward, backward or recomputation."""
        task = current_graph_task()
        if task == NOT_IN_BACKWARD:
            moment = self._forward_moment  # asked after every operator, so it is kept
            if moment is None:
                moment = self._forward_moment = RunningModule(
                    False, False, self._stack[-1] if self._stack else ""
                )
            return moment
        depth = len(self._stack)
        if depth and depth > self._depth_at_backward.setdefault(task, depth):
            return RunningModule(True, True, self._stack[-1])
        # A checkpointed function may call no module; then only checkpoint's own hooks tell.
        hooks = _top_saved_tensors_hooks(True)
        recomputing = hooks is not None and "_recomputation_hook" in getattr(hooks[0], "__qualname__", "")
        node = _current_node()
        number = sequence_number_of(node) if node is not None else _ACCUMULATES_GRADIENT
        last = self._last_moment
        if number == self._last_number and recomputing == last.recomputing:
            return last  # a node runs several operators
        self._last_number = number
        if number == _ACCUMULATES_GRADIENT:
            self._last_moment = _MOMENTS_OUTSIDE[recomputing]
            return self._last_moment
        module = self._modules_of_nodes[bisect_right(self._first_nodes, number) - 1]
        if module != last.module or recomputing != last.recomputing:  # a module makes several nodes
            self._last_moment = RunningModule(True, recomputing, module)
        return self._last_moment

    def _note_depth(self, task: int) -> None:
        # In backward, modules that were entered before it began do not count: a backward may be run by code
        # inside of a module's forward.
        self._depth_at_backward.setdefault(task, len(self._stack))

    def _enter(self, module: nn.Module, args: Any) -> None:
        name = self._names.get(id(module))  # none of a copy of a module, which has copies of its hooks
        if name is None or torch.compiler.is_compiling() or not self._in_force():
            return
        task = current_graph_task()
        if task != NOT_IN_BACKWARD:
            self._note_depth(task)  # of a backward that begins with this module's recomputation
        self._stack.append(name)
        if len(self._stack) + _FRAMES_AT_A_TIME > self._num_frames:
            self._make_room()
        self._note_change(name, task)
        self._annotate(f"forward {name}")

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if id(module) not in self._names or torch.compiler.is_compiling() or not self._in_force():
            return
        stack = self._stack
        if stack:
            stack.pop()
        self._note_change(stack[-1] if stack else "", current_graph_task())

    def _make_room(self) -> None:
        _raise_recursion_limit(_FRAMES_AT_A_TIME)
        self._num_frames += _FRAMES_AT_A_TIME

    def _note_change(self, module: str, task: int) -> None:
        self._forward_moment = None
        # Recomputed nodes are never run by backward, and another thread may number them from zero.
        if task == NOT_IN_BACKWARD:
            self._first_nodes.append(_next_node_number())
            self._modules_of_nodes.append(module)


def _follows_nothing() -> ModuleTracker:
    return ModuleTracker(lambda name: None, bool)


def _raise_recursion_limit(num_frames: int) -> None:
    with _recursion_limit:  # which is that of all threads
        sys.setrecursionlimit(sys.getrecursionlimit() + num_frames)


class _Hooks:
    """Hooks around modules' forward that can be taken off for a while.

    Registering them one by one makes three objects for each, which takes longer than a step of a model of
    thousands of small modules. They are put where registering puts them, all under one number of their own.
    """

    def __init__(self) -> None:
        self._modules: list[nn.Module] = []
        self._enter: Any = None
        self._leave: Any = None
        self._number = RemovableHandle(OrderedDict()).id

    def put_on(
        self, modules: list[nn.Module], enter: Callable[..., None], leave: Callable[..., None]
    ) -> None:
        self._modules, self._enter, self._leave = modules, enter, leave
        self.show()

    def show(self) -> None:
        number, enter, leave = self._number, self._enter, self._leave
        for module in self._modules:
            forward_pre_hooks(module)[number] = enter
            forward_hooks(module)[number] = leave
            forward_hooks_always_called(module)[number] = True

    def hide(self) -> None:
        number = self._number
        for module in self._modules:
            forward_pre_hooks(module).pop(number, None)
            forward_hooks(module).pop(number, None)
            forward_hooks_always_called(module).pop(number, None)

    def remove(self) -> None:
        self.hide()
        self._modules, self._enter, self._leave = [], None, None  # the hooks refer to who put them on


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


def _watchable(modules: Iterable[tuple[str, nn.Module]]) -> Iterator[tuple[str, Any]]:
    """Submodules that are followed, by path: of compiled ones nothing that is inside."""
    # Importing dynamo takes seconds, and where nobody has, nothing is compiled.
    dynamo = sys.modules.get("torch._dynamo")
    opaque: list[str] = []
    for name, module in modules:
        if any(name.startswith(prefix) for prefix in opaque):
            continue
        compiled = module._compiled_call_impl is not None or (
            dynamo is not None and isinstance(module, dynamo.OptimizedModule)
        )
        if compiled or isinstance(module, torch.jit.ScriptModule):
            opaque.append(f"{name}." if name else "")
        if name and not isinstance(module, torch.jit.ScriptModule):
            yield name, module


skip_in_dynamo(ModuleTracker._enter, ModuleTracker._leave)
