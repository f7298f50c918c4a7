"""Where an optimizer refers to its parameters, so that others can take their places for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.optimizer_steps.optimizer_contents import Container, containers_in, optimizers_in


class ParameterReferences:
    """Where an optimizer, and those inside of it, refer to their parameters.

    Args:
        optimizer: any.

    Example:
        >>> import torch
        >>> old, new = (torch.nn.Parameter(torch.full((1,), value)) for value in (1.0, 2.0))
        >>> optimizer = torch.optim.SGD([old], lr=0.5)
        >>> ParameterReferences(optimizer).replace(old, old, new)
        >>> optimizer.param_groups[0]["params"][0] is new
        True
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._of = optimizer.param_groups, optimizer.state
        inner = optimizers_in(optimizer)
        known = {id(p) for one in inner for group in one.param_groups for p in group["params"]}
        # By parameter: containers, and the keys, indices or attributes under which they have it.
        self._references: dict[int, list[tuple[Any, Any]]] = {number: [] for number in known}
        self.keyed: list[Any] = [one.state for one in inner]
        """Dictionaries and sets that have parameters for keys."""
        for container in containers_in(optimizer):
            self._look_at(container)

    def are_of(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer still has the same groups and state, which loading changes."""
        return optimizer.param_groups is self._of[0] and optimizer.state is self._of[1]

    def _look_at(self, container: Container) -> None:
        value = container.value
        if isinstance(value, set):
            if any(id(item) in self._references for item in value):
                self.keyed.append(value)
            return
        if isinstance(value, MutableMapping) and any(isinstance(key, Tensor) for key in value):
            self.keyed += [] if any(value is known for known in self.keyed) else [value]
        if isinstance(value, (tuple, frozenset)):
            return  # found where it is kept
        for key, item in container.items:
            for found in _tensors_of(item):
                if id(found) in self._references:
                    self._references[id(found)].append((value, key))

    def replace(self, parameter: Tensor, old: Tensor, new: Tensor) -> None:
        """Let all references to one tensor be to another one.

        Args:
            parameter: whose references are meant; of any shape and dtype.
            old: what they refer to: the parameter, or what has replaced it.
            new: what they are to refer to; of any shape and dtype.
        """
        for container, key in self._references[id(parameter)]:
            if isinstance(container, (MutableMapping, list, deque)):
                container[key] = _replaced(container[key], old, new)
            else:
                object.__setattr__(container, key, _replaced(getattr(container, key), old, new))
        for keyed in self.keyed:
            if old in keyed:
                if isinstance(keyed, set):
                    keyed.remove(old)
                    keyed.add(new)
                else:
                    keyed[new] = keyed.pop(old)


def _tensors_of(value: Any) -> Iterator[Tensor]:
    """A tensor, and those in tuples, which can only be replaced as a whole."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors_of(part)


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, tuple):
        parts = [_replaced(part, old, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
