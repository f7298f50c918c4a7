"""What only a CUDA device can show of the techniques: `make gpu`, with unittest and torch alone."""

from __future__ import annotations

import copy
import unittest

import torch
from torch import nn

from lightning_memtrain.checkpointing import Full, Nested, Sqrt, insert_checkpoints
from lightning_memtrain.checkpointing.experimental.activation_offloading import offloaded_activations

DEVICE = torch.device("cuda")


def blocks(num: int = 6, width: int = 512) -> nn.Module:
    torch.manual_seed(0)
    one = lambda: nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.3))  # noqa: E731
    return nn.Sequential(*(one() for _ in range(num))).to(DEVICE)


def gradients(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model(batch).square().sum().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@unittest.skipUnless(torch.cuda.is_available(), "no CUDA device")
class TestTechniques(unittest.TestCase):
    def test_offloaded_activations_come_back_as_they_were(self) -> None:
        model, batch = blocks(), torch.randn(4096, 512, device=DEVICE)
        twin = copy.deepcopy(model)
        expected = gradients(model, batch)
        torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(1)
        with offloaded_activations(min_bytes=2**20):
            loss = twin(batch).square().sum()
        held = torch.cuda.memory_allocated()
        loss.backward()
        for one, parameter in zip(expected, twin.parameters(), strict=True):
            self.assertTrue(torch.equal(one, parameter.grad))
        # Activations of 8 MiB each; none but the one in use is left on the device after the forward.
        self.assertLess(held, 64 * 2**20)

    def test_recomputing_draws_the_same_dropout_masks(self) -> None:
        batch = torch.randn(256, 512, device=DEVICE)
        expected = gradients(model := blocks(), batch)
        for policy in (Full(), Sqrt(), Nested()):
            twin = blocks()
            insert_checkpoints(twin, policy.groups(twin))
            for one, other in zip(expected, gradients(twin, batch), strict=True):
                self.assertTrue(torch.equal(one, other))
            for one, other in zip(model.buffers(), twin.buffers(), strict=True):
                self.assertTrue(torch.equal(one, other))


if __name__ == "__main__":
    unittest.main()
