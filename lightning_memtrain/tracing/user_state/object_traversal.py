"""What is within reach of some objects: through attributes, items, closures, and what code names."""

from __future__ import annotations

import functools
import gc
import itertools
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from types import (
    BuiltinMethodType,
    CellType,
    FunctionType,
    GetSetDescriptorType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import is_traceable_wrapper_subclass
from lightning_memtrain.tracing.user_state.boundaries import (
    PLAIN,
    is_foreign,
    is_left_alone,
    is_lightnings,
    module_of,
    mro_of,
    own_of,
    push,
)
from lightning_memtrain.tracing.user_state.code_traversal import CodeTraversal
from lightning_memtrain.tracing.user_state.iterator_snapshots import OVER_SEQUENCES, IteratorSnapshots
from lightning_memtrain.tracing.user_state.object_snapshots import (
    ABSENT,
    CellSnapshot,
    DequeSnapshot,
    DictSnapshot,
    EmptySnapshots,
    InstanceSnapshots,
    ListSnapshot,
    NamespaceSnapshot,
    OrderedDictSnapshot,
    SetSnapshot,
    SlotsSnapshot,
    Snapshot,
)
from lightning_memtrain.tracing.user_state.opaque_snapshots import (
    MOST_ARRAY_BYTES,
    WEAK,
    WeakSnapshot,
    has_opaque_state,
    opaque_snapshot,
)
from lightning_memtrain.tracing.user_state.tensor_snapshots import TensorSnapshot

# What a step touches of a trainer: what is logged, how far the loop has come, callbacks, and, through the
# strategy, optimizers and precision. Loggers, data connectors, signals and launchers are nothing of a step.
_OF_TRAINER = ("_logger_connector", "fit_loop", "callbacks")
# Not its process groups, wrapped models and launchers.
_OF_STRATEGY = ("_optimizers", "_lightning_optimizers", "lr_scheduler_configs", "_precision_plugin")


class _Kind(NamedTuple):
    """How the objects of one type are looked into.

    Args:
        visit: snapshots what they hold beside attributes.
        attributes: where their ``__dict__`` is found.
        slots: where the places of their ``__slots__`` are found.
    """

    visit: Callable[[ObjectTraversal, Any], None] | None
    attributes: Any
    slots: tuple[Any, ...]


class ObjectTraversal:
    """Everything that can be reached from some objects, captured; each object once, by its identity.

    Args:
        roots: where to begin.
        leave: objects that are not looked into.
    """

    def __init__(self, roots: Collection[Any], leave: Collection[Any] = ()) -> None:
        self._instances = InstanceSnapshots()
        self._iterators = IteratorSnapshots()
        self._empty = EmptySnapshots()
        self.snapshots: list[Snapshot] = [self._iterators, self._instances, self._empty]
        self.tensors: list[TensorSnapshot] = []
        self._seen: dict[int, Any] = {id(target): target for target in leave}
        self._pending: list[Any] = []
        self._kinds: dict[type, _Kind | None] = {}
        self.code = CodeTraversal(self._pending, self.snapshots)
        self._array_bytes_left = MOST_ARRAY_BYTES
        self._push(roots)
        # Thousands of snapshots are made that all stay: the collector would look at everything for nothing.
        collects = gc.isenabled()
        gc.disable()
        try:
            self._walk()
        finally:
            if collects:
                gc.enable()
        self._iterators.locate(self.snapshots)

    def _push(self, items: Collection[Any]) -> None:
        push(self._pending, items)

    def _walk(self) -> None:
        pending, seen = self._pending, self._seen
        while pending:
            target = pending.pop()
            if id(target) in seen:
                continue
            seen[id(target)] = target  # kept, so that its id stays its own
            if type(target) is tuple:  # there are many
                pending += [item for item in target if type(item) not in PLAIN]
                continue
            try:
                self._visit(target)
            except Exception:  # what refuses to be read is passed over
                continue

    def _visit(self, target: Any) -> None:
        cls = type(target)
        kind = self._kinds.get(cls, ABSENT)
        if kind is ABSENT:
            kind = self._kinds[cls] = self._kind_of(cls)
        if kind is None:
            return
        attributes = None
        if kind.attributes is not None:
            attributes = kind.attributes.__get__(target)
            if id(attributes) not in self._seen:
                self._seen[id(attributes)] = attributes
                self._dict(attributes)
        if kind.slots:
            self._slots(target, kind.slots)
        if (kind.attributes is not None or kind.slots) and cls is not FunctionType:
            self._instances.add(target, attributes, kind.attributes)
        if kind.visit is not None:
            kind.visit(self, target)

    def _kind_of(self, cls: type) -> _Kind | None:
        mro = mro_of(cls)
        visit = next((_VISITS[base] for base in mro if base in _VISITS), None)
        if visit is None and has_opaque_state(mro):
            visit = ObjectTraversal._state
        if ModuleType in mro or (is_left_alone(cls) and not _is_made_for(mro)):
            return None
        self._push([base for base in mro if not is_foreign(module_of(base))])
        for name, of_lightning in _OF_LIGHTNING.items():
            if is_lightnings(cls, name):
                return _Kind(of_lightning, None, ())
        # The first that is Python's own: a class may have a property of that name.
        found = (own_of(base).get("__dict__") for base in mro if cls not in _BARE and type not in mro)
        attributes = next((one for one in found if type(one) in _DESCRIPTORS), None)
        slots = [
            value
            for base in mro
            if "__slots__" in own_of(base)
            for value in own_of(base).values()
            if type(value) is MemberDescriptorType
        ]
        return _Kind(visit, attributes, tuple(slots))

    # Containers ---------------------------------------------------------------------------------------------

    def _dict(self, target: dict[Any, Any]) -> None:
        if not dict.__len__(target):  # most are: a module has a dozen for hooks
            self._empty.dicts.append(target)
            return
        snapshot = DictSnapshot(target)
        self.snapshots.append(snapshot)
        self._push(snapshot.contents.keys())
        self._push(snapshot.contents.values())

    def _defaultdict(self, target: defaultdict[Any, Any]) -> None:
        self._dict(target)
        self._slots(target, (defaultdict.__dict__["default_factory"],))

    def _ordered_dict(self, target: OrderedDict[Any, Any]) -> None:
        if not dict.__len__(target):
            self._empty.ordered.append(target)
            return
        snapshot = OrderedDictSnapshot(target)
        self.snapshots.append(snapshot)
        self._push(snapshot.keys)
        self._push(snapshot.contents)

    def _contents(
        self, snapshot: ListSnapshot | DequeSnapshot | SetSnapshot | CellSnapshot | SlotsSnapshot
    ) -> None:
        self.snapshots.append(snapshot)
        self._push(snapshot.contents)

    def _slots(self, target: Any, slots: tuple[Any, ...]) -> None:
        self._contents(SlotsSnapshot(target, slots))

    # Objects ------------------------------------------------------------------------------------------------

    def _tensor(self, target: Tensor) -> None:
        snapshot = TensorSnapshot(target)
        self.tensors.append(snapshot)
        self._push(snapshot.held)
        if is_traceable_wrapper_subclass(target):
            names, _ = target.__tensor_flatten__()
            self._push([getattr(target, name) for name in names])

    def _script_module(self, target: Any) -> None:
        self._push([*target.parameters(), *target.buffers()])  # what its attributes hold is no Python object

    def _state(self, target: Any) -> None:
        snapshot = opaque_snapshot(target, mro_of(type(target)), self._array_bytes_left)
        if snapshot is None:
            return
        self.snapshots.append(snapshot)
        self._array_bytes_left -= snapshot.num_bytes
        self._push(snapshot.held)

    def _weak(self, target: Any) -> None:
        snapshot = WeakSnapshot(target)
        self.snapshots.append(snapshot)
        self._push(snapshot.held)

    def _iterator(self, target: Any) -> None:
        self._push(self._iterators.add(target))

    # Lightning ----------------------------------------------------------------------------------------------

    def _attributes_only(self, target: Any) -> None:
        self.snapshots.append(DictSnapshot(object.__getattribute__(target, "__dict__")))

    def _trainer(self, target: Any) -> None:
        self._attributes_only(target)
        attributes = object.__getattribute__(target, "__dict__")
        self._push([attributes.get(name) for name in _OF_TRAINER])
        self._push([getattr(attributes.get("_accelerator_connector"), "strategy", None)])

    def _strategy(self, target: Any) -> None:
        attributes = object.__getattribute__(target, "__dict__")
        snapshot = NamespaceSnapshot(attributes)
        snapshot.contents.update({name: attributes.get(name, ABSENT) for name in _OF_STRATEGY})
        self.snapshots.append(snapshot)
        self._push(snapshot.contents.values())


def _pushed(get: Callable[[Any], Iterable[Any]]) -> Callable[[ObjectTraversal, Any], None]:
    """Look into objects that cannot change themselves, but what they hold can."""
    return lambda traversal, target: traversal._push([*get(target)])


def _captured(make: Callable[[Any], Any]) -> Callable[[ObjectTraversal, Any], None]:
    return lambda traversal, target: traversal._contents(make(target))


def _members(cls: type, *names: str) -> Callable[[ObjectTraversal, Any], None]:
    found = [own_of(cls)[name] for name in names]
    return _pushed(lambda target: [member.__get__(target) for member in found])


def _behind(proxy: MappingProxyType[Any, Any]) -> list[Any]:
    found = gc.get_referents(proxy)
    # The attributes of a class must be written through the class.
    return [target for target in found if type(target) is not dict or "__module__" not in target]


# The attributes of a plain ordered dictionary would be made by looking for them, a dozen times a module.
_BARE = (OrderedDict,)
_DESCRIPTORS = (GetSetDescriptorType, MemberDescriptorType)


def _is_made_for(mro: tuple[type, ...]) -> bool:
    """Whether a class is of a package that is left alone, but there is a way back for its instances."""
    return any(base in (torch.Generator, threading.local, *WEAK) for base in mro)


_VISITS: dict[type, Callable[[ObjectTraversal, Any], None]] = {
    Tensor: ObjectTraversal._tensor,
    OrderedDict: ObjectTraversal._ordered_dict,
    defaultdict: ObjectTraversal._defaultdict,
    dict: ObjectTraversal._dict,
    list: _captured(ListSnapshot),
    deque: _captured(DequeSnapshot),
    set: _captured(SetSnapshot),
    CellType: _captured(CellSnapshot),
    tuple: _pushed(tuple.__iter__),
    frozenset: _pushed(frozenset.__iter__),
    type: lambda traversal, target: traversal.code.class_(target),
    FunctionType: lambda traversal, target: traversal.code.function(target),
    MethodType: _members(MethodType, "__self__", "__func__"),
    BuiltinMethodType: _members(BuiltinMethodType, "__self__"),
    MethodWrapperType: _members(MethodWrapperType, "__self__"),
    functools.partial: _members(functools.partial, "func", "args", "keywords"),
    property: _members(property, "fget", "fset", "fdel"),
    staticmethod: _members(staticmethod, "__func__"),
    classmethod: _members(classmethod, "__func__"),
    MappingProxyType: _pushed(_behind),
    threading.local: _pushed(lambda target: [threading.local.__getattribute__(target, "__dict__")]),
    torch.jit.ScriptModule: ObjectTraversal._script_module,
    itertools.count: ObjectTraversal._iterator,
    **dict.fromkeys(WEAK, ObjectTraversal._weak),
    **dict.fromkeys(OVER_SEQUENCES, ObjectTraversal._iterator),
}
_OF_LIGHTNING = {
    "Trainer": ObjectTraversal._trainer,
    "Strategy": ObjectTraversal._strategy,
    "LightningDataModule": ObjectTraversal._attributes_only,
}
