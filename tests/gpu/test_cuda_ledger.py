"""The ledger and the allocator on a CUDA device. Plain `unittest`, since pytest may be absent there."""

import gc
import unittest

import torch
from torch import nn

from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import Category
from lightning_memtrain.ledger import OpWorkspace, allocator_statistics

HAS_CUDA = torch.cuda.is_available()


def rounded(num_bytes):
    return -(-num_bytes // 512) * 512


@unittest.skipUnless(HAS_CUDA, "no CUDA device")
class CudaLedgerTest(unittest.TestCase):
    def setUp(self):
        gc.collect()
        self.device = torch.device("cuda", 0)

    def test_counts_equal_those_on_cpu_and_meta(self):
        def step(device):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8)).to(device)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=False)
            batch = torch.ones(32, 64, device=device)
            with MemoryLedger(model, optimizer, batch) as ledger:
                model(batch).sum().backward()
                optimizer.step()
            return ledger.breakdown()

        on_cuda, on_cpu, on_meta = step("cuda"), step("cpu"), step("meta")
        self.assertEqual(on_cuda.at_peak, on_cpu.at_peak)
        self.assertEqual(on_cuda.maxima, on_meta.maxima)
        self.assertEqual(on_cuda.timeline, on_cpu.timeline)

    def test_elementwise_ops_equal_the_allocator_exactly(self):
        model = nn.Linear(3, 5, device=self.device)
        allocator = allocator_statistics(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        with MemoryLedger(model) as ledger:
            allocator.start()
            x = torch.zeros(1000, device=self.device)
            y = x + 1
            del x, y
            reading = allocator.stop()
        self.assertEqual(reading.peak_bytes, allocated + 2 * rounded(4000))
        self.assertEqual(reading.over_start_bytes, 2 * rounded(4000))
        self.assertEqual(ledger.breakdown().ledger_peak_bytes, ledger.breakdown().start_bytes + 8000)

    def test_backward_on_the_autograd_thread_is_counted_and_named(self):
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).to(self.device)
        batch = torch.ones(32, 64, device=self.device)
        with MemoryLedger(model, inputs=batch) as ledger:
            model(batch).sum().backward()
        breakdown = ledger.breakdown()
        self.assertEqual(breakdown.maxima[Category.GRADIENTS], (64 * 64 + 64) * 4)
        self.assertIn("backward 1", [event.name for event in breakdown.timeline])
        self.assertEqual(breakdown.growth, ())

    def test_workspace_of_an_op_is_measured_without_touching_the_generators(self):
        state = torch.cuda.get_rng_state(self.device)
        workspace = OpWorkspace(self.device)
        model = nn.Conv2d(8, 8, 3, device=self.device)
        batch = torch.ones(4, 8, 16, 16, device=self.device)
        with MemoryLedger(model, inputs=batch, workspace=workspace) as ledger:
            model(batch).sum().backward()
        self.assertGreaterEqual(ledger.predicted_peak_bytes, ledger.breakdown().ledger_peak_bytes)
        self.assertEqual(workspace.unmeasured, {})
        self.assertTrue(torch.equal(state, torch.cuda.get_rng_state(self.device)))


if __name__ == "__main__":
    unittest.main()
