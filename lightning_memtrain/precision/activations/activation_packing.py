"""The context in which what autograd saves is kept in few bits."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_memtrain.compat.torch_private import (
    is_backward_running,
    storage_key,
    version_counter,
)
from lightning_memtrain.ledger.observers.saved_tensors import (
    SAVED_TENSOR_HOOKS,
    VersionCheckedTensor,
    hooks_in_force,
)
from lightning_memtrain.ledger.tensors.storages import PLAIN_TENSORS
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.precision.activations.group_quantization import QuantizedGroups
from lightning_memtrain.precision.activations.memory_order import MemoryOrder, empty_like_layout, memory_order
from lightning_memtrain.precision.activations.parameter_matcher import ParameterMatcher
from lightning_memtrain.precision.activations.quantization_kernels import QuantizationKernels

#: Dtypes that are packed. Whoever computes in float64 asks for all of its digits.
PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_NOT_IN_BACKWARD = -1


@dataclass(frozen=True)
class PackedBytes:
    """What was packed while a context was entered.

    Args:
        num_tensors: tensors that were quantized, each counted once however often it was saved.
        saved_bytes: their bytes before.
        stored_bytes: their bytes since.
    """

    num_tensors: int = 0
    saved_bytes: int = 0
    stored_bytes: int = 0


class _Payload:
    """Codes that several saved tensors may share."""

    __slots__ = ("__weakref__", "groups", "order")

    def __init__(self, groups: QuantizedGroups, order: MemoryOrder) -> None:
        self.groups = groups
        self.order = order


@dataclass(frozen=True)
class _Packed:
    """A saved tensor: codes, and how to lay out what they stand for."""

    payload: _Payload
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class ActivationPacking:
    """While it is entered, tensors that autograd saves are packed; backward, whenever it runs, unpacks them.

    Made by :meth:`ActivationCodec.packing`. It may be entered any number of times, one after the other.

    Args:
        model: its parameters and buffers are not packed.
        kernels: quantize.
        min_numel: tensors with fewer elements are stored as they are.
        noise_seed: of stochastic rounding; ``None`` to round to the nearest.
    """

    def __init__(
        self, model: nn.Module, kernels: QuantizationKernels, min_numel: int, noise_seed: int | None
    ) -> None:
        self._model = model
        self._kernels = kernels
        self._min_numel = min_numel
        self._noise_seed = noise_seed
        self._num_packed = 0
        self._generators: dict[torch.device, torch.Generator] = {}
        self._is_parameter: ParameterMatcher | None = None
        self._spared: set[int] = set()
        self._known: dict[Any, tuple[ref[_Payload], StorageWeakRef]] = {}
        self._undo = ExitStack()
        self.last = PackedBytes()
        """What was packed since the context was last entered."""

    def __enter__(self) -> ActivationPacking:
        _refuse_place(self._is_parameter is not None)
        hooks = torch.autograd.graph.saved_tensors_hooks(_not_traced(self._pack), _not_traced(self._unpack))
        try:
            self._undo.enter_context(hooks)
        except RuntimeError as error:
            _refuse_torch_func(error)
            raise
        self._is_parameter = ParameterMatcher(self._model)
        self.last = PackedBytes()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._undo.close()
        self._is_parameter = None
        self._known.clear()
        self._spared.clear()
        _refuse_torch_func(error)

    def exclude(self, tree: Any) -> None:
        """Do not pack these when the context is next entered, since somebody keeps them in any case.

        Args:
            tree: whatever holds them, such as the batch.
        """
        tensors = [t for t in find_tensors(tree) if type(t) in PLAIN_TENSORS and t.layout is torch.strided]
        self._spared = {storage_key(t.untyped_storage()) for t in tensors}

    def state_dict(self) -> dict[str, int]:
        """Where the noise is: the next tensor draws what it would have drawn without an interruption."""
        return {"num_packed": self._num_packed}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on with the noise from a state."""
        self._num_packed = state_dict["num_packed"]

    # ------------------------------------------------------------------ hooks

    def _pack(self, tensor: Tensor) -> VersionCheckedTensor | _Packed:
        # In backward only what is recomputed is saved, which is used at once.
        if not is_backward_running() and self._is_to_be_packed(tensor):
            order = memory_order(tensor)
            if order is not None and order.numel >= self._min_numel:
                payload = self._payload(tensor, order)
                shape, strides = tuple(tensor.shape), tensor.stride()
                return _Packed(payload, shape, strides, tensor.dtype, tensor.device)
        SAVED_TENSOR_HOOKS.tell(tensor)
        return VersionCheckedTensor.pack(tensor)

    def _is_to_be_packed(self, tensor: Tensor) -> bool:
        return (
            tensor.dtype in PACKED_DTYPES
            and tensor.numel() >= self._min_numel
            and type(tensor) in PLAIN_TENSORS
            and tensor.layout is torch.strided
            and storage_key(tensor.untyped_storage()) not in self._spared
            and self._is_parameter is not None
            and not self._is_parameter(tensor)
        )

    @torch.no_grad()
    def _payload(self, tensor: Tensor, order: MemoryOrder) -> _Payload:
        storage = tensor.untyped_storage()
        # Addresses of freed storages are used again, but not while there is a weak reference to the old one.
        key = (storage_key(storage), order, tensor.dtype, version_counter(tensor))
        found = self._known.get(key)
        payload = found[0]() if found is not None else None
        if payload is None:
            groups = self._kernels.quantize(tensor.detach(), order, self._generator(tensor.device))
            payload = _Payload(groups, order)
            self._known[key] = (ref(payload), StorageWeakRef(storage))  # type: ignore[no-untyped-call]
            self._num_packed += 1
            self.last = PackedBytes(
                self.last.num_tensors + 1,
                self.last.saved_bytes + order.numel * tensor.element_size(),
                self.last.stored_bytes + sum(part.nbytes for part in groups),
            )
            for part in groups:
                SAVED_TENSOR_HOOKS.tell(part)
        return payload

    @torch.no_grad()
    def _unpack(self, packed: VersionCheckedTensor | _Packed) -> Tensor:
        if isinstance(packed, VersionCheckedTensor):
            return packed.unpack()
        tensor = empty_like_layout(packed.shape, packed.strides, packed.dtype, packed.device)
        order = packed.payload.order._replace(offset=0)
        self._kernels.dequantize(packed.payload.groups, tensor, order)
        return tensor

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """Noise for the next tensor, seeded by its number, so that one number is the whole state."""
        if self._noise_seed is None:
            return None
        generator = self._generators.setdefault(device, torch.Generator(device))
        return generator.manual_seed((self._noise_seed + self._num_packed * 0x9E3779B97F4A7C15) % 2**63)


def _refuse_torch_func(error: BaseException | None) -> None:
    if isinstance(error, RuntimeError) and "support saved tensor hooks" in str(error):
        raise RuntimeError(
            "`ActivationCodec.packing` packs by saved-tensor hooks, which torch refuses under "
            f"torch.func.grad and its like: {error} Compute that part outside of the context, or by "
            "torch.autograd.grad."
        ) from error


def _not_traced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep dynamo off a hook: it takes what runs while a compiled block runs eagerly for a part of it."""
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and loading it takes a second
        return hook
    undisturbed: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return undisturbed


def _refuse_place(entered: bool) -> None:
    hooks = hooks_in_force()
    around = None if hooks is None else getattr(inspect.unwrap(hooks[0]), "__self__", None)
    if entered or isinstance(around, ActivationPacking):
        raise RuntimeError(
            "`ActivationCodec.packing` must be entered once at a time, but got a second one inside of the "
            "first. Leave one of them out: the precision plugin and `CompressedActivations` each enter one."
        )
    recomputing = is_backward_running()
    checkpointed = hooks is not None and "checkpoint" in (getattr(hooks[0], "__module__", None) or "")
    if recomputing or checkpointed:
        raise RuntimeError(
            "`ActivationCodec.packing` must be entered around activation checkpointing, but got entered "
            "inside of a checkpointed function, where it would keep what checkpointing drops. "
            "Enter it outside, e.g. around the whole forward: what checkpoints keep is then packed."
        )
