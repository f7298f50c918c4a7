"""float32 copies of parameters in half precision, which take their places in an optimizer for a while."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.optimizer_steps.optimizer_contents import Holding, holdings, optimizers_in


class StandIns:
    """Makes a stand-in for each parameter, and fills it with numbers while it is in use.

    A parameter keeps the same one, so that what an optimizer has put down under it is found again.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def of(self, parameter: Tensor) -> nn.Parameter:
        """The stand-in of a parameter, as it is.

        Args:
            parameter: in half precision.

        Returns:
            Always the same one.
        """
        known, made = self._made.get(id(parameter), (None, None))
        if made is None or known is not parameter:
            made = nn.Parameter(parameter.new_empty(0, dtype=torch.float32))
            self._made[id(parameter)] = parameter, made
        return made

    def filled(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[nn.Parameter]:
        """The stand-ins of some parameters, with their numbers and their gradients as float32.

        On each device the numbers lie in a row, one behind the other, so that they can be rounded at once.

        Args:
            pairs: parameters in half precision with their gradients.

        Returns:
            The stand-ins, with what others have written on the parameters.
        """
        by_device: dict[torch.device, list[Tensor]] = {}
        for parameter, _ in pairs:
            by_device.setdefault(parameter.device, []).append(parameter.detach())
        numbers = {device: iter(_in_a_row(here)) for device, here in by_device.items()}
        stand_ins = []
        for parameter, gradient in pairs:
            made = self.of(parameter)
            made.data = next(numbers[parameter.device])
            made.requires_grad_(parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            made.grad = gradient.float()
            stand_ins.append(made)
        return stand_ins

    @staticmethod
    def empty(stand_ins: Iterable[nn.Parameter]) -> None:
        """Let go of the numbers.

        Args:
            stand_ins: filled ones.
        """
        for stand_in in stand_ins:
            stand_in.grad = None
            stand_in.data = stand_in.data.new_empty(0)


def in_rows(stand_ins: Sequence[Tensor]) -> Iterator[Tensor]:
    """The numbers of stand-ins, those that lie one behind the other as one tensor.

    Args:
        stand_ins: filled; an optimizer may have given some other memory.

    Yields:
        Tensors of one axis, in the order of memory, that share it with the stand-ins.
    """
    start, end = 0, 0
    row: Tensor | None = None
    for stand_in in stand_ins:
        own, first = stand_in.data, int(stand_in.data.storage_offset())
        follows = (
            row is not None and own.untyped_storage()._cdata == row.untyped_storage()._cdata and first == end
        )
        if not follows:
            if row is not None:
                yield row.as_strided((end - start,), (1,), start)
            row, start = own, first
        end = first + own.numel()
    if row is not None:
        yield row.as_strided((end - start,), (1,), start)


def _in_a_row(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Copies in float32, one behind the other."""
    numels = [parameter.numel() for parameter in parameters]
    row = parameters[0].new_empty(sum(numels), dtype=torch.float32)
    copies = [_shaped_as(*pair) for pair in zip(parameters, torch.split(row, numels), strict=True)]
    torch._foreach_copy_(copies, list(parameters))
    return copies


def _shaped_as(parameter: Tensor, part: Tensor) -> Tensor:
    """Memory in the shape and with the strides that a copy of a parameter has."""
    if parameter.is_contiguous():
        return part.view(parameter.shape)
    strides = torch.empty_like(parameter, device="meta").stride()
    return part.as_strided(parameter.shape, strides)


class ParameterPlaces:
    """Where an optimizer, and those inside of it, keep their parameters.

    Args:
        optimizer: any.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._of = optimizer.param_groups, optimizer.state
        inner = optimizers_in(optimizer)
        known = {id(p) for one in inner for group in one.param_groups for p in group["params"]}
        self._places: dict[int, list[tuple[Any, Any]]] = {number: [] for number in known}
        self.keyed: list[Any] = [one.state for one in inner]
        """Dictionaries and sets that have parameters for keys."""
        for holding in holdings(optimizer):
            self._look_at(holding)

    def are_of(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer still has its groups and state in the same places, which loading changes."""
        return optimizer.param_groups is self._of[0] and optimizer.state is self._of[1]

    def _look_at(self, holding: Holding) -> None:
        holder = holding.holder
        if isinstance(holder, set):
            if any(id(value) in self._places for value in holder):
                self.keyed.append(holder)
            return
        if isinstance(holder, MutableMapping) and any(isinstance(key, Tensor) for key in holder):
            self.keyed += [] if any(holder is known for known in self.keyed) else [holder]
        if isinstance(holder, (tuple, frozenset)):
            return  # found where it is kept
        for key, value in holding.items:
            for found in _tensors_of(value):
                if id(found) in self._places:
                    self._places[id(found)].append((holder, key))

    def exchange(self, parameter: Tensor, old: Tensor, new: Tensor) -> None:
        """Put one tensor into all places of another.

        Args:
            parameter: whose places; what is there now is it or its stand-in.
            old: what is there.
            new: what is to be there.
        """
        for holder, key in self._places[id(parameter)]:
            if isinstance(holder, (MutableMapping, list, deque)):
                holder[key] = _exchanged(holder[key], old, new)
            else:
                object.__setattr__(holder, key, _exchanged(getattr(holder, key), old, new))
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


def _exchanged(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, tuple):
        parts = [_exchanged(part, old, new) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
