"""Allocator figures: exact on CPU, and read through the right calls on an accelerator."""

from types import SimpleNamespace

import pytest
import torch

from lightning_memtrain.ledger import allocator_statistics
from lightning_memtrain.ledger.device_allocator import (
    AcceleratorStatistics,
    AllocatorReading,
    CpuStatistics,
)

CPU = torch.device("cpu")


def test_cpu_peak_is_exact():
    allocator = allocator_statistics(CPU)
    allocator.start()
    a = torch.empty(1000)
    b = torch.empty(500)
    del a
    c = torch.empty(250)
    del b, c
    assert allocator.stop(start_bytes=7) == AllocatorReading(peak_bytes=7 + 6000, over_start_bytes=6000)


def test_cpu_peak_includes_what_an_operator_uses_inside():
    allocator = allocator_statistics(CPU)
    x = torch.rand(1000, 1000)
    allocator.start()
    y = x.median(dim=0)  # copies its input, which no tensor of the program shows
    del y
    assert allocator.stop().over_start_bytes >= 4_000_000


def test_stop_without_start_knows_nothing():
    assert CpuStatistics().stop() is None


def test_another_profiler_goes_first():
    allocator = allocator_statistics(CPU)
    with torch.autograd.profiler.profile(use_kineto=False, profile_memory=True):
        allocator.start()
        torch.empty(10)
        assert allocator.stop() is None


def test_meta_has_no_allocator():
    assert allocator_statistics(torch.device("meta")) is None


class FakeAllocator:
    """An accelerator's memory calls, with figures that can be set."""

    def __init__(self):
        self.allocated = self.peak = 100
        self.retries = 2

    def reset_peak_memory_stats(self, device):
        self.peak = self.allocated

    def memory_allocated(self, device):
        return self.allocated

    def max_memory_allocated(self, device):
        return self.peak

    def max_memory_reserved(self, device):
        return 4096

    def memory_stats(self, device):
        return {"num_alloc_retries": self.retries}


def test_accelerator_peak_is_reset_and_read(monkeypatch):
    fake = FakeAllocator()
    monkeypatch.setattr(torch, "cuda", fake)
    allocator = allocator_statistics(torch.device("cuda", 0))
    assert isinstance(allocator, AcceleratorStatistics)
    fake.peak = 9999  # from before
    allocator.start()
    fake.peak, fake.retries = 612, 3
    reading = allocator.stop(start_bytes=5)
    assert reading == AllocatorReading(612, 512, reserved_bytes=4096, num_alloc_retries=1)


@pytest.mark.parametrize(("current", "known"), [("mps", True), ("cuda", False)])
def test_an_accelerator_without_own_peak_goes_through_torch_accelerator(monkeypatch, current, known):
    generic = FakeAllocator()
    generic.is_available = lambda: True
    generic.current_accelerator = lambda: SimpleNamespace(type=current)
    monkeypatch.setattr(torch, "accelerator", generic)
    assert (allocator_statistics(torch.device("mps")) is not None) is known


def test_events_that_do_not_lead_to_the_end_are_no_reading():
    allocator = CpuStatistics()
    outside = torch.empty(1000)  # its release will be missing, or have the size of another time
    allocator.start()
    inside = torch.empty(500)
    del outside
    assert allocator.stop(start_bytes=4000, end_bytes=2000) is None
    allocator.start()
    del inside
    kept = torch.empty(100)
    assert allocator.stop(start_bytes=2000, end_bytes=400) == AllocatorReading(
        peak_bytes=2000, over_start_bytes=0
    )
    del kept
