"""The allocator's model, snapshots and devices on a CUDA device; `unittest`, since pytest may be absent."""

import gc
import tempfile
import unittest
from pathlib import Path

import torch
from torch import nn

from lightning_memtrain.report.cuda_snapshot import load_snapshot, summarize
from lightning_memtrain.tracing.allocator import Replay, settings_of
from lightning_memtrain.tracing.device import Device

HAS_CUDA = torch.cuda.is_available()
MIB = 2**20


def train(num_steps):
    """Steps of batches of several sizes, a second stream, and memory that is given back in between."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(1024, 1024), nn.GELU()) for _ in range(8))).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    side = torch.cuda.Stream()
    for step in range(num_steps):
        batch = torch.randn(512 * (1 + step % 3), 1024, device="cuda")
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.cuda.stream(side):
            other = torch.ones(3 * MIB, device="cuda")
        batch.record_stream(side)
        del batch, other
        if step == 2:
            torch.cuda.empty_cache()
    torch.cuda.synchronize()
    return model, optimizer


@unittest.skipUnless(HAS_CUDA, "no CUDA device")
class CudaAllocatorTest(unittest.TestCase):
    def setUp(self):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def recorded(self, run):
        """What ``run`` returned, and the snapshot of what the allocator did meanwhile."""
        torch.cuda.memory._record_memory_history()
        try:
            with tempfile.TemporaryDirectory() as folder:
                kept = run()
                path = Path(folder) / "snapshot.pickle"
                torch.cuda.memory._dump_snapshot(str(path))
                return kept, load_snapshot(path)
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)

    def test_every_allocation_is_where_the_device_has_it(self):
        _kept, snapshot = self.recorded(lambda: train(6))
        (device,) = snapshot.devices
        settings, missing = settings_of(device.events, device.segments, snapshot.allocator_settings)
        run = Replay(device.events, device.segments, settings)
        for event in device.events:
            run.step(event)
        comparison = run.comparison
        self.assertEqual(missing, "")
        self.assertGreater(comparison.num_allocations, 500)
        self.assertEqual(comparison.num_same_address, comparison.num_allocations)
        self.assertEqual(comparison.model_peak_reserved_bytes, comparison.real_peak_reserved_bytes)
        self.assertEqual(comparison.model_end_reserved_bytes, torch.cuda.memory_reserved())
        self.assertEqual(comparison.model_end_allocated_bytes, torch.cuda.memory_allocated())

    def test_the_report_of_a_snapshot_has_torchs_own_figures(self):
        _kept, snapshot = self.recorded(lambda: train(2))
        summary = summarize(snapshot.devices[0], snapshot.allocator_settings)
        self.assertEqual(summary.peak_allocated_bytes, torch.cuda.max_memory_allocated())
        self.assertEqual(summary.peak_reserved_bytes, torch.cuda.max_memory_reserved())
        self.assertTrue(any("test_cuda_allocator.py" in str(site.frames) for site in summary.call_sites))

    def test_what_an_allocation_was_short_of(self):
        total = torch.cuda.get_device_properties(0).total_memory

        def fail():
            with self.assertRaises(torch.cuda.OutOfMemoryError):  # noqa: PT027
                torch.empty(total, dtype=torch.uint8, device="cuda")

        _, snapshot = self.recorded(fail)
        (shortage,) = summarize(snapshot.devices[0], snapshot.allocator_settings).shortages
        self.assertEqual(shortage.requested_bytes, total)
        self.assertGreater(shortage.short_bytes, 0)

    def test_the_workspace_of_matrix_products_is_as_stated(self):
        matrix = torch.ones(256, 256, device="cuda")
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated()
        product = matrix @ matrix
        taken = torch.cuda.memory_allocated() - before - product.numel() * product.element_size()
        self.assertEqual(taken, Device.here().cublas_workspace_bytes)


if __name__ == "__main__":
    unittest.main()
