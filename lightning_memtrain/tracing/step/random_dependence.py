"""Whether the course of a step depends on random numbers, as with layers that are left out at random."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.tracing.step.recorded_values import needs_data


class RandomDependence:
    """Follows random numbers through operators on tensors with data, up to where a program asks for them."""

    def __init__(self) -> None:
        self.was_asked_for = False
        """Whether a program asked for one."""
        self._random: dict[int, weakref.ref[Tensor]] = {}

    def follow(self, func: Any, args: Any, result: Any) -> None:
        """Note a call of an operator.

        Args:
            func: the operator.
            args: its arguments.
            result: what it returned.
        """
        is_random = torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())
        if not is_random and not (self._random and any(map(self._is_random, tensors_in(args)))):
            return
        if needs_data(func):
            self.was_asked_for = True
        for tensor in tensors_in(result):
            self._random[id(tensor)] = weakref.ref(tensor, partial(self._forget, id(tensor)))

    def _forget(self, key: int, reference: Any) -> None:
        self._random.pop(key, None)

    def _is_random(self, tensor: Tensor) -> bool:
        reference = self._random.get(id(tensor))
        return reference is not None and reference() is tensor
