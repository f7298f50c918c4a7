"""A function called in a copy of this process, which nothing that it does comes back from but its result."""

from __future__ import annotations

import os
import pickle
import re
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, Generic, NoReturn, TypeVar

import torch

from lightning_memtrain.compat.torch_private import is_backward_running
from lightning_memtrain.tracing.step.user_code import user_location

Result = TypeVar("Result")
Ask = Callable[[Any], Any]
"""Asks the original process a question and returns its answer; both must be picklable."""

_STANDARD_ERROR = 2
_HEAD = 8  # bytes that tell how long a message is
# Of C++ code; those of Python code are left out in the copy.
_WARNING_OF_TORCH = re.compile(r"^\[rank\d+\]:\[W.* Warning: .*\n?", re.MULTILINE)


class ChildFailed(RuntimeError):
    """The copy ended without a result.

    Args:
        message: what is known of why.
        exit_code: of the process; minus the number of the signal that ended it.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def call_in_copy(function: Callable[[], Result]) -> Result:
    """Call a function in a forked process and return what it returns; see :func:`call_in_asking_copy`.

    Args:
        function: called without arguments; its result, or the error that it raises, must be picklable.

    Returns:
        Its result.
    """
    return call_in_asking_copy(lambda ask: function(), _no_answer)


def _no_answer(question: Any) -> Any:
    raise AssertionError("a function without `ask` asks nothing")


def call_in_asking_copy(function: Callable[[Ask], Result], answer: Ask) -> Result:
    """Call a function in a forked process, which may ask the original one, and return what it returns.

    Whatever it changes (attributes, random state, settings of libraries) is changed in the copy alone. Memory
    is shared until one of both writes to it, so a large model costs nothing. What it prints is printed, and
    files that it writes are written.

    An error that ends the process itself, as one in a tensor's hook does on a device that is made in Python
    (torch 2.13), is looked for in a second copy, in which all errors within backward are noted.

    Args:
        function: called with what asks the original process; its result, or the error that it raises, must
            be picklable.
        answer: answers a question, here in the original process, which has its threads.

    Returns:
        Its result.

    Raises:
        ChildFailed: if the copy ended in another way, such as by a signal.
    """
    return result_of(BegunCopy(function), function, answer)


def result_of(
    begun: BegunCopy[Result], function: Callable[[Ask], Result], answer: Ask = _no_answer
) -> Result:
    """Wait for a copy that was begun; see :func:`call_in_asking_copy` for errors.

    Args:
        begun: the copy.
        function: what runs in it.
        answer: answers a question.

    Returns:
        Its result.

    Raises:
        ChildFailed: if the copy ended without one.
    """
    try:
        return begun.result(answer)
    except ChildFailed as failure:
        if failure.exit_code != -signal.SIGABRT:
            raise
        error = _error_in_backward(function, answer)
        if error is None:
            raise
        raise ChildFailed(error, failure.exit_code) from None


def _error_in_backward(function: Callable[[Ask], Any], answer: Ask) -> str | None:
    """Call it again and watch; the last error within backward, ``None`` if there was none."""
    with tempfile.TemporaryDirectory() as folder:
        notes = Path(folder) / "last_error"

        def watched(ask: Ask) -> None:
            _note_errors_in_backward(notes)
            function(ask)

        with suppress(Exception):
            _call(watched, answer)
        return notes.read_text() if notes.is_file() else None


def _call(function: Callable[[Ask], Result], answer: Ask) -> Result:
    return BegunCopy(function).result(answer)


class BegunCopy(Generic[Result]):
    """A copy of this process in which a function has begun to run, such as beside others.

    Args:
        function: called with what asks the original process.
    """

    def __init__(self, function: Callable[[Ask], Result]) -> None:
        self._owner = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        reading, writing = os.pipe()
        listening, answering = os.pipe()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  until its result is there
        with warnings.catch_warnings():
            # Python 3.12 warns of threads that may hold locks; torch's hold none between operators.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            self._pid = os.fork()
        if self._pid == 0:
            os.close(reading)
            os.close(answering)
            os.dup2(self._errors.fileno(), _STANDARD_ERROR)
            _answer_and_end(function, writing, listening)
        os.close(writing)
        os.close(listening)
        self._pipe, self._replies = os.fdopen(reading, "rb"), os.fdopen(answering, "wb")

    def result(self, answer: Ask) -> Result:
        """Wait for what the function returns; once.

        Args:
            answer: answers a question.

        Returns:
            Its result.

        Raises:
            ChildFailed: if the copy ended without one.
        """
        while True:
            asks, content = self.next()
            if not asks:
                made: Result = content
                return made
            self.tell(answer(content))

    def next(self) -> tuple[bool, Any]:
        """Wait for its next question, or its result.

        Returns:
            Whether it is a question, and that; after a result it has ended.

        Raises:
            ChildFailed: if the copy ended without a result.
        """
        message = _read(self._pipe)
        if message is not None and message[0]:
            return True, message[1]
        code = self._ended()
        if message is None:
            raise ChildFailed(f"the process that ran it ended with exit code {code} and gave no result", code)
        returned, value, trace = message[1]
        if returned:
            return False, value
        value.__notes__ = [*getattr(value, "__notes__", ()), trace]
        raise value

    def tell(self, answer: Any) -> None:
        """Answer its last question.

        Args:
            answer: can be pickled.
        """
        with suppress(BrokenPipeError):  # it may have ended meanwhile
            _write(self._replies, pickle.dumps(answer))

    def stop(self) -> None:
        """End the copy, whose result nobody wants any more; nothing happens if it has ended."""
        pipe = getattr(self, "_pipe", None)
        if pipe is None or pipe.closed or self._owner != os.getpid():  # a copy of this process has it, too
            return
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._ended()

    def __del__(self) -> None:
        """Nobody is left who could ask for its result."""
        self.stop()

    def _ended(self) -> int:
        self._pipe.close()
        with suppress(BrokenPipeError):
            self._replies.close()
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        with self._errors as errors:
            if code not in (-signal.SIGABRT, -signal.SIGKILL):  # what C++ writes then is of no help
                errors.seek(0)
                sys.stderr.write(_WARNING_OF_TORCH.sub("", errors.read().decode(errors="replace")))
        return code


def _read(pipe: IO[bytes]) -> Any:
    """The next message, ``None`` at the end or where it breaks off."""
    head = pipe.read(_HEAD)
    if len(head) < _HEAD:
        return None
    size = int.from_bytes(head, "big")
    content = pipe.read(size)
    return pickle.loads(content) if len(content) == size else None


def _write(pipe: IO[bytes], content: bytes) -> None:
    pipe.write(len(content).to_bytes(_HEAD, "big") + content)
    pipe.flush()


def _answer_and_end(function: Callable[[Ask], Any], writing: int, listening: int) -> NoReturn:
    status = 1
    try:
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        with os.fdopen(writing, "wb") as pipe, os.fdopen(listening, "rb") as replies:

            def ask(question: Any) -> Any:
                _write(pipe, pickle.dumps((True, question)))
                return _read(replies)

            _write(pipe, _answer(lambda: function(ask)))
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    finally:
        os._exit(status)  # no handlers of the original are to run here


def _answer(function: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps((False, (True, function(), "")))
    except BaseException as error:
        trace = traceback.format_exc()
        try:
            answer = pickle.dumps((False, (False, error, trace)))
            pickle.loads(answer)  # an error whose constructor wants other arguments can be written, not read
            return answer
        except Exception:
            return pickle.dumps((False, (False, RuntimeError(f"{type(error).__name__}: {error}"), trace)))


def _note_errors_in_backward(notes: Path) -> None:
    """Keep a file with the last error that came through a frame within backward, from now on."""

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
        if not is_backward_running():
            return None
        frame.f_trace_lines = False
        return on_event

    def on_event(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "exception":
            kind, value, _ = argument
            site = user_location() or f"{frame.f_code.co_filename}:{frame.f_lineno}"
            notes.write_text(f"{kind.__name__}: {value} (in backward, at {site})")
        return on_event

    sys.settrace(on_call)
