"""A limit holds with what lives beside the step: teachers, averages, whatever attributes keep."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler
from lightning_memtrain.checkpointing import plan_recomputation
from lightning_memtrain.core import KIB, Category
from tests.helpers.held import Average
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

ROWS, WIDTH = 64, 32
HELD = 128 * KIB


class Net(LightningModule):
    """Blocks whose activations outweigh their weights, and whatever a test gives it."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH))]
        self.blocks = nn.ModuleList(copy.deepcopy(blocks[0]) for _ in range(6))
        vars(self).update(attributes)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        for block in self.blocks:
            batch = batch + block(batch)
        loss = batch.square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, foreach=False)


def held() -> Tensor:
    return torch.zeros(HELD // 4)


def peaks(folder: Path, model: Net, *callbacks: Callback, num_steps: int = 3) -> list[int]:
    """The most that each step held, what lies beside it included."""
    seed_everything(0, verbose=False)
    profiler = MemoryProfiler(every_n_steps=1, report_dir=folder)
    batches = DataLoader([torch.ones(ROWS, WIDTH)] * num_steps, batch_size=None)
    quiet_trainer(folder, *callbacks, profiler).fit(model, batches)
    assert profiler.report is not None
    return [step.peak_bytes for step in profiler.report.steps]


WITHOUT = {
    "attribute": lambda: {"tensor": held()},
    "hidden parameter": lambda: {"teacher": [nn.Parameter(held())]},
    "on top of views": lambda: {"views": [one := held(), one[5:], one.view(2, -1)]},
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_is_held_and_not_used_is_in_the_limit(name: str, tmp_path: Path) -> None:
    plain = max(peaks(tmp_path, Net(**WITHOUT[name]())))
    limit = plain - 40 * KIB
    callback = ActivationCheckpointing(limit)
    assert max(peaks(tmp_path, Net(**WITHOUT[name]()), callback)) <= limit
    (event,) = callback.technique_record().events
    # Counted once, and no more than there is.
    found = re.search(r"peak ([\d.]+) (KiB|MiB) instead of ([\d.]+) KiB", event)
    assert found is not None
    assert abs(float(found[3]) * KIB - plain) < KIB
    # Without it there is nothing to recompute.
    assert max(peaks(tmp_path, Net())) == plain - HELD < limit


def test_views_of_weights_are_no_more_than_weights(tmp_path: Path) -> None:
    model, other = Net(), Net()
    vars(model)["flat"] = [model.blocks[0][0].weight.data.view(-1), model.blocks[1]]
    callbacks = ActivationCheckpointing("900KiB"), ActivationCheckpointing("900KiB")
    assert peaks(tmp_path, model, callbacks[0]) == peaks(tmp_path, other, callbacks[1])
    assert callbacks[0].technique_record().events == callbacks[1].technique_record().events


def test_what_comes_to_be_held_later_is_in_the_limit_of_later_steps(tmp_path: Path) -> None:
    at_first = max(peaks(tmp_path, Net()))
    limit = at_first + 100 * KIB  # less than the copy of the weights
    assert max(peaks(tmp_path, Net(), Average("blocks", after=2), num_steps=5)) > limit
    callback = ActivationCheckpointing(limit)
    assert max(peaks(tmp_path, Net(), Average("blocks", after=2), callback, num_steps=5)) <= limit
    first, second = callback.technique_record().events
    assert first.startswith("step 0: 0 modules are recomputed")
    assert second.startswith("step 2, with more that is held beside it: ")


def test_a_limit_below_what_is_held_is_refused_with_its_row(tmp_path: Path) -> None:
    message = r"`MemoryBudget\(limit\)` must be at least .*128\.0\d KiB of what is held beside the step"
    with pytest.raises(MisconfigurationException, match=message):
        peaks(tmp_path, Net(tensor=held()), ActivationCheckpointing(HELD + 200 * KIB))


def test_a_plan_counts_what_the_model_holds() -> None:
    batch = torch.ones(ROWS, WIDTH)

    def planned(model: Net) -> Any:
        return plan_recomputation(
            model, lambda x: model.training_step(x, 0), [batch], [model.configure_optimizers()], limit="1GiB"
        )

    plain, more = planned(Net()), planned(Net(tensor=held()))
    assert more.peak_bytes - plain.peak_bytes == HELD == more.breakdown.at_peak[Category.HELD]
