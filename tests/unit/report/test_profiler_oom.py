from __future__ import annotations

import pytest
import torch

from lightning_memtrain.report.oom import is_out_of_memory


def _raised_from(cause: BaseException) -> BaseException:
    error = RuntimeError("the step failed")
    error.__cause__ = cause
    return error


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.OutOfMemoryError("anything"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 10.76 GiB total capacity)"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.01 GB)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried"
    ),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a"),
    MemoryError(),
    _raised_from(torch.OutOfMemoryError("CUDA out of memory")),
]
OTHER = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ValueError("the cache is out of memory addresses"),
    KeyboardInterrupt(),
    _raised_from(ValueError("wrong label")),
]


@pytest.mark.parametrize("exception", OUT_OF_MEMORY, ids=repr)
def test_out_of_memory_is_recognised(exception: BaseException):
    assert is_out_of_memory(exception)


@pytest.mark.parametrize("exception", OTHER, ids=repr)
def test_other_errors_are_not(exception: BaseException):
    assert not is_out_of_memory(exception)


def test_the_cpu_allocator_itself():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8, device="cpu")
    assert is_out_of_memory(caught.value)
