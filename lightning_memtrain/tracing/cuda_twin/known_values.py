"""Values of tensors on the twin that do not depend on weights: masks, lengths, positions, labels."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import FakeTensor, storage_key, tree_leaves, tree_map
from lightning_memtrain.coordination import stands_in
from lightning_memtrain.tracing.inplace_writes import written_tensors

# Larger ones of floating type are not followed: nobody asks for numbers of pictures.
_MOST_FLOAT_BYTES = 2**16
_MOST_BYTES = 2**26


def leaves_of(args: Any, kwargs: Any) -> list[Any]:
    """What an operator was called with, lists taken apart; much faster than for any nesting.

    Args:
        args: its arguments.
        kwargs: its arguments by name.

    Returns:
        Tensors, numbers, and whatever else there is.
    """
    leaves: list[Any] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, (list, tuple)):
            leaves.extend(leaves_of(value, None))
        else:
            leaves.append(value)
    return leaves


class KnownValues:
    """Real tensors on the CPU beside tensors that hold no data, as far as their values are known."""

    def __init__(self) -> None:
        self._real: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        # Of floating type and made up, or made of such: known only while made-up values are asked for.
        self._made_up: set[int] = set()
        self._random = torch.Generator().manual_seed(0)

    def of(self, value: Any) -> Tensor | None:
        """The values of a tensor.

        Args:
            value: a tensor without data; anything else has none.

        Returns:
            A tensor on the CPU of the same shape and dtype; ``None`` if they are not known.
        """
        reference, real = self._real.get(id(value), (None, None))
        if id(value) in self._made_up and not stands_in():
            return None
        return real if reference is not None and reference() is value else None

    def set(self, tensor: Tensor, real: Tensor) -> None:
        """Note the values of a tensor.

        Args:
            tensor: one without data.
            real: on the CPU, of the same shape and dtype.
        """
        if real.nbytes > _most_bytes(real) and not stands_in():
            return
        key = id(tensor)

        def forget(_: Any) -> None:
            self._real.pop(key, None)
            self._made_up.discard(key)

        self._real[key] = weakref.ref(tensor, forget), real
        if stands_in() and real.is_floating_point():
            self._made_up.add(key)

    def forget(self, tensor: Tensor) -> None:
        """Know no more of a tensor, nor of others in its memory.

        Args:
            tensor: one that was written to.
        """
        real = self.of(tensor)
        if real is not None:
            storage = storage_key(real.untyped_storage())
            for key in [k for k, (_, r) in self._real.items() if storage_key(r.untyped_storage()) == storage]:
                del self._real[key]
                self._made_up.discard(key)

    def follow(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Compute the values of an operator's result, if those of all its arguments are known.

        Args:
            func: the operator.
            args: its arguments, tensors without data among them.
            kwargs: its arguments by name.
            result: what it returned on the twin.
        """
        made = [one for one in leaves_of((result,), None) if isinstance(one, Tensor)]
        if not made:
            return
        values = self._values(func, args, kwargs, made)
        if values is None:
            for one in written_tensors(func, args, kwargs):
                self.forget(one)
            return
        for tensor, real in zip(made, values, strict=False):
            if real.shape == tensor.shape and real.dtype is tensor.dtype:
                self.set(tensor, real)

    def _values(self, func: Any, args: Any, kwargs: Any, made: list[Tensor]) -> list[Tensor] | None:
        """What an operator computes, ``None`` where that is not known or not worth it."""
        tensors = [one for one in leaves_of(args, kwargs) if isinstance(one, Tensor)]
        if any(self.real_or_known(one) is None for one in tensors):
            return None
        if any(one.nbytes > _most_bytes(one) for one in made) and not stands_in():
            return None
        try:
            values = self.compute(func, args, kwargs)
        except Exception:  # what the CPU cannot compute is not known
            return None
        return [one for one in tree_leaves(values) if isinstance(one, Tensor)]

    def real_or_known(self, tensor: Tensor) -> Tensor | None:
        """A tensor that has data itself, or its known values, or, if nobody minds, made-up ones."""
        if not isinstance(tensor, FakeTensor):
            return tensor
        known = self.of(tensor)
        if known is None and stands_in():
            known = self._make_up(tensor)
            self.set(tensor, known)
        return known

    def _make_up(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros(tensor.shape, dtype=tensor.dtype)
        return torch.randn(tensor.shape, generator=self._random).to(tensor.dtype)

    def compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator on the known values of its arguments.

        Args:
            func: the operator.
            args: its arguments; the values of all tensors are known.
            kwargs: its arguments by name.

        Returns:
            What it returns, on the CPU.
        """

        def on_cpu(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.real_or_known(value)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        with torch.no_grad():
            return func(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))


def _most_bytes(tensor: Tensor) -> int:
    return _MOST_FLOAT_BYTES if tensor.is_floating_point() else _MOST_BYTES
