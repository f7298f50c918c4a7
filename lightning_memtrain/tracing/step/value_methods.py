"""Methods that ask for values without an operator: `numpy()`, `format()`, `torch.tensor([...])`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_memtrain.tracing.step.recorded_values import RecordedValues

_TO_ARRAYS: dict[Any, str] = {Tensor.numpy: "Tensor.numpy", Tensor.__array__: "Tensor.__array__"}
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
_NUMBER = str(torch.ops.aten._local_scalar_dense.default)


class FakeValueMethods(TorchFunctionMode):
    """Answers these methods for tensors without data from what a step with data answered.

    Args:
        recorded: of that step.
        knows: whether a tensor's values are known.
    """

    def __init__(self, recorded: RecordedValues, knows: Callable[[Any], bool]) -> None:
        super().__init__()
        self._recorded = recorded
        self._knows = knows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _TO_ARRAYS.get(func)
        if name is not None:
            if not self._knows(args[0]):
                return copy.deepcopy(self._recorded.replay(name))
            self._recorded.skip(name)
        elif func is Tensor.tolist:  # of a tensor with data: others ask for number after number
            for _ in range(args[0].numel()):
                self._recorded.skip(_NUMBER)
        elif func is Tensor.__format__ and not self._knows(args[0]) and args[0].dim() == 0:
            return format(args[0].item(), *args[1:])
        elif func in _FROM_VALUES:
            args = _with_numbers(args)
        return func(*args, **kwargs)


class RecordingMethods(TorchFunctionMode):
    """Notes what they give in a step with data.

    Args:
        recorded: where to note it.
    """

    def __init__(self, recorded: RecordedValues) -> None:
        super().__init__()
        self._recorded = recorded

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FROM_VALUES:
            args = _with_numbers(args, self._note)
        result = func(*args, **(kwargs or {}))
        if func in _TO_ARRAYS:
            self._recorded.record(_TO_ARRAYS[func], copy.deepcopy(result))
        elif func is Tensor.tolist:
            self._note(result)
        return result

    def _note(self, numbers: Any) -> None:
        for number in numbers if isinstance(numbers, list) else [numbers]:
            if isinstance(number, list):
                self._note(number)
            else:
                self._recorded.record(_NUMBER, number)


def _with_numbers(args: tuple[Any, ...], note: Callable[[Any], Any] = id) -> tuple[Any, ...]:
    """Lists of tensors as lists of numbers, so that each is asked for."""

    def numbers(value: Any) -> Any:
        if isinstance(value, Tensor):
            found = value.tolist()
            note(found)
            return found
        return [numbers(one) for one in value] if isinstance(value, (list, tuple)) else value

    return tuple(numbers(value) if isinstance(value, (list, tuple)) else value for value in args)
