"""What functions and classes of users reach: globals by their names, class attributes, closures."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from types import FunctionType, ModuleType
from typing import Any

from lightning_memtrain.tracing.user_state.boundaries import is_foreign, module_of, mro_of, own_of, push
from lightning_memtrain.tracing.user_state.names_in_code import CodeNames, names_in
from lightning_memtrain.tracing.user_state.object_snapshots import (
    ABSENT,
    ClassSnapshot,
    FunctionSnapshot,
    NamespaceSnapshot,
    Snapshot,
)

_CODE = (FunctionType, staticmethod, classmethod, property, functools.cached_property)


class CodeTraversal:
    """Notes what code can reach.

    A global or an attribute of a module is captured if a function that may run names it. A method may run if
    code that may run names it, if Python calls it (``__call__``), or if it overrides one of a foreign class,
    which may call it (``training_step``, ``forward``, ``update``). So of a library with hundreds of methods
    only those count that a step can get to. A name that is put together when the program runs is not seen.

    Args:
        pending: takes what is to be looked into.
        snapshots: where snapshots go.
    """

    def __init__(self, pending: list[Any], snapshots: list[Snapshot]) -> None:
        self._pending = pending
        self._snapshots = snapshots
        self._namespaces: dict[int, NamespaceSnapshot] = {}
        self._visited: dict[tuple[int, int], Any] = {}
        self._named: set[str] = set()
        self._waiting: dict[str, list[Any]] = {}

    def _push(self, items: Collection[Any]) -> None:
        push(self._pending, items)

    def function(self, target: FunctionType) -> None:
        """Note a function and what its code names."""
        defaults, by_name = target.__defaults__, target.__kwdefaults__
        if defaults or by_name:
            self._snapshots.append(FunctionSnapshot(target))
            self._push((defaults, by_name))
        # Foreign functions, too, close over a user's: those that decorate one.
        if target.__closure__:
            self._push(target.__closure__)
        space = target.__globals__
        if is_foreign(space.get("__name__")):
            return
        names = names_in(target.__code__)
        self._now_named(names.named)
        self._names(space, names)
        if names.imports:
            package = space.get("__package__")
            for name in names.named:
                for found in (sys.modules.get(name), sys.modules.get(f"{package}.{name}")):
                    if found is not None:
                        self._module(found, names)

    def class_(self, target: type) -> None:
        """Note the attributes of a class, unless it is foreign."""
        if is_foreign(module_of(target)):
            return
        snapshot = ClassSnapshot(target)
        self._snapshots.append(snapshot)
        mro = mro_of(target)
        foreign = [own_of(base) for base in mro if is_foreign(module_of(base))]
        for name, value in snapshot.contents.items():
            if type(value) not in _CODE:
                if not name.startswith("__"):  # else fields of a dataclass, annotations and the like
                    self._push((value,))
            elif (
                name in self._named
                or name.startswith("__")
                or any(name in attributes for attributes in foreign)
            ):
                self._push((value,))
            else:
                self._waiting.setdefault(name, []).append(value)
        self._push(mro)

    def _names(self, space: dict[str, Any], names: CodeNames) -> None:
        snapshot = self._namespaces.get(id(space))
        if snapshot is None:
            snapshot = self._namespaces[id(space)] = NamespaceSnapshot(space)
            self._snapshots.append(snapshot)
        contents = snapshot.contents
        for name in names.named:
            value = dict.get(space, name, ABSENT)
            if value is ABSENT:
                if names.stores:
                    contents.setdefault(name, ABSENT)
                continue
            if ModuleType in mro_of(type(value)):
                self._module(value, names)
            if name not in contents:
                contents[name] = value
                self._push((value,))

    def _module(self, module: ModuleType, names: CodeNames) -> None:
        key = id(module), id(names)
        if key in self._visited:
            return
        self._visited[key] = names  # kept, so that its id stays its own
        # A lazy module would make what is asked for.
        space = object.__getattribute__(module, "__dict__")
        if not is_foreign(space.get("__name__")):
            self._names(space, names)

    def _now_named(self, names: Collection[str]) -> None:
        for name in names:
            if name not in self._named:
                self._named.add(name)
                self._push(self._waiting.pop(name, ()))
