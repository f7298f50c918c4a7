"""Reading what objects hold, telling whether it changed, and making other objects that hold it."""

from __future__ import annotations

import functools
import pickle
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from operator import is_
from types import MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import DisableTorchDispatch

# What is larger is data, in which no object is looked for.
_MOST_ITEMS = 1000
_MOST_ARRAY_BYTES = 2**20


class ContentAdapter:
    """One way to hold others; what has items and attributes has two.

    Args:
        base: makes objects of a derived class that hold nothing yet.
    """

    has_names = False
    """Whether it says by name what it holds."""

    def __init__(self, base: Any = object) -> None:
        self.base = base

    def read(self, value: Any) -> Any:
        """A copy of what is held: by where, or in order."""
        raise NotImplementedError

    def new_empty(self, value: Any, contents: Any) -> Any:
        """Another of the same class that holds nothing yet."""
        return self.base.__new__(type(value))

    def fill(self, empty: Any, contents: Any) -> Any:
        """An empty one with something in it; only what cannot change is yet another one."""
        raise NotImplementedError

    def is_unchanged(self, value: Any, contents: Any) -> bool:
        """Whether the very same is held as when that was read."""
        now = self.read(value)
        if isinstance(now, dict):
            return now.keys() == contents.keys() and all(map(is_, now.values(), contents.values()))
        return len(now) == len(contents) and all(map(is_, now, contents))

    def items(self, contents: Any) -> Iterable[tuple[Any, Any]]:
        """What is held, each with where."""
        if len(contents) > _MOST_ITEMS:
            return ()
        return contents.items() if isinstance(contents, dict) else enumerate(contents)

    def replaced(self, contents: Any, replace: Callable[[Any], Any]) -> Any:
        """The same with another in the place of each that is held."""
        if len(contents) > _MOST_ITEMS:
            return contents
        if isinstance(contents, dict):
            return {key: replace(held) for key, held in contents.items()}
        return [replace(held) for held in contents]


class _AttributesAdapter(ContentAdapter):
    # Some classes define in a way of their own how to get an attribute.

    has_names = True

    def read(self, value: Any) -> Any:
        return object.__getattribute__(value, "__dict__").copy()

    def fill(self, empty: Any, contents: Any) -> Any:
        object.__getattribute__(empty, "__dict__").update(contents)
        return empty


class SlotsAdapter(ContentAdapter):
    """What the members of a class with `__slots__` hold.

    Args:
        members: these, by name.
    """

    has_names = True

    def __init__(self, members: dict[str, MemberDescriptorType]) -> None:
        super().__init__()
        self._members = members

    def read(self, value: Any) -> Any:
        """What is in those that hold something."""
        held = {}
        for name, member in self._members.items():
            try:
                held[name] = member.__get__(value)
            except AttributeError:  # nothing is in it
                continue
        return held

    def fill(self, empty: Any, contents: Any) -> Any:
        """The same one."""
        for name, held in contents.items():
            self._members[name].__set__(empty, held)
        return empty


class _SequenceAdapter(ContentAdapter):
    def __init__(self, base: Any, extend: Callable[[Any, Any], None]) -> None:
        super().__init__(base)
        self._extend = extend

    def read(self, value: Any) -> Any:
        return [*self.base.__iter__(value)]

    def fill(self, empty: Any, contents: Any) -> Any:
        self._extend(empty, contents)
        return empty


class _DequeAdapter(_SequenceAdapter):
    def new_empty(self, value: Any, contents: Any) -> Any:
        empty = super().new_empty(value, contents)
        deque.__init__(empty, (), value.maxlen)
        return empty


class _DictAdapter(ContentAdapter):
    def read(self, value: Any) -> Any:
        return dict(self.base.items(value))

    def fill(self, empty: Any, contents: Any) -> Any:
        put = self.base.__setitem__
        for key, held in contents.items():
            put(empty, key, held)
        return empty


class _DefaultDictAdapter(_DictAdapter):
    def new_empty(self, value: Any, contents: Any) -> Any:
        empty = super().new_empty(value, contents)
        defaultdict.__init__(empty, value.default_factory)
        return empty


class ImmutableAdapter(ContentAdapter):
    """What cannot be changed, and may hold what can: a tuple, a method, a partial function.

    What is filled is anything that tells which one it is, and may be filled again.
    """

    def is_unchanged(self, value: Any, contents: Any) -> bool:
        """It always is."""
        return True


class _TupleAdapter(ImmutableAdapter):
    def read(self, value: Any) -> Any:
        return [*tuple.__iter__(value)]

    def new_empty(self, value: Any, contents: Any) -> Any:
        return [type(value)]  # there is one empty tuple only

    def fill(self, empty: Any, contents: Any) -> Any:
        return tuple.__new__(empty[0], contents)


class _MethodAdapter(ImmutableAdapter):
    has_names = True

    def read(self, value: Any) -> Any:
        return {"__self__": value.__self__}

    def new_empty(self, value: Any, contents: Any) -> Any:
        return MethodType(value.__func__, ...)

    def fill(self, empty: Any, contents: Any) -> Any:
        return MethodType(empty.__func__, contents["__self__"])


class _PartialAdapter(ImmutableAdapter):
    has_names = True

    def read(self, value: Any) -> Any:
        return {"func": value.func, "args": value.args, "keywords": value.keywords}

    def new_empty(self, value: Any, contents: Any) -> Any:
        return functools.partial(_nothing)

    def fill(self, empty: Any, contents: Any) -> Any:
        return functools.partial(contents["func"], *contents["args"], **contents["keywords"])


class WeakReferenceAdapter(ImmutableAdapter):
    """A weak reference: it reaches nothing, but where its object was copied, it refers to the copy."""

    def read(self, value: Any) -> Any:
        """The reference itself."""
        return value

    def new_empty(self, value: Any, contents: Any) -> Any:
        """Something that tells which one it is."""
        return [None]

    def fill(self, empty: Any, contents: Any) -> Any:
        """A reference to the copy, or the one that there was."""
        return weakref.ref(contents[0]) if isinstance(contents, list) else contents

    def items(self, contents: Any) -> Iterable[tuple[Any, Any]]:
        """Nothing: what is referred to is not held."""
        return ()

    def replaced(self, contents: Any, replace: Callable[[Any], Any]) -> Any:
        """The copy, if there is one."""
        held = contents[0] if isinstance(contents, list) else contents()
        other = replace(held)
        return contents if other is held else [other]


class _NumbersAdapter(ContentAdapter):
    """What holds no objects, but numbers that may change."""

    def fill(self, empty: Any, contents: Any) -> Any:
        return empty

    def is_unchanged(self, value: Any, contents: Any) -> bool:
        return bool(self.read(value) == contents)

    def items(self, contents: Any) -> Iterable[tuple[Any, Any]]:
        return ()

    def replaced(self, contents: Any, replace: Callable[[Any], Any]) -> Any:
        return contents


class _SetAdapter(_NumbersAdapter):
    # The place of each in the set depends on it, so they stay what they are.

    def read(self, value: Any) -> Any:
        return [*set.__iter__(value)]

    def fill(self, empty: Any, contents: Any) -> Any:
        set.update(empty, contents)
        return empty

    def is_unchanged(self, value: Any, contents: Any) -> bool:
        return ContentAdapter.is_unchanged(self, value, contents)


class _ArrayAdapter(_NumbersAdapter):
    def read(self, value: Any) -> Any:
        return value.copy() if value.nbytes <= _MOST_ARRAY_BYTES and not value.dtype.hasobject else value

    def new_empty(self, value: Any, contents: Any) -> Any:
        return contents.copy() if contents is not value else value

    def is_unchanged(self, value: Any, contents: Any) -> bool:
        return contents is value or bool(
            value.shape == contents.shape and value.tobytes() == contents.tobytes()
        )


class GeneratorAdapter(_NumbersAdapter):
    """Makes random numbers: torch's, Python's or NumPy's; the global ones are ambient state of the call."""

    def read(self, value: Any) -> Any:
        """Its state."""
        return value.get_state() if isinstance(value, torch.Generator) else pickle.dumps(value)

    def new_empty(self, value: Any, contents: Any) -> Any:
        """One in that state."""
        if not isinstance(value, torch.Generator):
            return pickle.loads(contents)
        empty = torch.Generator(value.device)
        empty.set_state(contents)
        return empty

    def is_unchanged(self, value: Any, contents: Any) -> bool:
        """Whether it has drawn nothing since."""
        if not isinstance(contents, Tensor):
            return super().is_unchanged(value, contents)
        with DisableTorchDispatch():  # it is no part of the program
            return torch.equal(self.read(value), contents)

    @staticmethod
    def is_global(value: Any) -> bool:
        """Whether a generator is one that is used where none is given."""
        if isinstance(value, torch.Generator):
            return any(value is one for one in (torch.default_generator, *torch.cuda.default_generators))
        modules = (sys.modules.get("random"), sys.modules.get("numpy.random.mtrand"))
        return any(value is one for module in modules if module for one in vars(module).values())


def _nothing() -> None:
    """Stands for a function."""


ATTRIBUTES_ADAPTER = _AttributesAdapter()
"""Of an object with a `__dict__`."""
_GENERATOR = GeneratorAdapter()
ADAPTERS_BY_BASE: dict[type, tuple[ContentAdapter, ...]] = {
    object: (),
    SimpleNamespace: (_AttributesAdapter(SimpleNamespace),),
    list: (_SequenceAdapter(list, list.extend),),
    tuple: (_TupleAdapter(tuple),),
    deque: (_DequeAdapter(deque, deque.extend),),
    set: (_SetAdapter(set),),
    dict: (_DictAdapter(dict),),
    OrderedDict: (_DictAdapter(OrderedDict),),
    defaultdict: (_DefaultDictAdapter(defaultdict),),
    MethodType: (_MethodAdapter(),),
    functools.partial: (_PartialAdapter(),),
    weakref.ref: (WeakReferenceAdapter(),),
    torch.Generator: (_GENERATOR,),
}
"""By the class of Python's own that others derive from."""
ADAPTERS_BY_NAME: dict[tuple[str, str], tuple[ContentAdapter, ...]] = {
    ("numpy", "ndarray"): (_ArrayAdapter(),),
    ("random", "Random"): (_GENERATOR,),
    ("numpy.random.mtrand", "RandomState"): (_GENERATOR,),
    ("numpy.random._generator", "Generator"): (_GENERATOR,),
}
"""By module and name, of classes that are not imported for this."""
