"""Two techniques that keep one limit: what is recomputed and how many samples there are at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from tests.helpers.trainers import LIGHTNING_WARNINGS, LedgerPeaks, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

NUM_SAMPLES = 256


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        blocks = (
            nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32), nn.Tanh()) for _ in range(6)
        )
        self.net = nn.Sequential(*blocks).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-4)


def train(folder: Path, *callbacks: Callback) -> tuple[int, Tensor]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(NUM_SAMPLES, 32, generator=generator, dtype=torch.float64) for _ in range(3)]
    torch.manual_seed(0)
    model, peaks = Net(), LedgerPeaks()
    trainer = quiet_trainer(folder, *callbacks, peaks)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 3
    return max(peaks.peaks), torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Tensor]:
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("part", "recomputes", "least", "most"),
    [
        (1.1, False, NUM_SAMPLES, NUM_SAMPLES),
        (0.75, True, NUM_SAMPLES, NUM_SAMPLES),
        (0.5, True, 2, NUM_SAMPLES // 2),
    ],
)
def test_both_keep_it(
    order: int,
    part: float,
    recomputes: bool,
    least: int,
    most: int,
    plain: tuple[int, Tensor],
    tmp_path: Path,
) -> None:
    limit = int(part * plain[0])
    microbatching = mt.Microbatching(microbatch_size="auto", limit=limit)
    checkpointing = mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget(limit))
    peak, weights = train(tmp_path, *[microbatching, checkpointing][::order])
    assert peak <= limit
    assert microbatching.microbatch_size is not None
    assert least <= microbatching.microbatch_size <= most
    assert (checkpointing.technique_record().settings["num_modules"] > 0) is recomputes
    torch.testing.assert_close(weights, plain[1], rtol=1e-10, atol=1e-12)


def test_what_neither_reaches_is_refused(plain: tuple[int, Tensor], tmp_path: Path) -> None:
    limit = plain[0] // 10
    techniques = [
        mt.Microbatching(microbatch_size="auto", limit=limit),
        mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget(limit)),
    ]
    with pytest.raises(MisconfigurationException, match=r"^`(MemoryBudget|Microbatching)\(limit\)` must "):
        train(tmp_path, *techniques)
