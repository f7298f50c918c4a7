"""What operators write to, and tensors that were there before, given back what they held."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import schema_of, storage_key, version_counter
from lightning_memtrain.ledger.tensors.storages import storages_of, tensors_in


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to; those of inference mode do not count.

    Args:
        tensor: of any shape and dtype.

    Returns:
        Its version, 0 if it has none.
    """
    try:
        return version_counter(tensor)
    except RuntimeError:
        return 0


@cache
def written_arguments(func: Callable[..., Any]) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes to.

    Args:
        func: an operator.

    Returns:
        A pair for each of them.
    """
    schema = schema_of(func)
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(schema.arguments if schema is not None else ())
        # Batch normalisation writes to its running statistics and does not say so.
        if argument.name in ("running_mean", "running_var")
        or (argument.alias_info is not None and argument.alias_info.is_write)
    )


def written_tensors(func: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a call of an operator writes to.

    Args:
        func: the operator.
        args: its arguments.
        kwargs: its arguments by name.

    Yields:
        Each of them.
    """
    for position, name in written_arguments(func):
        if name in kwargs:
            yield from tensors_in(kwargs[name])
        elif position < len(args):
            yield from tensors_in(args[position])


@cache
def returns_views(func: Callable[..., Any]) -> bool:
    """Whether an operator reads nothing: it only looks at a tensor in another form.

    Args:
        func: an operator.

    Returns:
        Whether what it returns shares memory with an argument that it does not write to.
    """
    returns = getattr(schema_of(func), "returns", ())
    aliases = [value.alias_info for value in returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


class CopyOnWrite:
    """Copies what operators write to, if it was there before the guard, right before they do."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._own: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def before(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Copy what a call will write to.

        Args:
            func: an operator, about to run.
            args: its arguments.
            kwargs: its arguments by name.
        """
        for tensor in written_tensors(func, args, kwargs):
            for storage in storages_of(tensor):
                key = storage_key(storage)
                if key not in self._own and key not in self._before:
                    self._before[key] = storage, storage.clone()  # type: ignore[no-untyped-call]

    def after(self, func: Callable[..., Any], result: Any) -> None:
        """Note what a call has made.

        Args:
            func: an operator that has run.
            result: what it returned.
        """
        if any(value.alias_info is not None for value in schema_of(func).returns):
            return
        for tensor in tensors_in(result):
            for storage in storages_of(tensor):
                key = storage_key(storage)
                if key not in self._before:
                    self._own[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, reference: Any) -> None:
        self._own.pop(key, None)

    def restore_written(self) -> None:
        """Give everything back what it held; may be called several times."""
        for storage, held in self._before.values():
            if storage.nbytes() != held.nbytes():
                storage.resize_(held.nbytes())
            storage.copy_(held)
