"""The tensors of an optimizer's state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """All tensors of an optimizer's state, those in nested containers among them."""
    todo: list[Any] = list(optimizer.state.values())
    while todo:
        value = todo.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, (list, tuple)):
            todo += value
