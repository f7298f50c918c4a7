"""All Python state that a training step can touch, noted, to be set back in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lightning_memtrain.core import is_out_of_memory
from lightning_memtrain.core.random_state import global_random_states
from lightning_memtrain.tracing.user_state.object_traversal import Reach
from lightning_memtrain.tracing.user_state.opaque_snapshots import StateNote
from lightning_memtrain.tracing.user_state.tensor_replacement import replace


class UserState:
    """Everything in Python that a step can change, as it is now, to be set back in place.

    Noted is what can be reached from the roots: attributes (of objects, modules, classes, functions and
    tensors), items, closures, the globals that code names, hooks, gradients, generators of random numbers,
    and those that everybody shares. Objects stay the same objects: what they hold is put back into them.

    Left as they are: generators and iterators over other iterators, the cache of ``functools.lru_cache``,
    files, threads, connections, loggers and experiments, data loaders, data frames, arrays beyond 16 MiB in
    all, and objects that refuse to be read or written. Of a trainer only what is logged, its loop,
    optimizers, precision and the user's callbacks are noted, of a data module its attributes. Techniques that
    gather things in passes go back by themselves, see :func:`~lightning_memtrain.coordination.capture_all`.

    Args:
        *roots: where a step begins: module, optimizers, schedulers, batch, the function that runs it.
        copies: says of which tensors the values are copied, too; by default of none.
        leave: objects that are neither looked into nor set back, since nobody writes to them.

    Example:
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> model.seen = []
        >>> state = UserState(model)
        >>> model.seen.append(1)
        >>> state.restore()
        >>> model.seen
        []
    """

    def __init__(
        self, *roots: Any, copies: Callable[[Tensor], bool] | None = None, leave: Collection[Any] = ()
    ) -> None:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            reach = Reach(roots, leave)
            self._notes, self._tensor_notes = reach.notes, reach.tensors
            self.tensors: tuple[Tensor, ...] = tuple(note.target for note in self._tensor_notes)
            """All tensors within reach, each once."""
            if copies is not None:
                for note in self._tensor_notes:
                    if copies(note.target):
                        note.copy()
            one_on_each_device = {tensor.device: tensor for tensor in self.tensors}
            self._random = global_random_states([*one_on_each_device.values()])

    @property
    def uncopied(self) -> list[Tensor]:
        """The tensors within reach whose values are not kept."""
        return [note.target for note in self._tensor_notes if note.copied is None]

    def copy(self, tensor: Tensor) -> None:
        """Keep the values of a tensor within reach, too, which have not changed so far.

        Args:
            tensor: one of :attr:`tensors`; any other is passed over.
        """
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            for note in self._tensor_notes:
                if note.target is tensor and note.copied is None:
                    note.copy()

    @property
    def num_bytes(self) -> int:
        """What is held in copies of tensors and arrays, in bytes of all devices."""
        arrays = sum(note.num_bytes for note in self._notes if isinstance(note, StateNote))
        return arrays + sum(note.copied_bytes for note in self._tensor_notes)

    def num_bytes_on(self, device: torch.device) -> int:
        """What is held in copies of tensors and arrays on one device.

        Args:
            device: the device; without an index all of its type.

        Returns:
            The bytes.
        """
        there = sum(
            note.copied_bytes
            for note in self._tensor_notes
            if note.copied is not None
            and note.copied.device.type == device.type
            and device.index in (None, note.copied.device.index)
        )
        if device.type != "cpu":
            return there
        return there + sum(note.num_bytes for note in self._notes if isinstance(note, StateNote))

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
