"""All Python state that a training step can touch, noted, to be set back in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_memtrain.core import is_out_of_memory
from lightning_memtrain.tracing.random_state import global_random_states
from lightning_memtrain.tracing.reach import Reach
from lightning_memtrain.tracing.replace import replace


class UserState:
    """Everything in Python that a step can change, as it is now, to be set back in place.

    Args:
        *roots: where a step begins: the module, optimizers, schedulers, the batch, the function that runs it.
        copies: says of which tensors the values are copied, too; by default of none.
    """

    def __init__(self, *roots: Any, copies: Callable[[Tensor], bool] | None = None) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            reach = Reach(roots)
            self._notes = reach.notes
            self._tensor_notes = reach.tensors
            self.tensors: tuple[Tensor, ...] = tuple(note.target for note in reach.tensors)
            """All tensors within reach, each once."""
            if copies is not None:
                for note in self._tensor_notes:
                    if copies(note.target):
                        note.copy()
            one_on_each_device = {tensor.device: tensor for tensor in self.tensors}
            self._random = global_random_states([*one_on_each_device.values()])

    @property
    def num_bytes(self) -> int:
        """What is held in copies, in bytes of all devices."""
        return sum(copied.nbytes for copied in self._copied())

    def num_bytes_on(self, device: torch.device) -> int:
        """What is held in copies on one device.

        Args:
            device: the device; without an index all of its type.

        Returns:
            The bytes.
        """
        return sum(
            copied.nbytes
            for copied in self._copied()
            if copied.device.type == device.type and device.index in (None, copied.device.index)
        )

    def _copied(self) -> list[Tensor]:
        return [note.copied for note in self._tensor_notes if note.copied is not None]

    def replace(self, others: Mapping[int, Tensor]) -> None:
        """Put other tensors in the place of some, wherever these are held, until :meth:`restore`.

        Args:
            others: what to put in the place of a tensor, by its ``id``.
        """
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            replace(self._notes, others)

    def restore(self) -> None:
        """Set everything back; may be called several times, and needs hardly any memory."""
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            for note in (*self._notes, *self._tensor_notes, *self._random):
                try:
                    note.restore()
                except Exception as error:  # what refuses to be written is passed over
                    if is_out_of_memory(error):
                        raise
