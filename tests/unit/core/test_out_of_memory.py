from __future__ import annotations

import pytest
import torch

from lightning_memtrain.core import OutOfReach, does_not_fit, is_out_of_memory


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
    # Texts that users of torch have reported, shortened.
    torch.OutOfMemoryError("XPU out of memory. Tried to allocate 512.00 MiB."),
    RuntimeError("XPU out of memory. Tried to allocate 1.00 GiB (GPU 0; 15.56 GiB total capacity)"),
    RuntimeError("Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
    RuntimeError("Native API failed. Native API returns: -6 (PI_ERROR_OUT_OF_HOST_MEMORY)"),
    RuntimeError("HIP error: out of memory"),
    RuntimeError("hipErrorOutOfMemory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("NCCL error: unhandled cuda error, Last error: Cuda failure 2 'out of memory'"),
    RuntimeError("Bad StatusOr access: RESOURCE_EXHAUSTED: Out of memory allocating 4096 bytes"),
    RuntimeError("Invalid buffer size: 8.21 GB"),
    RuntimeError("Invalid buffer size: 19.38 GiB"),
    RuntimeError("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":830'),
    RuntimeError(
        "NVML_SUCCESS == DriverAPI::get()->nvmlInit_v2_() INTERNAL ASSERT FAILED at "
        '"../c10/cuda/CUDACachingAllocator.cpp":813, please report a bug to PyTorch.'
    ),
    RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
    RuntimeError("CUDA error: the resource allocation failed when calling `cublasLtMatmul(ltHandle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`. "),
    RuntimeError(
        "hipsolver error: HIPSOLVER_STATUS_ALLOC_FAILED, when calling `hipsolverDnCreate(handle)`. "
    ),
    RuntimeError("CUSPARSE_STATUS_ALLOC_FAILED"),
    RuntimeError("CUDA error: resource allocation failed when calling `cusparseCreate(handle)`"),
    RuntimeError("rocblas_status_memory_error"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("miopenStatusAllocFailed"),
    RuntimeError("MIOpen Error: handlehip.cpp:70: Memory not available to allocate buffer: 655360000"),
    RuntimeError("unable to mmap 64 bytes from file </torch_1_2>: Cannot allocate memory (12)"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    _raised_from(torch.OutOfMemoryError("CUDA out of memory")),
]
OTHER = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 4x8)"),
    RuntimeError(
        "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported at "
        "some other API call, so the stacktrace below might be incorrect.\nFor debugging consider passing "
        "CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    ),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("The size of tensor a (4) must match the size of tensor b (8) at non-singleton dimension 0"),
    RuntimeError("shape '[4, 8]' is invalid for input of size 16"),
    RuntimeError(
        "Given groups=1, weight of size [8, 3, 3, 3], expected input[1, 4, 8, 8] to have 3 channels"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`"),
    RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED, when calling `cusolverDnXgeqrf(handle)`"),
    RuntimeError("CUDA error: insufficient resources when calling `cusparseSpGEMM_workEstimation(handle)`"),
    RuntimeError("Native API failed. Native API returns: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"),
    RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"),
    RuntimeError("miopenStatusUnknownError"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError("Placeholder buffer size is not large enough to contain the Tensor storage of size 64"),
    RuntimeError("Invalid buffer size: -1"),
    RuntimeError("unsupported memory format option Contiguous"),
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


class KeptLimit(OutOfReach, ValueError):
    """What a technique raises that keeps a limit."""


@pytest.mark.parametrize("exception", [*OUT_OF_MEMORY, KeptLimit("4 GiB"), _raised_from(KeptLimit("4 GiB"))])
def test_what_does_not_fit_may_fit_with_fewer_samples(exception: BaseException):
    assert does_not_fit(exception)


@pytest.mark.parametrize("exception", OTHER, ids=repr)
def test_other_errors_say_nothing_of_samples(exception: BaseException):
    assert not does_not_fit(exception)


def test_a_limit_out_of_reach_is_no_lack_of_memory():
    assert not is_out_of_memory(KeptLimit("4 GiB"))
