"""Objects whose contents are no Python objects: random generators, arrays, weak collections."""

from __future__ import annotations

import array
import functools
import random
import sys
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from operator import is_
from typing import Any

import torch

from lightning_memtrain.core.units import MIB
from lightning_memtrain.tracing.user_state.object_snapshots import ABSENT

MOST_ARRAY_BYTES = 16 * MIB
"""Arrays of NumPy and Python are copied up to so many bytes in all; others are left as they are."""


class OpaqueSnapshot:
    """The state of an object that gives and takes it.

    Args:
        state: what it gave.
        put: takes it.
        num_bytes: what the state holds.
        held: objects in it that can change themselves.
    """

    __slots__ = ("_put", "_state", "held", "num_bytes")

    def __init__(
        self, state: Any, put: Callable[[Any], Any], num_bytes: int = 0, held: Sequence[Any] = ()
    ) -> None:
        self._state = state
        self._put = put
        self.num_bytes = num_bytes
        self.held = held

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        self._put(self._state)


class WeakSnapshot:
    """What is alive in a collection of weak references; it is kept alive to be put back.

    Args:
        target: the collection.
    """

    __slots__ = ("_items", "_target")

    def __init__(self, target: Any) -> None:
        self._target = target
        self._items = self._now()

    @property
    def held(self) -> list[Any]:
        """All keys and values."""
        return [one for item in self._items for one in item]

    def _now(self) -> list[tuple[Any, ...]]:
        if isinstance(self._target, weakref.WeakSet):
            return [(item,) for item in weakref.WeakSet.__iter__(self._target)]
        return [*type(self._target).items(self._target)]

    def restore(self) -> None:
        """Put back what was held; may be called several times."""
        now = [one for item in self._now() for one in item]
        if len(now) == len(self.held) and all(map(is_, now, self.held)):
            return
        target = self._target
        target.clear()
        for item in self._items:
            target.add(*item) if len(item) == 1 else target.__setitem__(*item)


WEAK: tuple[type, ...] = (weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet)


def opaque_snapshot(target: Any, mro: tuple[type, ...], most_bytes: int) -> OpaqueSnapshot | None:
    """Note the state of an object.

    Args:
        target: a generator of random numbers of torch, Python or NumPy, a context variable, or an array.
        mro: its class and the bases.
        most_bytes: arrays that are larger are left out.

    Returns:
        Its snapshot; ``None`` if there is nothing to snapshot.
    """
    if torch.Generator in mro:
        return OpaqueSnapshot(target.get_state(), target.set_state)
    if random.Random in mro:
        put = random.Random.setstate
        return OpaqueSnapshot(random.Random.getstate(target), lambda state: put(target, state))
    if ContextVar in mro:
        value = target.get(ABSENT)
        # One without a value cannot lose it again.
        if value is ABSENT:
            return None
        return OpaqueSnapshot(value, lambda value: _set_variable(target, value), held=[value])
    if array.array in mro:
        if memoryview(target).nbytes > most_bytes:
            return None
        numbers = array.array.__getitem__(target, slice(None))
        put_numbers = functools.partial(array.array.__setitem__, target, slice(None))
        return OpaqueSnapshot(numbers, put_numbers, memoryview(numbers).nbytes)
    if bytearray in mro:
        if bytearray.__len__(target) > most_bytes:
            return None
        put_bytes = functools.partial(bytearray.__setitem__, target, slice(None))
        return OpaqueSnapshot(bytes(target), put_bytes, bytearray.__len__(target))
    return _numpy_state(target, mro, most_bytes)


def _set_variable(target: ContextVar[Any], value: Any) -> None:
    if target.get(ABSENT) is not value:
        target.set(value)


def _numpy_state(target: Any, mro: tuple[type, ...], most_bytes: int) -> OpaqueSnapshot | None:
    numpy = sys.modules["numpy"]
    if numpy.random.RandomState in mro:
        return OpaqueSnapshot(target.get_state(legacy=False), target.set_state)
    if numpy.random.Generator in mro or numpy.random.BitGenerator in mro:
        source = target.bit_generator if numpy.random.Generator in mro else target
        return OpaqueSnapshot(source.state, lambda state: setattr(source, "state", state))
    plain = numpy.ndarray.view(target, numpy.ndarray)
    if plain.nbytes > most_bytes or not plain.flags.writeable or numpy.memmap in mro:
        return None
    held = plain.ravel().tolist() if plain.dtype.hasobject else ()
    return OpaqueSnapshot(plain.copy(), lambda values: numpy.copyto(plain, values), plain.nbytes, held)


def has_opaque_state(mro: tuple[type, ...]) -> bool:
    """Whether :func:`opaque_snapshot` knows instances of a class.

    Args:
        mro: the class and its bases.

    Returns:
        Whether it does.
    """
    known: tuple[type, ...] = (torch.Generator, random.Random, ContextVar, array.array, bytearray)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        of_random = numpy.random
        known += (numpy.ndarray, of_random.RandomState, of_random.Generator, of_random.BitGenerator)
    return any(base in known for base in mro)
