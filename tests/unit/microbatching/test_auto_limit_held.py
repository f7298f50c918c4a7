"""A limit of automatic sizes holds with what lives beside the step, and with what chunks leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.core import KIB
from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.report import MemoryProfiler
from tests.helpers.held import Average
from tests.helpers.trainers import LIGHTNING_WARNINGS, LedgerPeaks, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

NUM_SAMPLES, WIDTH = 64, 32
HELD = 64 * KIB


class Net(LightningModule):
    """A few layers, and whatever a test gives it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(6)))
        vars(self).update(attributes)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layers(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Keeps(Net):
    """A cache that the first chunk makes, and features of each chunk of the last batch."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if not hasattr(self, "cache"):
            self.cache, self.features = torch.zeros(HELD // 4), [batch.new_zeros(0)]
            self.last = batch_idx
        if self.last != batch_idx:
            self.features, self.last = [], batch_idx
        self.features.append(batch.detach().repeat(1, 1, 2))
        return super().training_step(batch, batch_idx)


def highest(folder: Path, model: Net, *callbacks: Callback, num_steps: int = 4) -> int:
    """By the profiler, and by a ledger that counts probes as well."""
    profiler, peaks = MemoryProfiler(every_n_steps=1, report_dir=folder), LedgerPeaks()
    torch.manual_seed(0)
    batches = DataLoader([torch.ones(NUM_SAMPLES, 8, WIDTH)] * num_steps, batch_size=None)
    quiet_trainer(folder, *callbacks, profiler, peaks).fit(model, batches)
    assert profiler.report is not None
    return max([step.peak_bytes for step in profiler.report.steps] + peaks.peaks)


def auto(limit_bytes: int) -> Microbatching:
    return Microbatching(microbatch_size="auto", limit=limit_bytes)


@pytest.mark.parametrize(
    "held", [lambda one: one, lambda one: [nn.Parameter(one)]], ids=["tensor", "teacher"]
)
def test_what_is_held_and_not_used_is_in_the_limit(held: Any, tmp_path: Path) -> None:
    limit = highest(tmp_path, Net()) + 10 * KIB
    callbacks = auto(limit), auto(limit)
    assert highest(tmp_path, Net(), callbacks[0]) <= limit
    assert highest(tmp_path, Net(kept=held(torch.zeros(HELD // 4))), callbacks[1]) <= limit
    assert callbacks[0].microbatch_size == NUM_SAMPLES
    assert callbacks[1].microbatch_size == NUM_SAMPLES // 2


def test_what_comes_to_be_held_later_is_in_the_limit_of_later_steps(tmp_path: Path) -> None:
    limit = highest(tmp_path, Net()) + 10 * KIB  # less than the copy of the weights
    microbatching = auto(limit)
    assert highest(tmp_path, Net(), Average("layers", after=2), microbatching) <= limit
    first, second = microbatching.technique_record().events
    assert first.startswith(f"step 0: microbatch_size={NUM_SAMPLES} of {NUM_SAMPLES} samples: ")
    assert second.startswith("step 2: microbatch_size=32 of 64 samples, with more that is kept from batch")


@pytest.mark.parametrize("part", [0.6, 0.8, 0.9])
def test_what_chunks_leave_behind_counts_for_each_and_a_cache_once(part: float, tmp_path: Path) -> None:
    limit = int(part * highest(tmp_path, Keeps()))
    microbatching = auto(limit)
    assert highest(tmp_path, Keeps(), microbatching) <= limit
    # With the cache for each chunk no size would do.
    assert microbatching.microbatch_size is not None
    assert microbatching.microbatch_size > 1


def test_a_limit_below_what_is_held_is_refused_with_its_row(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"64\.\d\d KiB of what is held beside the step"):
        highest(tmp_path, Net(kept=torch.zeros(HELD // 4)), auto(HELD + 20 * KIB))
