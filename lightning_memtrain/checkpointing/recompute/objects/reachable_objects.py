"""Python objects within reach of a call, as they are before it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import cache, cached_property
from typing import Any, NamedTuple

from torch import Tensor

from lightning_memtrain.checkpointing.recompute.objects.adapter_lookup import adapters_of
from lightning_memtrain.checkpointing.recompute.objects.content_adapters import (
    ContentAdapter,
    GeneratorAdapter,
    ImmutableAdapter,
    WeakReferenceAdapter,
)
from lightning_memtrain.checkpointing.recompute.objects.key_value_caches import CacheLayers

# What is nearest; what reaches more is an application rather than a statistic.
_MOST_OBJECTS = 2000
_MOST_STEPS = 100
_MOST_COMPARISONS = 10_000


class ObjectPath(NamedTuple):
    """Where something is that an argument or an attribute holds.

    Args:
        root: place of the argument, or the attribute of a module.
        path: attributes from there, and ``None`` for any item: a forward treats all of a list alike.
    """

    root: Hashable
    path: tuple[str | None, ...]

    def __str__(self) -> str:
        return "".join("[...]" if step is None else f".{step}" for step in self.path)


class ObjectContents(NamedTuple):
    """What an object held before a call, in one of its ways to hold something.

    Args:
        value: the object.
        adapter: the way.
        contents: what it held.
    """

    value: Any
    adapter: ContentAdapter
    contents: Any


class ReachableObjects:
    """The objects within reach of a call that it may change without assigning them, and what they hold.

    A forward may count in an object, fill a dictionary that is passed along, or put keys and values into a
    cache. So what is within reach is read before each call, at about a microsecond per object. Modules,
    tensors and functions are not looked into, nor are objects of Python's own library, torch and Lightning.

    Args:
        arguments: what is passed, by place.
        attributes: what modules hold, by attribute.
        layers: which parts of caches are looked into.
    """

    def __init__(
        self, arguments: Mapping[Any, Any], attributes: Mapping[Any, Any], layers: CacheLayers
    ) -> None:
        self.tensors: list[tuple[Any, Tensor]] = []
        """What objects hold, by place; attributes that are tensors themselves, by attribute."""
        self._arguments = arguments
        self._attributes = attributes
        self._layers = layers
        self._by_layer: set[int] = set()
        self._changed: set[int] = set()
        self._num_calls, self._num_looked_at, self._stride = 0, 0, 1
        self._seen: set[int] = set()
        self._found = self._within(arguments) + self._within(attributes)

    def _within(self, roots: Mapping[Any, Any]) -> list[ObjectContents]:
        found: list[ObjectContents] = []
        ahead: deque[tuple[Any, tuple[str | None, ...], Any]] = deque(
            (root, (), value) for root, value in roots.items()
        )
        while ahead and len(found) < _MOST_OBJECTS:
            root, path, value = ahead.popleft()
            if isinstance(value, Tensor):
                self.tensors.append((ObjectPath(root, path) if path else root, value))
                continue
            adapters = adapters_of(type(value))
            if not adapters or id(value) in self._seen or len(path) > _MOST_STEPS:
                continue
            if isinstance(adapters[0], GeneratorAdapter) and adapters[0].is_global(value):
                continue
            self._seen.add(id(value))
            for adapter in adapters:
                contents = adapter.read(value)
                self._by_layer.update(map(id, self._layers.lists_in(value, contents)))
                items = adapter.items(contents)
                if id(value) in self._by_layer and isinstance(contents, list):
                    items = ((index, one) for index, one in items if self._layers.is_own(index))
                inner = [
                    (root, (*path, key if adapter.has_names else None), one)
                    for key, one in items
                    if is_mutable_type(type(one))
                ]
                if (
                    inner
                    or isinstance(adapter, WeakReferenceAdapter)
                    or not isinstance(adapter, ImmutableAdapter)
                ):
                    found.append(ObjectContents(value, adapter, contents))
                    ahead.extend(inner)
        return found

    @property
    def looked_at(self) -> list[Any]:
        """Where the tensors are, and how many attributes there are: what tells one call from another."""
        return [len(self._attributes), *(place for place, _ in self.tensors)]

    def look_for_changes(self) -> None:
        """Note what holds something else just now, though it may not any more in the end.

        A run may end early, in the middle of that. Called before every operator, it looks less often later.
        """
        self._num_calls += 1
        if self._num_calls % self._stride:
            return
        self._num_looked_at += len(self._found)
        if self._num_looked_at > _MOST_COMPARISONS:
            self._num_looked_at, self._stride = 0, 2 * self._stride
        self._changed |= self._changed_now()

    @property
    def changed_for_a_while(self) -> dict[Any, Any]:
        """The attributes within which :meth:`look_for_changes` has found changes."""
        numbers = self.holders_of(self._changed)
        return {attribute: value for attribute, value in self._attributes.items() if id(value) in numbers}

    def roots_changed(self, written: Collection[int], known: Collection[Any]) -> dict[Any, Any]:
        """What a run should not work on itself, since others do, or it would leave traces.

        Args:
            written: numbers of the tensors that the call wrote to.
            known: attributes within which it is known to change something.

        Returns:
            All arguments, by place, and the attributes within which the call has changed something.
        """
        changed = self._changed_now()
        if written:
            changed |= {
                id(one.value)
                for one in self._found
                if any(id(held) in written for _, held in one.adapter.items(one.contents))
            }
        numbers = self.holders_of(changed)
        attributes = {
            attribute: value
            for attribute, value in (self._attributes.items() if changed or known else ())
            if id(value) in numbers or attribute in known
        }
        return {**self._arguments, **attributes}

    def _changed_now(self) -> set[int]:
        return {id(one.value) for one in self._found if not one.adapter.is_unchanged(one.value, one.contents)}

    def holders_of(self, numbers: Collection[int]) -> set[int]:
        """Objects within reach of which there are some others.

        Args:
            numbers: of the others.

        Returns:
            The number of each, and the numbers themselves.
        """
        if not numbers:
            return set()
        around: dict[int, list[int]] = {}
        for one in self._found:
            for _, held in one.adapter.items(one.contents):
                if id(held) in self._seen:
                    around.setdefault(id(held), []).append(id(one.value))
        reaching, ahead = set(numbers), [*numbers]
        while ahead:
            outer = [number for number in around.get(ahead.pop(), ()) if number not in reaching]
            reaching.update(outer)
            ahead += outer
        return reaching

    def replaced(self, one: ObjectContents, replace: Callable[[Any], Any]) -> Any:
        """What an object held, with others in the place of objects and tensors.

        Args:
            one: the object.
            replace: gives what to put in the place of each that was looked into.

        Returns:
            The contents.
        """
        if id(one.value) not in self._by_layer or not isinstance(one.contents, list):
            return one.adapter.replaced(one.contents, replace)
        return [
            replace(held) if self._layers.is_own(index) else self._layers.without_tensors(held)
            for index, held in enumerate(one.contents)
        ]

    def within(self, values: Collection[Any]) -> list[ObjectContents]:
        """What objects reach.

        Args:
            values: the objects.

        Returns:
            Of each object within their reach, what it held.
        """
        found = self._by_number
        reached: dict[int, list[ObjectContents]] = {}
        ahead = [*values]
        while ahead:
            number = id(ahead.pop())
            if number in found and number not in reached:
                reached[number] = found[number]
                ahead += [held for one in found[number] for _, held in one.adapter.items(one.contents)]
        return [one for several in reached.values() for one in several]

    @cached_property
    def _by_number(self) -> dict[int, list[ObjectContents]]:
        found: dict[int, list[ObjectContents]] = {}
        for one in self._found:
            found.setdefault(id(one.value), []).append(one)
        return found


def is_mutable(value: Any) -> bool:
    """Whether something is a tensor or an object that is looked into.

    Args:
        value: anything.

    Returns:
        Whether it is; of what cannot change itself, whether it holds such a thing.
    """
    if not is_mutable_type(type(value)):
        return False
    adapters = adapters_of(type(value))
    if adapters and isinstance(adapters[0], ImmutableAdapter):
        return any(is_mutable_type(type(held)) for _, held in adapters[0].items(adapters[0].read(value)))
    return True


def _is_mutable_type(cls: type) -> bool:
    """Whether objects of a class are looked into, or tensors.

    Args:
        cls: any class.

    Returns:
        Whether they are.
    """
    return issubclass(cls, Tensor) or bool(adapters_of(cls))


is_mutable_type: Callable[[type], bool] = cache(_is_mutable_type)
"""Whether objects of a class are looked into, or tensors."""
