"""Moving activations to host memory between forward and backward, instead of recomputing them."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lightning_memtrain.compat import wrap_training_step
from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.compat.torch_private import storage_key, version_counter, view_base
from lightning_memtrain.core import MIB, NoEffectWarning, OnDemandTensor, TechniqueRecord, parse_bytes
from lightning_memtrain.core.devices.device_kinds import behaves_as_cuda
from lightning_memtrain.core.technique import readable_repr


class offloaded_activations(saved_tensors_hooks):
    """Keeps in host memory what autograd saves in the block, bit for bit.

    On CUDA the copies run on a stream of their own, in pinned memory, and each tensor that backward asks for
    has the next one fetched ahead. A tensor that is saved several times is copied once.

    Args:
        min_bytes: smaller tensors, of any shape and dtype, stay where they are, since each copy takes a fixed
            time; bytes, or a size such as ``"1MiB"``. Parameters and views of them stay as well.

    Raises:
        ArgumentError: if ``min_bytes`` is no size.

    Example:
        >>> weight = torch.ones(4, 4, requires_grad=True)
        >>> with offloaded_activations(min_bytes=1):
        ...     loss = (torch.ones(2, 4) @ weight).tanh().sum()
        >>> loss.backward()
    """

    def __init__(self, min_bytes: int | str = MIB) -> None:
        self._min_bytes = parse_bytes(min_bytes, argument="offloaded_activations(min_bytes)")
        self._streams: dict[torch.device, Any] = {}
        self._copies: list[weakref.ref[_HostCopy]] = []
        self._by_source: weakref.WeakValueDictionary[tuple[Any, ...], _HostCopy] = (
            weakref.WeakValueDictionary()
        )
        super().__init__(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _HostCopy:
        # Linear layers save a view of their weight.
        is_weight = isinstance(tensor, nn.Parameter) or isinstance(view_base(tensor), nn.Parameter)
        stays = is_weight or tensor.layout is not torch.strided or isinstance(tensor, OnDemandTensor)
        if stays or tensor.nbytes < self._min_bytes or tensor.device.type == "meta":
            return tensor
        # The version tells a tensor from what was written over it.
        form = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, version_counter(tensor))
        source = (storage_key(tensor.untyped_storage()), *form)
        copy = self._by_source.get(source)
        if copy is None or not copy.is_of(tensor):
            copy = _HostCopy(
                tensor, self._stream(tensor.device), len(self._copies), behaves_as_cuda(tensor.device)
            )
            self._copies.append(weakref.ref(copy))
            self._by_source[source] = copy
        return copy

    def _unpack(self, packed: Tensor | _HostCopy) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        tensor = packed.fetched()
        # Backward goes from the last one to the first.
        ahead = self._copies[packed.index - 1]() if packed.index > 0 else None
        if ahead is not None:
            ahead.begin_fetching()
        return tensor

    def _stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._streams[device]


class _HostCopy:
    """A tensor in host memory that can come back to its device."""

    def __init__(self, tensor: Tensor, stream: Any, index: int, fetches_ahead: bool) -> None:
        self.index = index
        self._fetches_ahead = fetches_ahead
        self._device = tensor.device
        self._stream = stream
        self._storage = weakref.ref(tensor.untyped_storage())
        self._fetched: Tensor | None = None
        # Dense tensors keep their strides, so that kernels find what they would have found.
        self._host = torch.empty_like(tensor, device="cpu", pin_memory=stream is not None)
        if stream is None:
            self._host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self._host.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # its memory is not given to another tensor before the copy is done

    def is_of(self, tensor: Tensor) -> bool:
        """Whether it was made of this tensor's storage, not of one that had the same address."""
        return self._storage() is tensor.untyped_storage()

    def begin_fetching(self) -> None:
        if self._fetched is not None or not self._fetches_ahead:
            return
        if self._stream is None:  # a twin of CUDA does everything at once
            self._fetched = self._host.to(self._device)
            return
        with torch.cuda.stream(self._stream):  # after the copy to the host, which ran on this stream, too
            self._fetched = self._host.to(self._device, non_blocking=True)

    def fetched(self) -> Tensor:
        if not self._fetches_ahead:
            return self._host.to(self._device)
        self.begin_fetching()
        fetched, self._fetched = self._fetched, None
        assert fetched is not None
        if self._stream is None:
            return fetched
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        fetched.record_stream(current)
        return fetched


class OffloadActivations(Callback):
    """Keeps activations in host memory between forward and backward.

    Exact, and an alternative to recomputing where the connection to the host is fast beside the model.
    Activations of modules that :class:`ActivationCheckpointing` recomputes are not kept anywhere. Not tried
    on a GPU yet.

    Args:
        min_bytes: smaller tensors stay on the device; bytes, or a size such as ``"1MiB"``.

    Raises:
        ArgumentError: if ``min_bytes`` is no size.

    Example:
        >>> OffloadActivations("4MiB").technique_record()
        TechniqueRecord(name='OffloadActivations', settings={'min_bytes': 4194304}, events=())
    """

    def __init__(self, min_bytes: int | str = MIB) -> None:
        super().__init__()
        self.min_bytes = parse_bytes(min_bytes, argument="OffloadActivations(min_bytes)")
        self._unwrap: Callable[[], None] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow every call of ``training_step``."""
        refuse_mix("OffloadActivations", trainer)
        if trainer.strategy.root_device.type == "cpu":
            warnings.warn(
                "`OffloadActivations` has no effect on the CPU, where activations are in host memory anyway. "
                "Remove it.",
                NoEffectWarning,
                stacklevel=2,
            )
            return

        def around(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with offloaded_activations(self.min_bytes):
                return step(*args, **kwargs)

        self._unwrap = wrap_training_step(pl_module, around)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found: after an error Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        if self._unwrap is not None:
            self._unwrap()
            self._unwrap = None

    @property
    def exact(self) -> bool:
        """The result is the same to the bit."""
        return True

    __repr__ = readable_repr

    def technique_record(self) -> TechniqueRecord:
        """What the memory report says of it."""
        return TechniqueRecord("OffloadActivations", {"min_bytes": self.min_bytes})
