"""Where a ledger and ``torch.compile`` meet.

A ledger must change nothing of what is compiled. torch guards compiled code by the state of the program, and
compiles again, or gives up, where it finds another one: so what a ledger puts into place must be out of sight
while torch looks. And compiled code must be seen: torch's own compiler (inductor) makes graphs that allocate
behind dispatch, so what goes in, comes out and is allocated meanwhile has to be asked for.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from lightning_memtrain.compat.torch_private import (
    TorchDispatchMode,
    dynamo_guards,
    get_current_dispatch_mode_stack,
    pop_mode,
    push_mode,
)
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode


@dataclass(frozen=True, eq=False)
class CompilerListener:
    """What is to be called, in the thread that compiles or runs compiled code.

    Args:
        before_compilation: torch is about to compile; what was put into place is to be taken out of sight.
        after_compilation: it has compiled, and everything may be in place again.
        before_graph: a compiled graph is about to run, with these inputs.
        after_graph: it has run, with these outputs; with ``None`` if it failed.
        allocated: meanwhile it has allocated this tensor.
    """

    before_compilation: Callable[[], None]
    after_compilation: Callable[[], None]
    before_graph: Callable[[Sequence[Any]], None]
    after_graph: Callable[[Any], None]
    allocated: Callable[[torch.Tensor], None]


class CompilerHooks:
    """Tells listeners of compilations and of compiled graphs, while there are any.

    Where nobody has imported torch's compiler, which takes a second, nothing is compiled and nothing is done.
    """

    def __init__(self) -> None:
        self._listeners: list[CompilerListener] = []
        self._lock = threading.Lock()
        self._callbacks: Any = None
        self._graphs: tuple[Any, Any] | None = None
        self._allocations: list[tuple[ModuleType, str, Any]] = []
        self._num_modules = 0

    def add(self, listener: CompilerListener) -> None:
        """Tell ``listener`` of compilations and compiled graphs until :meth:`remove`."""
        with self._lock:
            self._listeners.append(listener)
            self._attach()

    def remove(self, listener: CompilerListener) -> None:
        """Stop telling ``listener`` of compilations and compiled graphs."""
        with self._lock:
            self._listeners.remove(listener)
            if not self._listeners:
                self._detach()

    def _attach(self) -> None:
        dynamo = sys.modules.get("torch._dynamo.callback")
        if self._callbacks is None and dynamo is not None:
            self._callbacks = dynamo.callback_handler
            self._callbacks.register_start_callback(self._before_compilation)
            self._callbacks.register_end_callback(self._after_compilation)
        self._attach_to_graphs()

    def _attach_to_graphs(self) -> None:
        kind = _graph_class()
        if self._graphs is None and kind is not None:
            self._graphs = kind, kind.__call__
            kind.__call__ = self._replacement(kind.__call__)

    def _detach(self) -> None:
        if self._callbacks is not None:
            with suppress(ValueError):  # `torch._dynamo.reset()` has removed them
                self._callbacks.remove_start_callback(self._before_compilation)
                self._callbacks.remove_end_callback(self._after_compilation)
            self._callbacks = None
        if self._graphs is not None:
            kind, original = self._graphs
            kind.__call__ = original
            self._graphs = None
        for module, name, original in self._allocations:
            setattr(module, name, original)
        self._allocations.clear()
        self._num_modules = 0

    # torch 2.5 passes nothing, later ones say what they compile

    def _before_compilation(self, *args: Any) -> None:
        MODE_HIDER.compiling(True)
        for listener in tuple(self._listeners):
            listener.before_compilation()

    def _after_compilation(self, *args: Any) -> None:
        MODE_HIDER.compiling(False)
        for listener in tuple(self._listeners):
            listener.after_compilation()
        with self._lock:
            if self._listeners:
                self._attach_to_graphs()  # the first graph may have just been made, and will be run next

    def _replacement(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(graph: Any, inputs: Sequence[Any]) -> Any:
            self._follow_allocations()
            listeners = tuple(self._listeners)
            for listener in listeners:
                listener.before_graph(inputs)
            outputs = None
            try:
                outputs = original(graph, inputs)
            finally:
                for listener in listeners:
                    listener.after_graph(outputs)
            return outputs

        return call

    def _follow_allocations(self) -> None:
        """Replace what the code of graphs calls to allocate, in all that were made since the last time."""
        modules = generated_modules()
        if len(modules) == self._num_modules:
            return
        with self._lock:
            for module in modules[self._num_modules :]:
                for name, original in [*vars(module).items()]:
                    if name.startswith("empty_strided_"):  # then the device; plain `empty_strided` dispatches
                        setattr(module, name, self._allocating(original))
                        self._allocations.append((module, name, original))
            self._num_modules = len(modules)

    def _allocating(self, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            for listener in tuple(self._listeners):
                listener.allocated(tensor)
            return tensor

        return allocate


def generated_modules() -> list[ModuleType]:
    """The modules of Python code that inductor has written, oldest first.

    There are none of graphs that are in C++ throughout (``cpp_wrapper``).
    """
    cache = getattr(sys.modules.get("torch._inductor.codecache"), "PyCodeCache", None)
    modules = getattr(cache, "modules", None)  # before torch 2.6 a mapping
    if modules is None:
        modules = [*getattr(cache, "cache", {}).values()]
    return [module for module in modules if isinstance(module, ModuleType)]


def _graph_class() -> Any:
    """The class of the graphs that inductor has compiled, if it was imported."""
    for name in ("torch._inductor.output_code", "torch._inductor.codecache"):  # the latter before torch 2.6
        kind = getattr(sys.modules.get(name), "CompiledFxGraph", None)
        if kind is not None:
            return kind
    return None


COMPILER_HOOKS = CompilerHooks()


class ModeHider:
    """Takes ledgers' dispatch modes and hooks away in a thread while torch's compiler looks at it.

    Before torch 2.10 guards see that a mode is on, or that a function calls a module with hooks, and code is
    compiled anew for it until torch gives it up. Graphs run with everything in place again. What is called
    between two graphs is not seen, since the compiler is still looking.
    """

    #: Whether this torch needs it.
    needed = not hasattr(dynamo_guards, "set_is_in_mode_without_ignore_compile_internals")

    def __init__(self) -> None:
        self._listeners: list[CompilerListener] = []
        self._lock = threading.Lock()
        self._here = threading.local()
        self._module: Any = None
        self._original: Callable[[Any], Any] | None = None

    def add(self, listener: CompilerListener) -> None:
        """Hide modes, and what ``listener`` hides, until :meth:`remove`."""
        with self._lock:
            self._listeners.append(listener)
            module: Any = sys.modules.get("torch._dynamo.eval_frame")
            if self._original is None and module is not None:
                self._module, self._original = module, module._maybe_set_eval_frame
                module._maybe_set_eval_frame = self._replacement(self._original)

    def remove(self, listener: CompilerListener) -> None:
        """Hide modes, and what ``listener`` hides, no more."""
        with self._lock:
            self._listeners.remove(listener)
            if not self._listeners and self._original is not None:
                self._module._maybe_set_eval_frame = self._original
                self._original = None

    def compiling(self, is_compiling: bool) -> None:
        """Say that this thread begins or ends to compile, all of which is out of sight."""
        self._here.is_compiling = is_compiling

    def _replacement(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def set_eval_frame(callback: Any) -> Any:
            prior = original(callback)
            if callback is not None:
                self._hide()
            elif not getattr(self._here, "is_compiling", False):
                self._show()
            return prior

        return set_eval_frame

    def _hide(self) -> None:
        hidden: list[TorchDispatchMode] = []
        others: list[TorchDispatchMode] = []
        while get_current_dispatch_mode_stack():
            mode = pop_mode()
            (hidden if isinstance(mode, OperatorMode) else others).append(mode)
        for mode in reversed(others):
            push_mode(mode)
        self._here.hidden = [*getattr(self._here, "hidden", ()), *reversed(hidden)]
        for listener in tuple(self._listeners):
            listener.before_compilation()

    def _show(self) -> None:
        for mode in getattr(self._here, "hidden", ()):
            push_mode(mode)
        self._here.hidden = []
        for listener in tuple(self._listeners):
            listener.after_compilation()


MODE_HIDER = ModeHider()
