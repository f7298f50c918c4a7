"""Making the twin known to torch, as the third-party backend of this process."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration

from lightning_memtrain.compat.torch_private import privateuse1_backend_name
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend

_SETUP = "_setup_privateuseone_for_python_backend"
_NO_BACKEND = "privateuseone"


def refuse_no_twin() -> None:
    """Refuse a process in which there can be no twin.

    Raises:
        RuntimeError: if torch offers no backends made in Python, or another one has the only place.
    """
    if not hasattr(backend_registration, _SETUP):
        raise RuntimeError(
            f"a prediction for a GPU needs a torch in which a device can be made in Python, but torch "
            f"{torch.__version__} has no `torch.utils.backend_registration.{_SETUP}`. Install a newer torch "
            '(2.13 has it), or predict with device="cpu", which does not know the GPU\'s kernels, autocast '
            "and allocator."
        )
    name = privateuse1_backend_name()
    if name != _NO_BACKEND:
        raise RuntimeError(
            f"a prediction for a GPU needs torch's one place for a third-party device to be free, but this "
            f"process has the backend {name!r} there. Predict in a process that does not import that backend."
        )


def install(backend: TwinBackend) -> None:
    """Make the device known to torch, for the rest of this process: nothing can take it back.

    Args:
        backend: what becomes ``torch.cudatwin``.

    Raises:
        RuntimeError: see :func:`refuse_no_twin`.
    """
    refuse_no_twin()
    getattr(backend_registration, _SETUP)(DEVICE_TYPE, backend_module=backend)
    torch.Generator = _Generator  # type: ignore[misc]


_plain_generator = torch.Generator


class _AlsoPlain(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _plain_generator)


class _Generator(metaclass=_AlsoPlain):
    """A generator for the twin is one of the CPU's: nobody sees its numbers."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _plain_generator("cpu" if torch.device(device).type == DEVICE_TYPE else device)
