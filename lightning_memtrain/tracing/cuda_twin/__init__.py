"""A GPU that is not there: a device that torch treats as CUDA, whose tensors hold no data."""

from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend, install

__all__ = ["DEVICE_TYPE", "TwinBackend", "install"]
