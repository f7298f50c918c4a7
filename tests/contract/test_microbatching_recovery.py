"""Running out of memory anywhere in a step leaves no trace: the run equals one in which it never happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.sparsity import RigL, SparseTraining, UpdateEvery
from tests.helpers.faults import FailAt, FailAtOp
from tests.helpers.trainers import LIGHTNING_WARNINGS
from tests.helpers.twin_runs import Run, assert_same_run, train

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

NUM_SAMPLES = 8


class Noisy(LightningModule):
    """Dropout, batch normalisation, a metric and a buffer of its own: all that a second try must not see."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)
        ).double()
        self.total = SumMetric()
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen += batch.sum()
        loss = self.net(batch).square().mean()
        self.total.update(batch.new_tensor(len(batch)))
        self.log("total", self.total, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class FailInStep(Callback):
    """Fails at one operator of the closure of one batch.

    Args:
        batch_idx: the batch.
        number: operators of its closure to let pass.
    """

    def __init__(self, batch_idx: int, number: int) -> None:
        self.batch_idx = batch_idx
        self.mode = FailAtOp(number)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            self.mode.__enter__()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._leave(trainer)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._leave(trainer)

    def _leave(self, trainer: Any) -> None:
        # From the optimizer's step on, parameters change and nothing can be run again.
        if self.mode in torch.utils._python_dispatch._get_current_dispatch_mode_stack():
            self.mode.__exit__(None, None, None)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_SAMPLES, 3, generator=generator, dtype=torch.float64) for _ in range(3)]


class SizeFromBatch(Callback):
    """Changes the size of the chunks before a batch, as a failure in it would, without the failure."""

    def __init__(self, microbatching: Microbatching, batch_idx: int, size: int) -> None:
        self.microbatching, self.batch_idx, self.size = microbatching, batch_idx, size

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            state = self.microbatching.state_dict()
            self.microbatching.load_state_dict(state | {"microbatch_size": self.size})


def run(folder: Path, *callbacks: Callback, microbatching: Microbatching, accumulate: int) -> Run:
    options = {"max_epochs": 1, "accumulate_grad_batches": accumulate}
    return train(Noisy, batches(), folder, microbatching, *callbacks, **options)


class OnlyLinear(Noisy):
    """Layers whose gradients a method looks at."""

    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8)]
        self.net = nn.Sequential(*layers).double()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_what_the_backward_of_a_failed_attempt_chose_leaves_no_trace(accumulate: int, tmp_path: Path) -> None:
    """RigL grows after the step. With a window, batches before have chosen candidates already."""

    def trained(microbatching: Microbatching, *callbacks: Callback) -> Run:
        steps = 3 // accumulate
        sparse = SparseTraining(RigL(0.75, drop=0.5), UpdateEvery(steps, stop=1.0))
        options = {"max_steps": steps, "max_epochs": -1, "accumulate_grad_batches": accumulate}
        return train(OnlyLinear, batches(), tmp_path, sparse, microbatching, *callbacks, **options)

    auto = {"microbatch_size": "auto", "limit": "1GiB"}
    spared, redone, failure = Microbatching(**auto), Microbatching(**auto), FailAt("backward", batch_idx=2)
    without = trained(spared, SizeFromBatch(spared, 2, 4))
    failed = trained(redone, failure)
    assert failure.done
    assert redone.microbatch_size == 4
    assert_same_run(without, failed, rtol=0, atol=0)
    # The probe, which is in the first batch, leaves none either.
    fixed = trained(Microbatching(microbatch_size=NUM_SAMPLES))
    assert_same_run(fixed, trained(Microbatching(**auto)), rtol=0, atol=0)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What a probe finds, by the length of the window, so that not each of many runs has to probe."""
    states = {}
    for accumulate in (1, 3):
        microbatching = Microbatching(microbatch_size="auto", limit="1GiB")
        run(tmp_path_factory.mktemp("found"), microbatching=microbatching, accumulate=accumulate)
        states[accumulate] = microbatching.state_dict() | {"num_clean_batches": 0}
    return states


# Every operator, in parts for several workers; a window only adds gradients that are set back.
@pytest.mark.parametrize(
    ("accumulate", "first", "stride"), [*((1, first, 8) for first in range(8)), (3, 0, 8), (3, 4, 8)]
)
def test_a_failure_at_any_operator_leaves_no_trace(
    accumulate: int, first: int, stride: int, found: dict[int, Any], tmp_path: Path
) -> None:
    def auto() -> Microbatching:
        made = Microbatching(microbatch_size="auto", limit="1GiB")
        made.load_state_dict(found[accumulate])
        return made

    never = run(tmp_path, microbatching=auto(), accumulate=accumulate)
    spared = auto()
    without = run(tmp_path, SizeFromBatch(spared, 1, 4), microbatching=spared, accumulate=accumulate)
    number, num_redone = first, 0
    while True:
        microbatching, failure = auto(), FailInStep(1, number)
        failed = run(tmp_path, failure, microbatching=microbatching, accumulate=accumulate)
        if not failure.mode.done:
            break  # the step has no more operators
        number += stride
        if microbatching.microbatch_size == NUM_SAMPLES:
            assert_same_run(never, failed, rtol=0, atol=0)  # failed before the batch was begun
        else:
            num_redone += 1
            step = 1 if accumulate == 1 else 0
            assert microbatching.technique_record().events == (
                f"step {step}: out of memory at microbatch_size=8; microbatch_size=4 from here",
            )
            assert_same_run(without, failed, rtol=0, atol=0)
    assert num_redone > 50 / stride
