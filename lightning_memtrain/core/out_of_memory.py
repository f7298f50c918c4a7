"""Telling errors that say that something does not fit into memory from any other error."""

from __future__ import annotations

import gc
import re

import torch

# Devices and libraries report it as a plain RuntimeError; only the text tells. Left out are texts that have
# other causes as often: "CUBLAS_STATUS_NOT_INITIALIZED" (a failed assertion on the device), "unable to find
# an engine" (mismatched cuDNN files), "UR_RESULT_ERROR_OUT_OF_RESOURCES" (a lost XPU), "insufficient
# resources" (a limit of cuSPARSE's algorithm), "out of resource: shared memory" (a Triton kernel).
_MARKS = re.compile(
    "|".join(
        (
            r"\b[Oo]ut of memory\b",  # allocators and drivers of CUDA, HIP, XPU, MPS and XLA; NCCL, Triton
            r"hipErrorOutOfMemory",
            r"_ERROR_OUT_OF_(?:DEVICE|HOST)_MEMORY\b",  # Level Zero under XPU: UR_RESULT_..., PI_...
            r"CommandBufferCallbackErrorOutOfMemory",  # Metal under MPS
            r"Invalid buffer size: [\d.]+ [KMGT]i?B\b",  # MPS, for more than one buffer can hold
            # The allocator fails to ask NVML who holds the memory, and hides its own error.
            r"NVML_SUCCESS == .*CUDACachingAllocator",
            r"\b(?:CU|HIP)(?:BLAS|SOLVER|SPARSE)_STATUS_ALLOC_FAILED\b",
            r"\b(?:CU|HIP)(?:FFT|RAND_STATUS)_ALLOC(?:ATION)?_FAILED\b",
            r"\bresource allocation failed\b",  # cuBLAS and cuSPARSE, where torch asks them for words
            r"\brocblas_status_memory_error\b",
            r"\bCUDNN_STATUS_ALLOC_FAILED\b",
            r"\bCUDNN_STATUS_INTERNAL_ERROR_(?:DEVICE|HOST)_ALLOCATION_FAILED\b",  # since cuDNN 9
            r"cuDNN error: CUDNN_STATUS_NOT_SUPPORTED\.",  # no algorithm fits into what is left
            r"\bmiopenStatusAllocFailed\b",
            r"Memory not available to allocate buffer",  # MIOpen
            r"DefaultCPUAllocator: (?:can't allocate memory|not enough memory)",  # the latter on Windows
            r"Cannot allocate memory",  # the host, for memory shared with loader processes
            r"std::bad_alloc",
        )
    )
)


def is_out_of_memory(exception: BaseException) -> bool:
    """Whether an exception says that a device or the host ran out of memory.

    An exception that was raised ``from`` an out-of-memory error counts as one.

    Args:
        exception: any exception.

    Returns:
        ``True`` for torch's own class, Python's ``MemoryError``, and the texts of allocators and libraries.

    Example:
        >>> is_out_of_memory(RuntimeError("CUDA error: out of memory"))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    # `torch.OutOfMemoryError` is a RuntimeError without a fixed text.
    if isinstance(exception, (torch.OutOfMemoryError, MemoryError)):
        return True
    if isinstance(exception, RuntimeError) and _MARKS.search(str(exception)):
        return True
    return exception.__cause__ is not None and is_out_of_memory(exception.__cause__)


class OutOfReach(Exception):
    """What was asked for cannot be kept with as many samples at a time; with fewer it may be.

    Whoever keeps a limit raises an error that is this one, too, before anything is broken::

        class BudgetOutOfReach(OutOfReach, MisconfigurationException):
            ...

    and leaves everything as it was, so that whoever chooses how many samples there are at a time can try
    fewer (see :func:`does_not_fit`). Where nobody does, the error ends the run with its own text.
    """


def does_not_fit(exception: BaseException) -> bool:
    """Whether an exception says that fewer samples at a time may go well.

    An exception that was raised ``from`` such a one counts as one.

    Args:
        exception: any exception.

    Returns:
        ``True`` for :class:`OutOfReach`, and for all that :func:`is_out_of_memory` recognises.

    Example:
        >>> does_not_fit(OutOfReach("at least 4 GiB are needed"))
        True
        >>> does_not_fit(ValueError("4 is no prime number"))
        False
    """
    if isinstance(exception, OutOfReach) or is_out_of_memory(exception):
        return True
    return exception.__cause__ is not None and does_not_fit(exception.__cause__)


def without_frames(error: Exception) -> Exception:
    """An error that holds on to nothing of where it was raised.

    Args:
        error: any; its traceback would keep the tensors of all frames.

    Returns:
        The same.
    """
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def release_memory(device: torch.device) -> None:
    """Free what only cycles hold, and what the device's allocator keeps.

    Args:
        device: any device.
    """
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()
