"""What a forward pass finds around it, so that it can run once more as if nothing had happened since."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

_HOSTS = ("cpu", "meta")

# What decides which kernels run: how to read it, and how to set it.
_SETTINGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


class Surroundings:
    """Random numbers, autocast and the choice of kernels at the beginning of a call.

    Args:
        tensors: what the call works on, whose devices count.
        with_numpy: whether random numbers of NumPy count, too.
    """

    def __init__(self, tensors: Sequence[Tensor], with_numpy: bool) -> None:
        device_type = next((x.device.type for x in tensors if x.device.type not in _HOSTS), None)
        self._autocast = [_Autocast.now(kind) for kind in ("cpu", device_type) if kind is not None]
        self._settings = [get() for get, _ in _SETTINGS]
        self._random: list[_TorchRandom | _PythonRandom] = [
            _TorchRandom(device_type, tensors),
            _PythonRandom(),
        ]
        if with_numpy and "numpy" in sys.modules:
            self._random.append(_NumpyRandom())

    def call_ended(self) -> None:
        """Forget the states of random numbers of which the call drew none: they take 5 KB each."""
        self._random = [state for state in self._random if state.has_moved()]

    @property
    def draws_from_numpy(self) -> bool:
        """Whether a call that has ended drew random numbers of NumPy."""
        return any(isinstance(state, _NumpyRandom) for state in self._random)

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


class _TorchRandom:
    def __init__(self, device_type: str | None, tensors: Sequence[Tensor]) -> None:
        self._device_type = device_type
        self._tensors = tensors
        self._on_cpu, self._indices, self._states = self._now()

    def _now(self) -> tuple[Tensor, list[int], list[Tensor]]:
        indices: list[int] = []
        states: list[Tensor] = []
        if self._device_type is not None:
            indices, states = get_device_states(*self._tensors)
        return torch.get_rng_state(), indices, states

    def has_moved(self) -> bool:
        on_cpu, indices, states = self._now()
        self._tensors = ()  # not to be kept
        # Comparing is no part of the program, so no dispatch mode need see it.
        with torch._C._DisableTorchDispatch():
            pairs = zip((on_cpu, *states), (self._on_cpu, *self._states), strict=True)
            return indices != self._indices or not all(torch.equal(one, two) for one, two in pairs)

    @contextmanager
    def restored(self) -> Iterator[None]:
        kinds = {} if self._device_type is None else {"device_type": self._device_type}
        with torch.random.fork_rng(self._indices, **kinds):
            torch.set_rng_state(self._on_cpu)
            if self._device_type is not None:
                set_device_states(self._indices, self._states, device_type=self._device_type)
            yield


class _PythonRandom:
    def __init__(self) -> None:
        self._state = self._get()

    def _get(self) -> Any:
        return random.getstate()

    def _set(self, state: Any) -> None:
        random.setstate(state)

    def has_moved(self) -> bool:
        return bool(self._get() != self._state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        now = self._get()
        self._set(self._state)
        try:
            yield
        finally:
            self._set(now)


class _NumpyRandom(_PythonRandom):
    def _get(self) -> Any:
        name, keys, *rest = sys.modules["numpy"].random.get_state()
        return name, keys.tobytes(), *rest

    def _set(self, state: Any) -> None:
        numpy = sys.modules["numpy"]
        name, keys, *rest = state
        numpy.random.set_state((name, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
