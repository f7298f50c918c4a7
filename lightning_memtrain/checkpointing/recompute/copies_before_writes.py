"""What the tensors held that a call writes to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import TorchDispatchMode, storage_key
from lightning_memtrain.ledger.tensors.storages import storages_of
from lightning_memtrain.tracing.inplace_writes import version_of, written_tensors


class CopiesBeforeWrites:
    """Keeps a copy of every tensor that a call writes to, as it was before.

    What a call writes to is not known before it has run once. So in its first call a dispatch mode copies
    each tensor right before the first operator that writes to it; those that are only read cost nothing.
    Later calls copy what the first one wrote to.

    Args:
        tensors: what may be written to, of any shape and dtype, with any keys.
        known: keys of what earlier calls wrote to; ``None`` at the first call.
        before_each: called before every operator of the first call.
    """

    def __init__(
        self,
        tensors: Sequence[tuple[Any, Tensor]],
        known: Collection[Hashable] | None,
        before_each: Callable[[], None] | None = None,
    ) -> None:
        self._tensors = tensors
        self._versions = [version_of(tensor) for _, tensor in tensors]
        watched = [tensor for _, tensor in tensors]
        self._watch = CopyBeforeWriteMode(watched, before_each) if known is None else None
        self.before: dict[Any, Tensor] = {}
        """What was written to, as it was before, by key."""
        self.copies: dict[int, Tensor] = {}
        """The same by the number of the tensor."""
        for key, tensor in tensors if known else ():
            if known and key in known and id(tensor) not in self.copies:
                self.copies[id(tensor)] = tensor.detach().clone()
        self.missed: list[Any] = []
        """Keys of what was written to without a copy."""

    @property
    def writes_after_save(self) -> bool:
        """Whether, in a first call, an operator wrote to a tensor after autograd had saved it."""
        return self._watch is not None and self._watch.writes_after_save

    def __enter__(self) -> CopiesBeforeWrites:
        if self._watch is not None:
            self._watch.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._watch is not None:
            self._watch.__exit__(*exc_info)  # type: ignore[no-untyped-call]
            self.copies = self._watch.copies
        for (key, tensor), version in zip(self._tensors, self._versions, strict=True):
            if id(tensor) in self.copies:
                self.before[key] = self.copies[id(tensor)]
            elif version_of(tensor) != version:
                self.missed.append(key)

    def sharing_memory(self) -> list[Any]:
        """Keys of tensors that share memory and are written to, so that copies of each would be apart.

        An argument that is held by an attribute or an object as well has a copy in each of both places.
        """
        written = [(key, tensor) for key, tensor in self._tensors if id(tensor) in self.copies]
        owners: dict[int, set[int]] = {}
        for _, tensor in written:
            for storage in storages_of(tensor):
                owners.setdefault(storage_key(storage), set()).add(id(tensor))
        several = {one for together in owners.values() if len(together) > 1 for one in together}
        arguments = {id(tensor) for key, tensor in written if isinstance(key, int)}
        several |= {id(tensor) for key, tensor in written if not isinstance(key, int)} & arguments
        return [key for key, tensor in written if id(tensor) in several]


class CopyBeforeWriteMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies tensors right before they are written to.

    Args:
        tensors: which, of any shape and dtype; without any, everything runs as under a watch, and nothing
            else happens.
        before_each: called before every operator.
    """

    def __init__(
        self, tensors: Collection[Tensor] = (), before_each: Callable[[], None] | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.copies: dict[int, Tensor] = {}
        """What was written to as it was before, by ``id``."""
        self.writes_after_save = False
        """Whether an operator wrote to a tensor after autograd had saved it."""
        self._before_each = before_each
        self._watched: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            for storage in storages_of(tensor):
                self._watched.setdefault(storage_key(storage), []).append(tensor)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile functions meanwhile."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._before_each is not None:
            self._before_each()
        self.writes_after_save |= func is torch.ops.aten.rrelu_with_noise.default  # alone in this
        for tensor in written_tensors(func, args, kwargs) if self._watched else ():
            for storage in storages_of(tensor):  # a write through any view of it counts
                for watched in self._watched.pop(storage_key(storage), ()):
                    if id(watched) not in self.copies:
                        self.copies[id(watched)] = watched.detach().clone()
        return func(*args, **kwargs)
