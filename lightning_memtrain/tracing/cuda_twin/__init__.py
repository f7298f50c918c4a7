"""A GPU that is not there: a device that torch treats as CUDA, whose tensors hold no data.

It lasts for the life of a process, and changes what torch's names mean in it: see
:mod:`lightning_memtrain.planning.prediction.forked` for a process to have it in.
"""

from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend
from lightning_memtrain.tracing.cuda_twin.device_mode import TwinDeviceMode
from lightning_memtrain.tracing.cuda_twin.registration import install, refuse_no_twin, why_no_twin

__all__ = ["DEVICE_TYPE", "TwinBackend", "TwinDeviceMode", "install", "refuse_no_twin", "why_no_twin"]
