"""Storages that change their size behind the back of autograd and dispatch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class ResizeHooks:
    """Calls back when ``UntypedStorage.resize_`` changes a storage behind autograd's and dispatch's back.

    FSDP frees and refills parameters this way. The method is replaced only while somebody watches.
    """

    def __init__(self) -> None:
        self._callbacks: list[Callable[[torch.UntypedStorage, int], None]] = []
        self._original = torch.UntypedStorage.resize_
        self._lock = threading.Lock()

    def add(self, callback: Callable[[torch.UntypedStorage, int], None]) -> None:
        """Call ``callback`` with every storage that was resized and its size before, until :meth:`remove`."""
        with self._lock:
            if not self._callbacks:
                torch.UntypedStorage.resize_ = self._replacement()  # type: ignore[method-assign, assignment]
            self._callbacks.append(callback)

    def remove(self, callback: Callable[[torch.UntypedStorage, int], None]) -> None:
        """Stop calling ``callback`` with storages that are resized."""
        with self._lock:
            self._callbacks.remove(callback)
            if not self._callbacks:
                torch.UntypedStorage.resize_ = self._original  # type: ignore[method-assign]

    def _replacement(self) -> Callable[[torch.UntypedStorage, int], Any]:
        original = self._original

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            num_bytes_before = storage.nbytes()
            result = original(storage, size)
            for callback in tuple(self._callbacks):
                callback(storage, num_bytes_before)
            return result

        return resize_


RESIZE_HOOKS = ResizeHooks()
