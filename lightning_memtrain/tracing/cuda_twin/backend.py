"""The device itself: a third-party backend made in Python, with the model of CUDA's allocator behind it."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import storage_key
from lightning_memtrain.coordination import recovers
from lightning_memtrain.tracing.allocator import CachingAllocator, DeviceFull
from lightning_memtrain.tracing.allocator.blocks import Block
from lightning_memtrain.tracing.cuda_twin import streams
from lightning_memtrain.tracing.cuda_twin.op_seconds import seconds_of

#: What torch calls the device; no name of a real backend.
DEVICE_TYPE = "cudatwin"

_NO_LIMIT = 2**62


class TwinBackend:
    """What ``torch.cudatwin`` is: the device's own module, with the memory statistics that CUDA's has.

    Args:
        allocator: takes and gives back what storages need.
        num_devices: devices of this process that there are; all but the current one hold nothing.
        usable_bytes: what torch's allocator could have of the device. More is allocated all the same, so that
            it is known what a step needs; but not where somebody recovers from running out of memory.
        total_bytes: what the device says that it has in all; ``None`` for as much.
    """

    #: What techniques do on CUDA alone they do here, too.
    behaves_as_cuda = True

    def __init__(
        self,
        allocator: CachingAllocator,
        num_devices: int = 1,
        usable_bytes: int = _NO_LIMIT,
        total_bytes: int | None = None,
    ) -> None:
        self.allocator = allocator
        self._num_devices = num_devices
        self._usable_bytes = usable_bytes
        self._total_bytes = usable_bytes if total_bytes is None else total_bytes
        self._streams = streams.Streams()
        # None for a storage that was emptied.
        self._blocks: dict[int, tuple[Block | None, weakref.ref[torch.UntypedStorage]]] = {}
        self._workspaces: dict[str, Block] = {}
        self._peak_allocated_bytes = 0
        self._peak_reserved_bytes = 0

    # ------------------------------------------------------------------ storages

    def hold(self, tensor: Tensor) -> None:
        """Let the allocator know of a tensor's storage, until that is freed.

        Args:
            tensor: on this device; of any shape and dtype, one whose storage was there before is passed over.
        """
        storage = tensor.untyped_storage()
        key, num_bytes = storage_key(storage), storage.nbytes()
        if key in self._blocks:
            self.resized(storage)
        elif num_bytes:
            block = self._allocate(num_bytes)
            self._blocks[key] = block, weakref.ref(storage, lambda _: self._release(key))

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Let the allocator know that a storage may have another size, as FSDP empties and refills weights.

        Args:
            storage: with its new size; one that is not of this device is passed over.
        """
        key, num_bytes = storage_key(storage), storage.nbytes()
        if key not in self._blocks:
            return
        block, reference = self._blocks[key]
        if num_bytes == (0 if block is None else block.requested):
            return
        if block is not None:
            self.allocator.free(block)
            self._blocks[key] = None, reference  # there may be no room for the other size
        if num_bytes:
            self._blocks[key] = self._allocate(num_bytes), reference

    def _allocate(self, num_bytes: int) -> Block:
        stream = self._streams.current.number
        self.allocator.limit_bytes = self._usable_bytes  # what is free goes back first, as on the device
        try:
            block = self.allocator.allocate(num_bytes, stream)
        except DeviceFull as error:
            if recovers():
                raise torch.OutOfMemoryError(f"CUDA out of memory. {error}") from None
            self.allocator.limit_bytes = None
            block = self.allocator.allocate(num_bytes, stream)
        self._note_peaks()
        return block

    def hold_workspace(self, name: str, num_bytes: int) -> None:
        """Allocate, once, what a library keeps for itself from its first call on.

        Args:
            name: of the library, e.g. ``"cuBLAS"``.
            num_bytes: how much; 0 for nothing.
        """
        if num_bytes and name not in self._workspaces:
            self._workspaces[name] = self._allocate(num_bytes)

    @property
    def workspace_bytes(self) -> int:
        """What libraries keep for themselves by now."""
        return sum(block.size for block in self._workspaces.values())

    def _release(self, key: int) -> None:
        block, _ = self._blocks.pop(key)
        if block is not None:
            self.allocator.free(block)

    def _note_peaks(self) -> None:
        self._peak_allocated_bytes = max(self._peak_allocated_bytes, self.allocator.allocated_bytes)
        self._peak_reserved_bytes = max(self._peak_reserved_bytes, self.allocator.reserved_bytes)

    # ------------------------------------------------------------------ statistics, as torch.cuda has them

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes in blocks that are allocated."""
        return self.allocator.allocated_bytes

    def memory_reserved(self, device: Any = None) -> int:
        """Bytes that the allocator has from the device."""
        return self.allocator.reserved_bytes

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most bytes in blocks since the last reset."""
        return self._peak_allocated_bytes

    def max_memory_reserved(self, device: Any = None) -> int:
        """The most bytes from the device since the last reset."""
        return self._peak_reserved_bytes

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        """Let the peaks begin anew."""
        self._peak_allocated_bytes = self.allocator.allocated_bytes
        self._peak_reserved_bytes = self.allocator.reserved_bytes

    def memory_stats(self, device: Any = None) -> dict[str, Any]:
        """What is asked of CUDA's statistics."""
        return {"num_alloc_retries": self.allocator.num_retries}

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """What is free of the device, and what it has in all."""
        return max(0, self._usable_bytes - self.allocator.reserved_bytes), self._total_bytes

    def seconds_of(self, make_arguments: Any, function: Any) -> float:
        """See :func:`.op_seconds.seconds_of`."""
        return seconds_of(make_arguments, function)

    def empty_cache(self) -> None:
        """Give back segments that are free as a whole."""
        self.allocator.empty_cache()

    # ------------------------------------------------------------------ streams, as torch.cuda has them

    Stream = streams.Stream
    Event = streams.Event

    def current_stream(self, device: Any = None) -> streams.Stream:
        """The stream that allocations are for."""
        return self._streams.current

    def default_stream(self, device: Any = None) -> streams.Stream:
        """The stream that one is on unless told otherwise."""
        return streams.Stream.default()

    def stream(self, stream: Any) -> AbstractContextManager[None]:
        """Be on a stream for a while."""
        return self._streams.on(stream)

    def set_stream(self, stream: streams.Stream) -> None:
        """Be on a stream from now on."""
        self._streams.current = stream

    # ------------------------------------------------------------------ what torch asks of a backend

    def is_initialized(self) -> bool:
        """Whether it can be used."""
        return True

    def is_available(self) -> bool:
        """Whether there is one."""
        return True

    def current_device(self) -> int:
        """Its index."""
        return 0

    def device_count(self) -> int:
        """How many there are."""
        return self._num_devices

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """There are no random numbers."""

    def manual_seed(self, seed: int) -> None:
        """There are no random numbers."""

    def device(self, index: int) -> AbstractContextManager[None]:
        """Be on it for a while; one is always on it."""
        return nullcontext()

    def synchronize(self, device: Any = None) -> None:
        """Everything is done at once."""

    def set_device(self, device: Any) -> None:
        """There is one."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        """Random numbers have no state here."""
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """Random numbers have no state here."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """What autocast may cast to."""
        return [torch.float16, torch.bfloat16]
