"""What lives on beside the steps of a fit, looked for again only where there may be more of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memtrain.compat.torch_private import storage_key
from lightning_memtrain.core.devices.device_memory import allocated_device_bytes
from lightning_memtrain.ledger.tensors.storages import storages_of
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors


class HeldBeside:
    """The tensors that module, trainer and callbacks hold from step to step.

    Where the device counts what is allocated, they are looked for again only if that is more than ever
    before; elsewhere in each step, which takes about two milliseconds for 400 modules.

    Args:
        trainer: fits.
        model: its module.
    """

    def __init__(self, trainer: Trainer, model: LightningModule) -> None:
        self._trainer = trainer
        self._model = model
        self._device = trainer.strategy.root_device
        self._search = HeldTensors()
        self._num_bytes = 0
        self._most_allocated_bytes = -1

    def tensors(self) -> list[Tensor]:
        """All of them, parameters and buffers among them."""
        return self._search.beside_steps(self._trainer, self._model)

    def num_bytes(self, batch: Iterable[Tensor]) -> int:
        """What they hold on the device, parameters and buffers included.

        Args:
            batch: tensors of any shape and dtype that do not count.

        Returns:
            The bytes.
        """
        allocated_bytes = allocated_device_bytes(self._device)
        if allocated_bytes is None or allocated_bytes > self._most_allocated_bytes:
            self._num_bytes = self._bytes_of(self.tensors(), batch)
            self._most_allocated_bytes = -1 if allocated_bytes is None else allocated_bytes
        return self._num_bytes

    def num_bytes_beside_model(self, batch: Iterable[Tensor]) -> int:
        """What they hold on the device without parameters and buffers, such as copies of weights.

        Args:
            batch: tensors of any shape and dtype that do not count.

        Returns:
            The bytes.
        """
        return self.num_bytes([*batch, *self._model.parameters(), *self._model.buffers()])

    def _bytes_of(self, tensors: Iterable[Tensor], batch: Iterable[Tensor]) -> int:
        found: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            if tensor.device == self._device:
                found.update((storage_key(storage), storage) for storage in storages_of(tensor))
        for tensor in batch:
            for storage in storages_of(tensor):
                found.pop(storage_key(storage), None)
        return sum(storage.nbytes() for storage in found.values())
