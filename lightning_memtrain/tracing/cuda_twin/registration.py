"""Making the twin known to torch, as the third-party backend of this process."""

from __future__ import annotations

from typing import Any

import torch

from lightning_memtrain.compat.torch_private import privateuse1_backend_name, set_up_python_backend
from lightning_memtrain.ledger.observers.storage_resizes import RESIZE_HOOKS
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend
from lightning_memtrain.tracing.cuda_twin.backward_errors import make_device_guard, raise_errors_of_backward

_NO_BACKEND = "privateuseone"


def why_no_twin() -> str:
    """Why there can be no twin in this process: torch is too old, or another device has its only place.

    Returns:
        The reason with its cure; empty if there can be one.
    """
    if set_up_python_backend is None:
        return (
            "a prediction for a GPU needs a torch in which a device can be made in Python, but torch "
            f"{torch.__version__} has nothing to make one. Install a newer torch (2.13 has it)"
        )
    name = privateuse1_backend_name()
    if name != _NO_BACKEND:
        return (
            "a prediction for a GPU needs torch's one place for a third-party device to be free, but this "
            f"process has the backend {name!r} there. Predict in a process that does not import that backend"
        )
    return ""


def refuse_no_twin() -> None:
    """Refuse a process in which there can be no twin.

    Raises:
        RuntimeError: see :func:`why_no_twin`.
    """
    if reason := why_no_twin():
        raise RuntimeError(f"{reason}.")


def install(backend: TwinBackend) -> None:
    """Make the device known to torch, for the rest of this process: nothing can take it back.

    Args:
        backend: what becomes ``torch.cudatwin``.

    Raises:
        RuntimeError: see :func:`refuse_no_twin`.
    """
    refuse_no_twin()
    set_up_python_backend(DEVICE_TYPE, backend_module=backend, device_guard=make_device_guard())
    raise_errors_of_backward()
    torch.Generator = _Generator  # type: ignore[misc]
    for module, names in _ASKED_ELSEWHERE.items():
        for name in names:
            if hasattr(module, name):
                setattr(module, name, getattr(backend, name))
    RESIZE_HOOKS.add(lambda storage, num_bytes_before: backend.resized(storage))


# What programs ask other modules about the device, which these can only answer for real ones.
_ASKED_ELSEWHERE: dict[Any, tuple[str, ...]] = {
    torch.cuda: ("Stream", "Event", "stream", "current_stream", "default_stream", "set_stream"),
    getattr(torch, "accelerator", None): (  # newer than the oldest torch that is supported
        "current_stream",
        "set_stream",
        "synchronize",
        "empty_cache",
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
        "memory_stats",
        "reset_peak_memory_stats",
    ),
}

_plain_generator = torch.Generator


class _AlsoPlain(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _plain_generator)


class _Generator(metaclass=_AlsoPlain):
    """A generator for the twin is one of the CPU's: nobody sees its numbers."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _plain_generator("cpu" if torch.device(device).type == DEVICE_TYPE else device)
