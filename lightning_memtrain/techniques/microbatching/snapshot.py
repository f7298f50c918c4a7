"""What one batch changes before the optimizer steps, kept so that it can be run again from the same state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_memtrain.core import keep_all
from lightning_memtrain.ledger.storages import storages_of, tensors_in
from lightning_memtrain.tracing import UserState

# Copied before every batch without asking whether anybody writes to it.
_SMALL_BYTES = 64 * 1024


class WrittenTensors:
    """Tensors that steps write to in place, although they are neither buffers nor states of metrics.

    They are found while a step is watched, and from then on copied before every batch: weights of a teacher
    that follow the model in ``training_step``, for instance, or a queue of keys.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self.batch = False
        """Whether steps write to the batch itself."""

    def __contains__(self, tensor: object) -> bool:
        reference = self._known.get(id(tensor))
        return reference is not None and reference() is tensor

    def add(self, tensor: Tensor) -> None:
        """Note one more."""
        self._known[id(tensor)] = weakref.ref(tensor)


class BatchSnapshot:
    """Everything that forward and backward of a batch can change, as it is before them.

    All Python state within reach of the model and its trainer, random numbers, buffers, metrics, gradients
    and the loss scaler. Other techniques are told, and go back to what they had gathered. Parameters,
    optimizer state, the batch and large tensors in plain attributes are copied only if steps are known to
    write to them. Gradients are copied only where there are some, that is, amid an accumulation window.

    Args:
        model: the module that is trained.
        grad_scaler: loss scaler of mixed precision, ``None`` without one.
        device: the device on which copies are counted.
        spared: buffers that are not to be set back.
        batch: the batch.
        optimizers: the run's.
        constant: tensors that nobody writes to; they are not counted either.
        written: what steps are known to write to; added to by :meth:`before_write`.
    """

    def __init__(
        self,
        model: nn.Module,
        grad_scaler: Any,
        device: torch.device,
        spared: Iterable[Tensor] = (),
        *,
        batch: Any = None,
        optimizers: Sequence[Optimizer] = (),
        constant: Iterable[Tensor] = (),
        written: WrittenTensors | None = None,
    ) -> None:
        self._device = device
        self._written = WrittenTensors() if written is None else written
        self._batch = {id(tensor) for tensor in tensors_in(batch)}
        self._without_gradient = [p for p in model.parameters() if p.requires_grad and p.grad is None]
        self._others = keep_all()
        self._constant = {id(tensor) for tensor in constant}
        left_out = {id(buffer) for buffer in spared} | self._constant
        self._optimizers = optimizers
        self._state = UserState(
            model,
            batch,
            grad_scaler,
            copies=self._copies(model, left_out),
            leave=[optimizer.state for optimizer in optimizers],  # large, and changed by nobody before a step
        )
        self._uncopied: dict[int, list[tuple[Tensor, int]]] = {}
        for tensor in self._state.uncopied:
            if id(tensor) in left_out:
                continue
            version = -1 if tensor.is_inference() else tensor._version
            for storage in storages_of(tensor):
                self._uncopied.setdefault(storage._cdata, []).append((tensor, version))

    def _copies(self, model: nn.Module, spared: set[int]) -> Callable[[Tensor], bool]:
        metrics = [module for module in model.modules() if isinstance(module, Metric)]
        wanted = {id(buffer) for buffer in model.buffers()}
        wanted.update(id(p.grad) for p in model.parameters() if p.grad is not None)
        wanted.update(id(getattr(metric, name)) for metric in metrics for name in metric._defaults)

        def copies(tensor: Tensor) -> bool:
            if id(tensor) in spared:
                return False
            if id(tensor) in wanted or tensor in self._written:
                return True
            if id(tensor) in self._batch:
                return self._written.batch
            return not isinstance(tensor, nn.Parameter) and tensor.nbytes <= _SMALL_BYTES

        return copies

    def num_bytes(self, amid_window: bool) -> int:
        """What is kept, in bytes of the device.

        Args:
            amid_window: count a copy of all gradients, even if there are none yet.

        Returns:
            The bytes.
        """
        kept = [tensor for one in self._others for tensor in one.tensors]
        kept += self._without_gradient if amid_window else []
        if self._device.type == "cpu":
            kept.append(torch.get_rng_state())
        others = sum(tensor.nbytes for tensor in kept if tensor.device.type == self._device.type)
        return self._state.num_bytes_on(self._device) + others

    @property
    def reachable_bytes(self) -> int:
        """What is within reach on the device, but for gradients, the batch, and what has been logged."""
        gradients = {id(p.grad) for p in self._state.tensors if p.is_leaf and p.grad is not None}
        left_out = gradients | self._batch | self._constant
        storages = {
            storage._cdata: storage.nbytes()
            for tensor in self._state.tensors
            if tensor.device.type == self._device.type and id(tensor) not in left_out
            for storage in storages_of(tensor)
        }
        state = [x for one in self._optimizers for x in tensors_in(list(one.state.values()))]
        in_state = sum(tensor.nbytes for tensor in state if tensor.device.type == self._device.type)
        return in_state + sum(storages.values())

    def before_write(self, tensor: Tensor) -> None:
        """Copy what shares memory with a tensor that is about to be written to, unless it is copied already.

        Args:
            tensor: any tensor.
        """
        for storage in storages_of(tensor):
            for kept, _ in self._uncopied.pop(storage._cdata, ()):
                self._state.copy(kept)
                self._note_written(kept)

    def restore(self) -> None:
        """Set everything back to what it was. May be called several times."""
        for other in self._others:
            other.restore()
        self._state.restore()
        lost = [
            (key, tensor)
            for key, kept in self._uncopied.items()
            for tensor, version in kept
            if version >= 0 and tensor._version != version
        ]
        for key, tensor in lost:
            self._uncopied.pop(key, None)
            self._note_written(tensor)
            rank_zero_warn(
                "`Microbatching` runs a batch again in which a tensor was written to in place for the first "
                f"time, of shape {tuple(tensor.shape)}: this cannot be taken back. From here on it is copied "
                "before every batch."
            )

    def _note_written(self, tensor: Tensor) -> None:
        if id(tensor) in self._batch:
            self._written.batch = True
        else:
            self._written.add(tensor)
