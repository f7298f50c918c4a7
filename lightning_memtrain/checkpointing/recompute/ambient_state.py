"""What a forward pass finds around it, so that it can run once more as if nothing had happened since."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_memtrain.core.random_state import NumpyRandom, device_type_of, global_random_states

# What decides which kernels run: how to read it, and how to set it.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


class AmbientState:
    """Random numbers, autocast and the choice of kernels at the beginning of a call.

    Args:
        tensors: what the call works on, of any shape and dtype; their devices count.
        with_numpy: whether random numbers of NumPy count, too.
    """

    def __init__(self, tensors: Sequence[Tensor], with_numpy: bool) -> None:
        device_type = device_type_of(tensors)
        self._autocast = [_Autocast.now(kind) for kind in ("cpu", device_type) if kind is not None]
        self._settings = [get() for get, _ in _SETTINGS]
        self._random = global_random_states(tensors, with_numpy)

    def call_ended(self) -> None:
        """Forget the states of random numbers of which the call drew none: they take 5 KB each."""
        self._random = [state for state in self._random if state.has_moved()]

    @property
    def draws_from_numpy(self) -> bool:
        """Whether a call that has ended drew random numbers of NumPy."""
        return any(isinstance(state, NumpyRandom) for state in self._random)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Everything as it was; afterwards as it is now."""
        with ExitStack() as undo:
            for random_state in self._random:
                undo.enter_context(random_state.restored())
            for autocast in self._autocast:
                undo.enter_context(autocast.restored())
            for (get, put), setting in zip(_SETTINGS, self._settings, strict=True):
                now = get()
                if now != setting:
                    put(setting)
                    undo.callback(put, now)
            yield


class _Autocast(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool

    @classmethod
    def now(cls, device_type: str) -> _Autocast:
        enabled = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type)
        return cls(device_type, enabled, dtype, torch.is_autocast_cache_enabled())

    def restored(self) -> AbstractContextManager[Any]:
        return torch.autocast(
            self.device_type, dtype=self.dtype, enabled=self.enabled, cache_enabled=self.cache_enabled
        )
