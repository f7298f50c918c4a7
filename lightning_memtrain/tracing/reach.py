"""What is within reach of some objects: through attributes, items, closures, and what code names."""

from __future__ import annotations

import functools
import gc
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
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

from lightning_memtrain.tracing import boundaries
from lightning_memtrain.tracing.boundaries import PLAIN, is_foreign, module_of, mro_of
from lightning_memtrain.tracing.code import Names, names_in
from lightning_memtrain.tracing.notes import (
    ABSENT,
    BytesNote,
    CellNote,
    ClassNote,
    DequeNote,
    DictNote,
    FunctionNote,
    InstanceNotes,
    ListNote,
    NamesNote,
    Note,
    OrderedDictNote,
    SetNote,
    SlotsNote,
    StateNote,
)
from lightning_memtrain.tracing.tensor_notes import TensorNote

# What a step touches of a trainer: what is logged, where the loop is, and callbacks. Loggers, data connectors
# and loaders, signals, launchers and checkpoints are nothing of a step.
_OF_TRAINER = ("_logger_connector", "fit_loop", "callbacks", "_accelerator_connector")
# Of a strategy only what it keeps for the trainer, no process groups and no wrapped models.
_OF_STRATEGY = ("_optimizers", "_lightning_optimizers", "lr_scheduler_configs", "_precision_plugin")


class _Kind(NamedTuple):
    """How objects of one type are looked into."""

    contents: Callable[[Any], None] | None
    attributes: Any
    slots: tuple[Any, ...]


class Reach:
    """Everything that can be reached from some objects, noted.

    Args:
        roots: where to begin.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.notes: list[Note] = []
        self.tensors: list[TensorNote] = []
        self._instances = InstanceNotes()
        self.notes.append(self._instances)
        self._seen: dict[int, Any] = {}
        self._pending: list[Any] = []
        self._kinds: dict[type, _Kind | None] = {}
        self._namespaces: dict[int, NamesNote] = {}
        self._named: set[str] = set()
        self._unnamed: dict[str, list[Any]] = {}
        self._visited_modules: dict[tuple[int, int], Any] = {}
        self._push(roots)
        self._walk()
        self._seen.clear()

    def _push(self, items: Iterable[Any]) -> None:
        self._pending += [item for item in items if type(item) not in PLAIN]

    def _walk(self) -> None:
        pending, seen = self._pending, self._seen
        while pending:
            target = pending.pop()
            if id(target) in seen:
                continue
            seen[id(target)] = target  # kept, so that its id stays its own
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
        if kind.contents is not None:
            kind.contents(target)
        attributes = None
        if kind.attributes is not None:
            attributes = kind.attributes.__get__(target)
            if attributes is not None and id(attributes) not in self._seen:
                self._seen[id(attributes)] = attributes
                self._dict(attributes)
        if kind.slots:
            self._slots(target, kind.slots)
        if kind.attributes is not None or kind.slots:
            self._instances.add(target, attributes, kind.attributes)

    def _slots(self, target: Any, slots: tuple[Any, ...]) -> None:
        note = SlotsNote(target, slots)
        self.notes.append(note)
        self._push(value for value in note.contents if value is not ABSENT)

    # Kinds ------------------------------------------------------------------------------------------------

    def _kind_of(self, cls: type) -> _Kind | None:
        mro = mro_of(cls)
        if type in mro:
            return _Kind(self._class, None, ())
        if ModuleType in mro or (boundaries.is_left_alone(cls) and cls not in _CONTENTS):
            return None
        self._push(base for base in mro if not is_foreign(module_of(base)))
        if boundaries.is_trainer(cls):
            return _Kind(self._trainer, None, ())
        if boundaries.is_strategy(cls):
            return _Kind(self._strategy, None, ())
        if boundaries.is_data_module(cls):
            return _Kind(self._shallow, None, ())
        contents: Callable[[Any], None] | None = next(
            (functools.partial(_CONTENTS[base], self) for base in mro if base in _CONTENTS), None
        )
        if contents is None:
            contents = self._numpy_contents(mro)
        accessor = next(
            (
                found
                for base in mro
                if type(found := _own(base).get("__dict__")) in (GetSetDescriptorType, MemberDescriptorType)
                and found.__objclass__ is base
            ),
            None,
        )
        slots = tuple(
            value
            for base in mro
            if "__slots__" in _own(base)
            for value in _own(base).values()
            if type(value) is MemberDescriptorType
        )
        return _Kind(contents, accessor, slots)

    def _numpy_contents(self, mro: tuple[type, ...]) -> Callable[[Any], None] | None:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        if numpy.random.Generator in mro:
            return lambda target: self._state(target.bit_generator, "state")
        if numpy.random.BitGenerator in mro:
            return lambda target: self._state(target, "state")
        if numpy.random.RandomState in mro:
            return lambda target: self.notes.append(
                StateNote(lambda: target.get_state(legacy=False), target.set_state)
            )
        return None

    def _state(self, target: Any, name: str) -> None:
        self.notes.append(
            StateNote(lambda: getattr(target, name), lambda state: setattr(target, name, state))
        )

    def _dict(self, target: dict[Any, Any]) -> None:
        note = DictNote(target)
        self.notes.append(note)
        if note.contents:
            self._push(note.contents)
            self._push(note.contents.values())

    def _defaultdict(self, target: defaultdict[Any, Any]) -> None:
        self._dict(target)
        self._slots(target, (defaultdict.__dict__["default_factory"],))

    def _ordered_dict(self, target: OrderedDict[Any, Any]) -> None:
        note = OrderedDictNote(target)
        self.notes.append(note)
        self._push(dict.keys(target))
        self._push(note.contents)

    def _list(self, target: list[Any]) -> None:
        note = ListNote(target)
        self.notes.append(note)
        self._push_many(note.contents)

    def _push_many(self, items: list[Any]) -> None:
        if len(items) < 1000 or not PLAIN.issuperset(map(type, items)):
            self._push(items)

    def _deque(self, target: deque[Any]) -> None:
        note = DequeNote(target)
        self.notes.append(note)
        self._push(note.contents)

    def _set(self, target: set[Any]) -> None:
        note = SetNote(target)
        self.notes.append(note)
        self._push(note.contents)

    def _tuple(self, target: tuple[Any, ...]) -> None:
        self._push(tuple.__iter__(target))

    def _frozenset(self, target: frozenset[Any]) -> None:
        self._push(frozenset.__iter__(target))

    def _bytearray(self, target: bytearray) -> None:
        self.notes.append(BytesNote(target))

    def _cell(self, target: CellType) -> None:
        note = CellNote(target)
        self.notes.append(note)
        self._push(value for value in note.contents if value is not ABSENT)

    def _method(self, target: Any) -> None:
        self._push((target.__self__, getattr(target, "__func__", None)))

    def _partial(self, target: functools.partial[Any]) -> None:
        of = functools.partial
        self._push(of.__dict__[name].__get__(target) for name in ("func", "args", "keywords"))

    def _property(self, target: property) -> None:
        self._push((target.fget, target.fset, target.fdel))

    def _wrapped(self, target: Any) -> None:
        self._push([target.__func__])

    def _proxy(self, target: MappingProxyType[Any, Any]) -> None:
        self._push(gc.get_referents(target))

    def _tensor(self, target: Tensor) -> None:
        note = TensorNote(target)
        self.tensors.append(note)
        self._push((note.grad, target._backward_hooks, getattr(target, "_post_accumulate_grad_hooks", None)))

    def _torch_generator(self, target: torch.Generator) -> None:
        self.notes.append(StateNote(target.get_state, target.set_state))

    def _python_random(self, target: random.Random) -> None:
        self.notes.append(
            StateNote(
                lambda: random.Random.getstate(target), lambda state: random.Random.setstate(target, state)
            )
        )

    # Code -------------------------------------------------------------------------------------------------

    def _function(self, target: FunctionType) -> None:
        self.notes.append(FunctionNote(target))
        self._push((target.__defaults__, target.__kwdefaults__, *(target.__closure__ or ())))
        space = target.__globals__
        if is_foreign(space.get("__name__")):
            return
        names = names_in(target.__code__)
        self._now_named(names.read)
        self._now_named(names.spelt)
        self._names(space, names)
        if names.imports:
            package = space.get("__package__")
            for name in names.read:
                for module in (sys.modules.get(name), sys.modules.get(f"{package}.{name}")):
                    if type(module) is ModuleType:
                        self._module(module, names)

    def _names(self, space: dict[str, Any], names: Names) -> None:
        noted = self._namespaces.get(id(space))
        if noted is None:
            noted = self._namespaces[id(space)] = NamesNote(space)
            self.notes.append(noted)
        contents = noted.contents
        for name in names.read:
            value = dict.get(space, name, ABSENT)
            if value is ABSENT:
                if names.stores:
                    contents.setdefault(name, ABSENT)
                continue
            if ModuleType in mro_of(type(value)):
                self._module(value, names)
            if name not in contents:
                contents[name] = value
                self._push([value])

    def _module(self, module: ModuleType, names: Names) -> None:
        key = id(module), id(names)
        if key in self._visited_modules:
            return
        self._visited_modules[key] = names
        space = object.__getattribute__(module, "__dict__")
        if not is_foreign(space.get("__name__")):
            self._names(space, names)

    def _now_named(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._named:
                self._named.add(name)
                self._push(self._unnamed.pop(name, ()))

    def _class(self, target: type) -> None:
        if is_foreign(module_of(target)):
            return
        note = ClassNote(target)
        self.notes.append(note)
        mro = mro_of(target)
        foreign = [_own(base) for base in mro if is_foreign(module_of(base))]
        for name, value in note.contents.items():
            if (
                type(value) not in _CODE
                or name in self._named
                or name.startswith("__")
                or any(name in base for base in foreign)
            ):
                self._push([value])
            else:
                self._unnamed.setdefault(name, []).append(value)
        self._push(base for base in mro if not is_foreign(module_of(base)))

    # Lightning --------------------------------------------------------------------------------------------

    def _shallow(self, target: Any) -> None:
        self.notes.append(DictNote(object.__getattribute__(target, "__dict__")))

    def _trainer(self, target: Any) -> None:
        self._shallow(target)
        attributes = object.__getattribute__(target, "__dict__")
        parts = [attributes.get(name) for name in _OF_TRAINER]
        self._push(parts[:-1])
        self._push([getattr(parts[-1], "strategy", None)])

    def _strategy(self, target: Any) -> None:
        attributes = object.__getattribute__(target, "__dict__")
        note = NamesNote(attributes)
        note.contents = {name: attributes.get(name, ABSENT) for name in _OF_STRATEGY}
        self.notes.append(note)
        self._push(value for value in note.contents.values() if value is not ABSENT)


_CONTENTS: dict[type, Callable[[Reach, Any], None]] = {
    OrderedDict: Reach._ordered_dict,
    defaultdict: Reach._defaultdict,
    dict: Reach._dict,
    list: Reach._list,
    deque: Reach._deque,
    set: Reach._set,
    tuple: Reach._tuple,
    frozenset: Reach._frozenset,
    bytearray: Reach._bytearray,
    CellType: Reach._cell,
    FunctionType: Reach._function,
    MethodType: Reach._method,
    BuiltinMethodType: Reach._method,
    MethodWrapperType: Reach._method,
    functools.partial: Reach._partial,
    property: Reach._property,
    staticmethod: Reach._wrapped,
    classmethod: Reach._wrapped,
    MappingProxyType: Reach._proxy,
    Tensor: Reach._tensor,
    torch.Generator: Reach._torch_generator,
    random.Random: Reach._python_random,
}
_CODE = (FunctionType, staticmethod, classmethod, property, functools.cached_property)


def _own(cls: type) -> Any:
    return type.__dict__["__dict__"].__get__(cls)
