"""One microbatch: the gradients of the step before are gone during the forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loops.optimization.automatic import Closure
from torch import Tensor, nn

from lightning_memtrain.core import Category, MemoryBreakdown
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.microbatching import Microbatching
from tests.helpers.trainers import assert_training_loop_is_as_found
from tests.helpers.twin_runs import Run, assert_same_run, train

NUM_SAMPLES, WIDTH = 128, 32


def whole() -> Microbatching:
    """A single chunk, so that nothing changes but when gradients are zeroed."""
    return Microbatching(num_microbatches=1)


class Net(LightningModule):
    """Compares all samples at the end of forward, which is the peak: backward needs less than that."""

    def __init__(self) -> None:
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(4, WIDTH, bias=False), *layers)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        features = self.net(batch)
        self.log("similarity", (features @ features.T).detach().square().mean())
        loss = features.square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Ledger(Callback):
    """Counts forward and backward of one batch."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx
        self.ledger: MemoryLedger

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch_idx:
            self.ledger = MemoryLedger(pl_module, trainer.optimizers, batch)
            self.ledger.__enter__()

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == self.batch_idx:
            self.ledger.__exit__(None, None, None)

    @property
    def breakdown(self) -> MemoryBreakdown:
        return self.ledger.breakdown()


def batches(num: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(NUM_SAMPLES, 4, generator=generator) for _ in range(num)]


def count(folder: Path, *callbacks: Callback) -> MemoryBreakdown:
    """The second step: the first one that finds gradients."""
    ledger = Ledger(1)
    train(Net, batches(), folder, *callbacks, ledger, max_epochs=1)
    return ledger.breakdown


def gradients_in_forward(breakdown: MemoryBreakdown) -> set[int]:
    names = [event.name for event in breakdown.timeline]
    first, last = names.index("forward net.0"), names.index("forward net.6")
    return {event.held[Category.GRADIENTS] for event in breakdown.timeline[first : last + 1]}


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.01}], ids=["", "window", "clip"]
)
def test_the_run_is_equal_to_the_bit(options: dict[str, Any], tmp_path: Path):
    plain = train(Net, batches(), tmp_path, **options)
    early = train(Net, batches(), tmp_path, whole(), **options)
    assert len(plain.observed.gradients) >= 2
    assert_same_run(plain, early, rtol=0, atol=0)


def test_no_gradient_is_held_during_forward(tmp_path: Path):
    gradient_bytes = 4 * (4 * WIDTH + 3 * WIDTH * WIDTH)
    assert gradients_in_forward(count(tmp_path)) == {gradient_bytes}
    assert gradients_in_forward(count(tmp_path, whole())) == {0}


def test_a_peak_at_the_end_of_forward_is_lower_by_the_gradients(tmp_path: Path):
    plain, early = count(tmp_path), count(tmp_path, whole())
    gradient_bytes = plain.maxima[Category.GRADIENTS]
    assert plain.at_peak[Category.GRADIENTS] == gradient_bytes
    assert early.at_peak[Category.GRADIENTS] == 0
    assert plain.ledger_peak_bytes - early.ledger_peak_bytes == gradient_bytes


def test_within_a_window_gradients_are_kept(tmp_path: Path):
    held: list[bool] = []

    class Watches(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            held.append(self.net[0].weight.grad is not None)
            return super().training_step(batch, batch_idx)

    train(Watches, batches(), tmp_path, whole(), max_epochs=1, accumulate_grad_batches=2)
    assert held == [False, True, False, True]


def hooks_of(folder: Path, *callbacks: Callback) -> tuple[list[str], Run]:
    called: list[str] = []

    class Notes(Net):
        def optimizer_zero_grad(self, *args: Any) -> None:
            called.append("zero_grad")
            super().optimizer_zero_grad(*args)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            called.append("forward")
            return super().training_step(batch, batch_idx)

        def on_before_backward(self, loss: Tensor) -> None:
            called.append("backward")

    return called, train(Notes, batches(1), folder, *callbacks, max_epochs=1)


def test_only_the_order_of_hooks_changes(tmp_path: Path):
    assert hooks_of(tmp_path)[0] == ["forward", "zero_grad", "backward"]
    called, run = hooks_of(tmp_path, whole())
    assert called == ["zero_grad", "forward", "backward"]
    assert_training_loop_is_as_found(run.trainer)


def test_a_step_without_a_loss_is_skipped(tmp_path: Path):
    class Skips(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    Closure.warning_cache.clear()  # it warns once per process
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        plain = train(Skips, batches(), tmp_path)
    # Lightning warns once per process.
    early = train(Skips, batches(), tmp_path, whole())
    assert torch.equal(plain.model.net[0].weight, early.model.net[0].weight)
