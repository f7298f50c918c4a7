"""Batch normalisation under microbatching: what equals the unsplit batch, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_memtrain.microbatching import Microbatching
from tests.helpers.trainers import LIGHTNING_WARNINGS
from tests.helpers.twin_runs import Run, assert_same, assert_same_run, train

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]


class Normalised(LightningModule):
    """Two batch normalisations in a row; ``lr=0`` leaves the weights alone."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.BatchNorm2d(4, momentum=None),
        ).double()
        self.register_buffer("num_seen", torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.num_seen += len(batch)
        loss = F.softplus(self.net(batch)).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64) for size in (9, 12, 7, 9)]


def run(folder: Path, lr: float, *callbacks: Any, **options: Any) -> Run:
    return train(lambda: Normalised(lr), images(), folder, *callbacks, **options)


def buffers(run: Run) -> dict[str, Tensor]:
    return dict(run.model.named_buffers())


def test_pooled_running_statistics_are_those_of_the_unsplit_batches(tmp_path: Path) -> None:
    plain = run(tmp_path, 0.0)
    split = run(tmp_path, 0.0, Microbatching(num_microbatches=3))
    assert_same(
        {name: value for name, value in buffers(plain).items() if name.startswith("net.1")},
        {name: value for name, value in buffers(split).items() if name.startswith("net.1")},
    )
    assert int(buffers(split)["net.4.num_batches_tracked"]) == 8
    assert float(buffers(split)["num_seen"]) == float(buffers(plain)["num_seen"]) == 2 * (9 + 12 + 7 + 9)


def test_by_chunks_running_statistics_move_with_every_chunk(tmp_path: Path) -> None:
    split = run(tmp_path, 0.0, Microbatching(num_microbatches=3, batchnorm="chunk"))
    assert int(buffers(split)["net.1.num_batches_tracked"]) == 3 * 8
    assert not torch.allclose(
        buffers(split)["net.1.running_var"], buffers(run(tmp_path, 0.0))["net.1.running_var"]
    )


def test_normalised_apart_gradients_differ_and_synchronized_they_are_closer(tmp_path: Path) -> None:
    def first_gradients(*callbacks: Any) -> Tensor:
        gradients = run(tmp_path, 0.1, *callbacks, max_steps=1).observed.gradients[0]
        return torch.cat([g.flatten() for g in gradients if g is not None])

    exact = first_gradients()
    apart = first_gradients(Microbatching(num_microbatches=3))
    synchronized = first_gradients(Microbatching(num_microbatches=3, batchnorm="synchronized"))
    assert (apart - exact).norm() / exact.norm() > 0.01
    assert (synchronized - exact).norm() < (apart - exact).norm()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_synchronized_with_a_sweep_more_than_layers_the_run_is_that_of_the_unsplit_batches(
    accumulate: int, tmp_path: Path
) -> None:
    plain = run(tmp_path, 0.1, accumulate_grad_batches=accumulate)
    split = Microbatching(num_microbatches=3, batchnorm="synchronized", num_batchnorm_sweeps=3)
    assert_same_run(plain, run(tmp_path, 0.1, split, accumulate_grad_batches=accumulate))
