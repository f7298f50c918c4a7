"""A function called in a copy of this process, which nothing that it does comes back from but its result."""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class ChildFailed(RuntimeError):
    """The copy ended without a result, as by a signal."""


def call_in_copy(function: Callable[[], Result]) -> Result:
    """Call a function in a forked process and return what it returns.

    Whatever it changes (attributes, random state, files that stay open, settings of libraries) is changed in the
    copy alone. Memory is shared until one of both writes to it, so a large model costs nothing.

    Args:
        function: called without arguments; its result, or the error that it raises, must be picklable.

    Returns:
        Its result.

    Raises:
        ChildFailed: if the copy ended in another way, such as by a signal.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reading)
            torch.set_num_threads(1)  # a pool of threads does not survive a fork
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(_answer(function))
            status = 0
        finally:
            os._exit(status)  # no handlers of the original are to run here
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        raise ChildFailed(f"the process that ran it ended with {code} and gave no result")
    returned, value, trace = pickle.loads(answer)
    if returned:
        result: Result = value
        return result
    value.__notes__ = [*getattr(value, "__notes__", ()), trace]
    raise value


def _answer(function: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((True, function(), ""))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
            return pickle.dumps((False, error, trace))
        except Exception:
            return pickle.dumps((False, RuntimeError(f"{type(error).__name__}: {error}"), trace))
