"""Methods of tensors that ask for values without an operator: `numpy()`, `format()`, `torch.tensor([...])`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from lightning_memtrain.tracing.questions import Answers

_TO_ARRAYS = {
    Tensor.numpy: "Tensor.numpy",
    Tensor.__array__: "Tensor.__array__",
    Tensor.tolist: "Tensor.tolist",
}
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)


class TwinMethods(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Answers them for tensors without data from what a step with data answered.

    Args:
        answers: of that step.
        knows: whether a tensor's values are known.
    """

    def __init__(self, answers: Answers, knows: Callable[[Any], bool]) -> None:
        super().__init__()
        self._answers = answers
        self._knows = knows

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _TO_ARRAYS.get(func)
        if name is not None:
            if not self._knows(args[0]):
                return copy.deepcopy(self._answers.next(name))
            self._answers.pass_by(name)
        elif func is Tensor.__format__ and not self._knows(args[0]) and args[0].dim() == 0:
            return format(args[0].item(), *args[1:])
        elif func in _FROM_VALUES:
            args = tuple(
                _with_numbers(value) if isinstance(value, (list, tuple)) else value for value in args
            )
        return func(*args, **kwargs)


def _with_numbers(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        return value.tolist()
    return [_with_numbers(one) for one in value] if isinstance(value, (list, tuple)) else value


class RecordingMethods(TorchFunctionMode):  # type: ignore[no-untyped-call]
    """Notes what they give in a step with data.

    Args:
        answers: where to note it.
    """

    def __init__(self, answers: Answers) -> None:
        super().__init__()
        self._answers = answers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TO_ARRAYS:
            self._answers.add(_TO_ARRAYS[func], copy.deepcopy(result))
        return result
