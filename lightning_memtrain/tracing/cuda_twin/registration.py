"""Making the twin known to torch, as the third-party backend of this process."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration

from lightning_memtrain.compat.torch_private import privateuse1_backend_name
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend
from lightning_memtrain.tracing.cuda_twin.backward_errors import make_device_guard, raise_errors_of_backward

_SETUP = "_setup_privateuseone_for_python_backend"
_NO_BACKEND = "privateuseone"


def why_no_twin() -> str:
    """Why there can be no twin in this process: torch is too old, or another device has its only place.

    Returns:
        The reason with its cure; empty if there can be one.
    """
    if not hasattr(backend_registration, _SETUP):
        return (
            "a prediction for a GPU needs a torch in which a device can be made in Python, but torch "
            f"{torch.__version__} has no `torch.utils.backend_registration.{_SETUP}`. Install a newer torch "
            "(2.13 has it)"
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
    setup = getattr(backend_registration, _SETUP)
    setup(DEVICE_TYPE, backend_module=backend, device_guard=make_device_guard())
    raise_errors_of_backward()
    torch.Generator = _Generator  # type: ignore[misc]


_plain_generator = torch.Generator


class _AlsoPlain(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _plain_generator)


class _Generator(metaclass=_AlsoPlain):
    """A generator for the twin is one of the CPU's: nobody sees its numbers."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _plain_generator("cpu" if torch.device(device).type == DEVICE_TYPE else device)
