"""Telling an out-of-memory error from any other error."""

from __future__ import annotations

import torch

# Devices and libraries report it as a plain RuntimeError; only the text tells.
_MARKS = (
    "out of memory",  # CUDA, HIP, XPU, MPS, NCCL
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # no algorithm fits into what is left
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
    if isinstance(exception, RuntimeError) and any(mark in str(exception) for mark in _MARKS):
        return True
    return exception.__cause__ is not None and is_out_of_memory(exception.__cause__)
