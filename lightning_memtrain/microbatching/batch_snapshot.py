"""What one batch changes before the optimizer steps, kept so that it can be run again from the same state."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_memtrain.compat.torch_private import storage_key, version_counter
from lightning_memtrain.coordination import capture_all
from lightning_memtrain.core import is_out_of_memory
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.tensors.storages import storages_of, tensors_in
from lightning_memtrain.tracing import UserState

# Copied before every batch without asking whether anybody writes to them: counters, sums, and the like.
_SMALL_BYTES = 4 * 1024
_MOST_SMALL_BYTES = 1024 * 1024


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
        """Note one more.

        Args:
            tensor: of any shape and dtype; it is not kept alive.
        """
        self._known[id(tensor)] = weakref.ref(tensor)


class BatchSnapshot:
    """Everything that forward and backward of a batch can change, as it is before them.

    All Python state within reach of the model and its trainer, random numbers, buffers, metrics, gradients
    and the loss scaler. Other techniques are told, and go back to what they had gathered. Parameters, the
    batch and larger tensors in plain attributes are copied only if steps are known to write to them.
    Gradients are copied only where there are some, that is, amid an accumulation window.

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
        self._model = model
        self._device = device
        self._written = WrittenTensors() if written is None else written
        self._batch = {id(tensor) for tensor in tensors_in(batch)}
        self._without_gradient = [p for p in model.parameters() if p.requires_grad and p.grad is None]
        self._others = capture_all()
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
            version = -1 if tensor.is_inference() else version_counter(tensor)
            for storage in storages_of(tensor):
                self._uncopied.setdefault(storage_key(storage), []).append((tensor, version))

    def _copies(self, model: nn.Module, spared: set[int]) -> Callable[[Tensor], bool]:
        metrics = [module for module in model.modules() if isinstance(module, Metric)]
        wanted = {id(buffer) for buffer in model.buffers()}
        wanted.update(id(p.grad) for p in model.parameters() if p.grad is not None)
        wanted.update(id(getattr(metric, name)) for metric in metrics for name in metric._defaults)
        small_bytes = 0

        def copies(tensor: Tensor) -> bool:
            nonlocal small_bytes
            if id(tensor) in spared:
                return False
            if id(tensor) in wanted or tensor in self._written:
                return True
            if id(tensor) in self._batch:
                return self._written.batch
            if isinstance(tensor, nn.Parameter) or tensor.nbytes > _SMALL_BYTES:
                return False
            small_bytes += tensor.nbytes
            return small_bytes <= _MOST_SMALL_BYTES

        return copies

    def num_bytes(self, accumulating: bool) -> int:
        """What is kept, in bytes of the device.

        Args:
            accumulating: count a copy of all gradients, even if there are none yet.

        Returns:
            The bytes.
        """
        kept = [tensor for one in self._others for tensor in one.tensors]
        kept += self._without_gradient if accumulating else []
        if self._device.type == "cpu":
            kept.append(torch.get_rng_state())
        others = sum(tensor.nbytes for tensor in kept if tensor.device.type == self._device.type)
        return self._state.num_bytes_on(self._device) + others

    @property
    def reachable_bytes(self) -> int:
        """What is within reach on the device, but for gradients, the batch, and what has been logged."""
        return self._bytes_of(self._reachable()) + self._bytes_of(
            tensor for one in self._optimizers for tensor in tensors_in(list(one.state.values()))
        )

    def bytes_unknown_to(self, ledger: MemoryLedger) -> int:
        """The part of it that a ledger does not count, since no operator has shown it.

        Args:
            ledger: knows training state, the batch and what operators have had to do with.

        Returns:
            The bytes.
        """
        return self._bytes_of(tensor for tensor in self._reachable() if not ledger.records_of(tensor))

    def _reachable(self) -> Iterator[Tensor]:
        gradients = {id(p.grad) for p in self._state.tensors if p.is_leaf and p.grad is not None}
        left_out = gradients | self._batch | self._constant
        return (tensor for tensor in self._state.tensors if id(tensor) not in left_out)

    def _bytes_of(self, tensors: Iterable[Tensor]) -> int:
        storages = {
            storage_key(storage): storage.nbytes()
            for tensor in tensors
            if tensor.device.type == self._device.type
            for storage in storages_of(tensor)
        }
        return sum(storages.values())

    def before_write(self, tensor: Tensor) -> None:
        """Copy what shares memory with a tensor that is about to be written to, unless it is copied already.

        Args:
            tensor: of any shape, dtype and layout.
        """
        for storage in storages_of(tensor):
            for kept, _ in self._uncopied.pop(storage_key(storage), ()):
                self._state.copy(kept)
                self._note_written(kept)

    def restore(self) -> None:
        """Set everything back to what it was. May be called several times."""
        for other in self._others:
            other.restore()
        theirs = _PutIntoModules(self._model)
        self._state.restore()
        theirs.restore()
        lost = [
            (key, tensor)
            for key, kept in self._uncopied.items()
            for tensor, version in kept
            if version >= 0 and version_counter(tensor) != version
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


class _PutIntoModules:
    """What techniques have put into the attributes of modules, and whether it is there, is up to them.

    Args:
        model: the module that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._now = [(module.__dict__, dict(module.__dict__)) for module in model.modules()]

    def restore(self) -> None:
        """Leave it as it was when this was made; everything else stays."""
        for attributes, before in self._now:
            for name in {*attributes, *before}:
                one, other = attributes.get(name), before.get(name)
                if one is other or not (_is_ours(one) or _is_ours(other)):
                    continue
                if name in before:
                    attributes[name] = before[name]
                else:
                    del attributes[name]


def _is_ours(value: object) -> bool:
    return type(value).__module__.startswith("lightning_memtrain.")


def restore(snapshot: BatchSnapshot) -> None:
    """Set everything back to what it was.

    Args:
        snapshot: of that state.
    """
    try:
        snapshot.restore()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        snapshot.restore()  # needs no memory to speak of; what failed was somebody else's in between
