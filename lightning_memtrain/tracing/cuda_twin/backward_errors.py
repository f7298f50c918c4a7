"""Errors that come through backward on a device made in Python, which would end the process."""

from __future__ import annotations

import functools
from typing import Any

import torch

_pending: list[BaseException] = []
# Called in the general way, after which Python looks whether an error is set (it does not after `int()`).
_look_for_error: Any = functools.partial(int)


def make_device_guard() -> Any:
    """A guard for the device which bears that it is asked for its type while an error is on its way.

    Torch asks for it when it leaves a node of backward, also by an error, and whatever Python function it
    calls then fails, since the error is still set; where torch cannot have any failure (``noexcept``). So the
    function takes the error out of the way first. :func:`raise_errors_of_backward` raises it again.

    Returns:
        What ``_setup_privateuseone_for_python_backend`` takes for ``device_guard``.
    """
    api: Any = torch._C
    kind = api._autograd.DeviceType.PrivateUse1

    class Guard(api._acc.DeviceGuard):  # type: ignore[misc]
        def type_(self) -> Any:
            try:
                _look_for_error()
            except SystemError as error:
                if error.__cause__ is not None:
                    _pending.append(error.__cause__)
            return kind

    return Guard()


def raise_errors_of_backward() -> None:
    """Let backward raise what a guard has taken out of the way, for the rest of this process."""
    engine: Any = torch.autograd
    run = engine._engine_run_backward

    @functools.wraps(run)
    def raising(*args: Any, **kwargs: Any) -> Any:
        _pending.clear()
        try:
            return run(*args, **kwargs)
        except BaseException as error:
            if not _pending:
                raise
            first = _pending[0]
            _pending.clear()
            if isinstance(error, SystemError):  # torch has nothing left to raise
                raise first from None
            raise

    engine._engine_run_backward = raising
