"""All Python state that a training step can touch, captured, to be set back in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import DisableTorchFunction, disable_current_modes
from lightning_memtrain.core import is_out_of_memory
from lightning_memtrain.core.random_state import global_random_states
from lightning_memtrain.tracing.user_state.object_traversal import ObjectTraversal
from lightning_memtrain.tracing.user_state.opaque_snapshots import OpaqueSnapshot
from lightning_memtrain.tracing.user_state.tensor_replacement import replace_tensors


class UserState:
    """Everything in Python that a step can change, as it is now, to be set back in place.

    Noted is what can be reached from the roots: attributes (of objects, modules, classes, functions and
    tensors), items, closures, the globals that code names, hooks, gradients, generators of random numbers,
    and those that everybody shares. Objects stay the same objects: what they hold is put back into them.

    Left as they are: generators and iterators over other iterators, the cache of ``functools.lru_cache``,
    files, threads, connections, loggers and experiments, data loaders, data frames, arrays beyond 16 MiB in
    all, and objects that refuse to be read or written. Of a trainer only what is logged, its loop,
    optimizers, precision and the user's callbacks are captured, of a data module its attributes. Techniques
    that gather things in passes go back by themselves, see
    :func:`~lightning_memtrain.coordination.capture_all`.

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
        with disable_current_modes(), DisableTorchFunction():
            traversal = ObjectTraversal(roots, leave)
            self._snapshots, self._tensor_snapshots = traversal.snapshots, traversal.tensors
            self.tensors: tuple[Tensor, ...] = tuple(snapshot.target for snapshot in self._tensor_snapshots)
            """All tensors within reach, each once."""
            if copies is not None:
                for snapshot in self._tensor_snapshots:
                    if copies(snapshot.target):
                        snapshot.copy()
            one_on_each_device = {tensor.device: tensor for tensor in self.tensors}
            self._random = global_random_states([*one_on_each_device.values()])

    @property
    def uncopied(self) -> list[Tensor]:
        """The tensors within reach whose values are not kept."""
        return [snapshot.target for snapshot in self._tensor_snapshots if snapshot.copied is None]

    def copy(self, tensor: Tensor) -> None:
        """Keep the values of a tensor within reach, too, which have not changed so far.

        Args:
            tensor: one of :attr:`tensors`, of any shape and dtype; any other is passed over.
        """
        with disable_current_modes(), DisableTorchFunction():
            for snapshot in self._tensor_snapshots:
                if snapshot.target is tensor and snapshot.copied is None:
                    snapshot.copy()

    @property
    def num_bytes(self) -> int:
        """What is held in copies of tensors and arrays, in bytes of all devices."""
        arrays = sum(
            snapshot.num_bytes for snapshot in self._snapshots if isinstance(snapshot, OpaqueSnapshot)
        )
        return arrays + sum(snapshot.copied_bytes for snapshot in self._tensor_snapshots)

    def num_bytes_on(self, device: torch.device) -> int:
        """What is held in copies of tensors and arrays on one device.

        Args:
            device: the device; without an index all of its type.

        Returns:
            The bytes.
        """
        there = sum(
            snapshot.copied_bytes
            for snapshot in self._tensor_snapshots
            if snapshot.copied is not None
            and snapshot.copied.device.type == device.type
            and device.index in (None, snapshot.copied.device.index)
        )
        if device.type != "cpu":
            return there
        return there + sum(
            snapshot.num_bytes for snapshot in self._snapshots if isinstance(snapshot, OpaqueSnapshot)
        )

    def replace(self, others: Mapping[int, Tensor]) -> None:
        """Put other tensors in the place of some, wherever these are held, until :meth:`restore`.

        Args:
            others: what to put in the place of a tensor, by its ``id``; of any shape and dtype.
        """
        with disable_current_modes(), DisableTorchFunction():
            replace_tensors(self._snapshots, others)

    def restore(self) -> None:
        """Set everything back; may be called several times, and needs hardly any memory."""
        with disable_current_modes(), DisableTorchFunction(), torch.no_grad():
            for snapshot in (*self._snapshots, *self._tensor_snapshots, *self._random):
                try:
                    snapshot.restore()
                except Exception as error:  # what refuses to be written is passed over
                    if is_out_of_memory(error):
                        raise
