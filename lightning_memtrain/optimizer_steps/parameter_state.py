"""What an optimizer keeps of some parameters, to be put back."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.optimizer_steps.parameter_references import ParameterReferences


class ParameterState:
    """What an optimizer keeps of some parameters, at one moment.

    The opposite of :class:`~lightning_memtrain.optimizer_steps.SharedState`.

    Args:
        optimizer: any.
        parameters: of any shapes and dtypes; those of which it keeps nothing do no harm.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.Adam([weight])
        >>> before = ParameterState(optimizer, [weight])
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> before.restore(), len(optimizer.state)
        (True, 0)
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        self._optimizer = optimizer
        self._parameters = list(parameters)
        try:
            self._kept: dict[int, dict[Tensor, Any]] | None = {
                id(keyed): {key: copy.deepcopy(keyed[key]) for key in self._parameters if key in keyed}
                for keyed in ParameterReferences(optimizer).keyed
                if not isinstance(keyed, set)
            }
        except Exception:  # whatever a class of tensors, or of the user's, does not allow
            self._kept = None

    def restore(self) -> bool:
        """Put it back; whether that was possible."""
        if self._kept is None:
            return False
        for keyed in ParameterReferences(self._optimizer).keyed:
            for key in [key for key in self._parameters if key in keyed and not isinstance(keyed, set)]:
                del keyed[key]
            keyed.update(self._kept.get(id(keyed), {}))
        return True
