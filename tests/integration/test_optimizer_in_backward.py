"""`OptimizerInBackward` in a Trainer: equal to plain Lightning, and resumed as if never interrupted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.coordination import backward_is_partial
from lightning_memtrain.core import format_bytes
from tests.helpers.trainers import LIGHTNING_WARNINGS, LedgerPeaks, assert_torch_is_as_found, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
ROWS, WIDTH = 12, 8


class Net(LightningModule):
    """Groups, a scheduler, logs and a validation; every optimizer hook that is allowed is overridden."""

    def __init__(self, make: MakeOptimizer) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()) for _ in range(3)),
            nn.Linear(WIDTH, 1),
        )
        self.make = make
        self.num_zeroed = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # Lightning does not wind a loader forward when it resumes, so batches differ by their number only.
        batch = batch.roll(batch_idx, dims=1)
        loss = (self.net(batch) - batch[:, :1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", (self.net(batch) - batch[:, :1]).square().mean())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        self.num_zeroed += 1
        optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        weights = [p for p in self.parameters() if p.ndim > 1]
        others = [p for p in self.parameters() if p.ndim == 1]
        optimizer = self.make([{"params": weights}, {"params": others, "lr": 0.02}])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.7)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))
        return DataLoader(rows.repeat(6, 1), batch_size=ROWS)

    val_dataloader = train_dataloader


def train(make: MakeOptimizer, folder: Path, *callbacks: Any, **options: Any) -> tuple[Net, Trainer]:
    torch.manual_seed(0)
    model = Net(make)
    checkpoint = options.pop("ckpt_path", None)
    options = {"max_epochs": 3} | options
    if "plugins" in options:
        options["plugins"] = [options["plugins"]()]
    trainer = quiet_trainer(folder, *callbacks, **options)
    trainer.fit(model, ckpt_path=checkpoint)
    return model, trainer


def assert_equal(one: Net, other: Net, **tolerance: float) -> None:
    for p, q in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def sgd(parameters: Any) -> Any:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01, dampening=0.2)


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=0.01)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "SGD, Nesterov": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "AdamW": adamw,
    "Adam, fused": lambda ps: torch.optim.Adam(ps, lr=0.01, weight_decay=0.1, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, momentum=0.9),
    "SGD8bit": lambda ps: mt.precision.SGD8bit(ps, lr=0.1),
}
CLIPPING: dict[str, dict[str, Any]] = {
    "unclipped": {},
    "by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "by norm": {"gradient_clip_val": 0.1},
}


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_logs_and_counters_are_those_of_plain_lightning(
    name: str, clipping: str, tmp_path: Path
) -> None:
    make, options = OPTIMIZERS[name], CLIPPING[clipping]
    plain, plain_trainer = train(make, tmp_path, EarlyStopping("val_loss", patience=1), **options)
    callback = mt.OptimizerInBackward(clip_by_norm="two_pass")
    model, trainer = train(make, tmp_path, callback, EarlyStopping("val_loss", patience=1), **options)
    assert_equal(plain, model)
    assert trainer.global_step == plain_trainer.global_step > 6
    assert trainer.logged_metrics == plain_trainer.logged_metrics
    assert model.num_zeroed == plain.num_zeroed
    optimizers = [one.optimizers[0].state_dict() for one in (plain_trainer, trainer)]
    torch.testing.assert_close(optimizers[1], optimizers[0], rtol=0.0, atol=0.0)
    assert_torch_is_as_found(model)
    if clipping != "unclipped":
        unclipped, _ = train(make, tmp_path)
        assert not torch.equal(unclipped.net[3].weight, model.net[3].weight)


@pytest.mark.parametrize("num_microbatches", [1, 4])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_accumulated_momentum_is_that_of_plain_lightning(
    num_microbatches: int, accumulate: int, tmp_path: Path
) -> None:
    options = {"accumulate_grad_batches": accumulate}
    plain, plain_trainer = train(sgd, tmp_path, **options)
    splitting = [mt.Microbatching(num_microbatches=num_microbatches)] if num_microbatches > 1 else []
    callback = mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum())
    model, trainer = train(sgd, tmp_path, *splitting, callback, **options)
    assert_equal(plain, model, rtol=1e-4, atol=1e-6)
    # 6 batches per epoch: with 4 at a time the last window of an epoch is short.
    assert trainer.global_step == plain_trainer.global_step == {1: 18, 4: 6}[accumulate]
    torch.testing.assert_close(
        trainer.optimizers[0].state_dict(), plain_trainer.optimizers[0].state_dict(), rtol=1e-3, atol=1e-5
    )


def test_adam_accumulation_with_one_microbatch_is_adam(tmp_path: Path) -> None:
    plain, _ = train(adamw, tmp_path)
    model, _ = train(adamw, tmp_path, mt.OptimizerInBackward(mt.optimizer_in_backward.AdamA()))
    assert_equal(plain, model, rtol=1e-4, atol=1e-6)
    split, _ = train(
        adamw,
        tmp_path,
        mt.OptimizerInBackward(mt.optimizer_in_backward.AdamA()),
        mt.Microbatching(num_microbatches=4),
    )
    assert (split.net[3].weight - plain.net[3].weight).abs().max() > 1e-3


class SaveAt(Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path)


MODES: dict[str, tuple[MakeOptimizer, Callable[[], list[Any]], dict[str, Any]]] = {
    "one backward": (adamw, lambda: [mt.OptimizerInBackward()], {}),
    "two passes": (
        adamw,
        lambda: [mt.OptimizerInBackward(clip_by_norm="two_pass")],
        {"gradient_clip_val": 0.1},
    ),
    "exact momentum": (
        sgd,
        lambda: [mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum())],
        {"accumulate_grad_batches": 3},
    ),
    "exact momentum, microbatches": (
        sgd,
        lambda: [
            mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum()),
            mt.Microbatching(num_microbatches=2),
        ],
        {},
    ),
    "AdamA": (
        adamw,
        lambda: [mt.OptimizerInBackward(mt.optimizer_in_backward.AdamA())],
        {"accumulate_grad_batches": 3},
    ),
    "stochastic rounding": (
        lambda ps: mt.precision.SGD8bit(ps, lr=0.1),
        lambda: [mt.OptimizerInBackward(), mt.Microbatching(num_microbatches=1)],
        {"plugins": lambda: mt.LowPrecision("bf16-true")},
    ),
}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
@pytest.mark.parametrize("mode", MODES)
# Total batches before the save: after a step, and, with 3 to a window, within one.
@pytest.mark.parametrize("batch", [8, 9])
def test_a_resumed_run_is_the_uninterrupted_one(mode: str, batch: int, tmp_path: Path) -> None:
    make, callbacks, options = MODES[mode]
    whole, _ = train(make, tmp_path, *callbacks(), SaveAt(batch, tmp_path / "half.ckpt"), **options)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"].get("OptimizerInBackward")
    assert bool(saved) == (batch == 9 and "accumulate_grad_batches" in options)
    resumed, _ = train(make, tmp_path, *callbacks(), ckpt_path=tmp_path / "half.ckpt", **options)
    assert_equal(whole, resumed)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_window_is_resumed_with_what_took_up_its_gradients(tmp_path: Path) -> None:
    save = SaveAt(2, tmp_path / "mid.ckpt")
    train(
        sgd,
        tmp_path,
        mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum()),
        save,
        accumulate_grad_batches=2,
    )
    with pytest.raises(
        MisconfigurationException,
        match=r"`OptimizerInBackward\(accumulation\)` must be that of the run whose checkpoint is resumed.*"
        r"got accumulation=None. Use accumulation=ExactMomentum\(\), or a checkpoint",
    ):
        train(sgd, tmp_path, mt.OptimizerInBackward(), ckpt_path=tmp_path / "mid.ckpt")


@pytest.mark.parametrize("first", [True, False])
def test_checkpoints_are_exchanged_with_runs_without(first: bool, tmp_path: Path) -> None:
    def callbacks(used: bool) -> list[Any]:
        return [mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum())] if used else []

    options = {"accumulate_grad_batches": 2}
    plain, _ = train(sgd, tmp_path, **options)
    _, trainer = train(sgd, tmp_path, *callbacks(first), max_epochs=1, **options)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    model, _ = train(sgd, tmp_path, *callbacks(not first), ckpt_path=tmp_path / "first.ckpt", **options)
    assert_equal(plain, model, rtol=1e-4, atol=1e-6)


def test_stochastic_rounding_steps_each_parameter_in_backward(tmp_path: Path) -> None:
    options = {"plugins": lambda: mt.LowPrecision("bf16-true"), "max_epochs": 20}
    losses = []
    for callbacks in ([], [mt.OptimizerInBackward()]):
        model, trainer = train(adamw, tmp_path, *callbacks, **options)
        assert model.net[3].weight.dtype == torch.bfloat16
        losses.append(float(trainer.callback_metrics["val_loss"]))
        state = trainer.optimizers[0].state[model.net[3].weight]
        assert state["exp_avg"].dtype == torch.float32
        assert state["step"] == 120
    assert losses[1] == pytest.approx(losses[0], rel=0.2)


def test_everything_at_once_keeps_one_gradient(tmp_path: Path) -> None:
    class Wide(Net):
        def __init__(self, make: MakeOptimizer) -> None:
            super().__init__(make)
            self.net = nn.Sequential(
                *(nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh()) for _ in range(8))
            )

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch.repeat(1, 8)).square().mean()

        def configure_optimizers(self) -> Any:
            return self.make(self.parameters())

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, model: Any, batch: Any, batch_idx: int) -> None:
            self.ledger = mt.MemoryLedger(model, trainer.optimizers, batch)
            self.ledger.__enter__()

        def on_train_batch_end(self, *args: Any) -> None:
            self.ledger.__exit__(None, None, None)
            self.held = self.ledger.breakdown().maxima

    def gradients(*callbacks: Any) -> int:
        watch = Watch()
        trainer = quiet_trainer(
            tmp_path,
            *callbacks,
            watch,
            plugins=[mt.LowPrecision("bf16-true")],
            max_steps=3,
            limit_val_batches=0,
        )
        trainer.fit(Wide(lambda ps: mt.precision.SGD8bit(ps, lr=0.1)))
        return watch.held[mt.core.Category.GRADIENTS]

    layer = 64 * 64 * 2
    stack = [mt.ActivationCheckpointing("full"), mt.Microbatching(num_microbatches=1)]
    assert gradients(*stack) == 8 * layer
    assert gradients(*copy.deepcopy(stack), mt.OptimizerInBackward()) == layer


def test_microbatches_say_which_backward_is_the_last(tmp_path: Path) -> None:
    class Listens(Callback):
        def __init__(self) -> None:
            self.partial: list[bool] = []

        def on_before_backward(self, *args: Any) -> None:
            self.partial.append(backward_is_partial())

    listens = Listens()
    train(sgd, tmp_path, mt.Microbatching(num_microbatches=3), listens, max_steps=2)
    assert listens.partial == [True, True, False] * 2
    assert mt.Microbatching(microbatch_size="auto").repeats_backward
    assert mt.Microbatching(num_microbatches=2, batchnorm="synchronized").repeats_backward
    assert not mt.Microbatching(num_microbatches=2).repeats_backward


def test_the_report_counts_momentum_and_gradients_once(tmp_path: Path) -> None:
    profiler = mt.MemoryProfiler(report_dir=tmp_path)
    callback = mt.OptimizerInBackward(mt.optimizer_in_backward.ExactMomentum())
    model, _ = train(sgd, tmp_path, callback, mt.Microbatching(num_microbatches=3), profiler)
    report = mt.MemoryReport.load(tmp_path / "memory_report.json")
    assert "OptimizerInBackward" in {record.name for record in report.techniques}
    breakdown = report.stages["fit"]
    held = sum(p.nbytes for p in model.parameters())
    assert sum(breakdown.at_peak.values()) == breakdown.ledger_peak_bytes
    assert (
        breakdown.maxima[mt.core.Category.GRADIENTS] + breakdown.maxima[mt.core.Category.OPTIMIZER_STATE]
        == held
    )


def test_frozen_layers_that_are_thawed_are_stepped_from_then_on(tmp_path: Path) -> None:
    class Thaws(Callback):
        def on_train_epoch_start(self, trainer: Trainer, model: Any) -> None:
            model.net[0].requires_grad_(trainer.current_epoch > 0)

    plain, _ = train(adamw, tmp_path, Thaws())
    model, _ = train(adamw, tmp_path, Thaws(), mt.OptimizerInBackward())
    assert_equal(plain, model)


@pytest.mark.filterwarnings("ignore:With clip_by_norm")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(
    ("accumulation", "options"),
    [
        (None, {}),
        (None, CLIPPING["by norm"]),
        (mt.optimizer_in_backward.ExactMomentum(), {"accumulate_grad_batches": 2}),
    ],
    ids=["plain", "clipped", "accumulated"],
)
def test_what_moves_by_gradients_moves_as_without(
    accumulation: Any, options: dict[str, Any], order: int, tmp_path: Path
) -> None:
    def sparse() -> mt.SparseTraining:
        return mt.SparseTraining(mt.sparsity.RigL(0.5, drop=0.5), mt.sparsity.UpdateEvery(2, stop=1.0))

    plain, _ = train(sgd, tmp_path, sparse(), **options)
    two_pass = "two_pass" if accumulation is None else None
    callbacks = [sparse(), mt.OptimizerInBackward(accumulation, clip_by_norm=two_pass)]
    model, _ = train(sgd, tmp_path, *callbacks[::order], **options)
    assert_equal(plain, model, **({} if accumulation is None else {"rtol": 1e-4, "atol": 1e-6}))
    unmoved, _ = train(sgd, tmp_path, mt.SparseTraining(mt.sparsity.StaticSparse(0.5)), **options)
    assert not torch.equal(unmoved.net[0][0].sparsity_pattern, model.net[0][0].sparsity_pattern)


class Tall(Net):
    """Recomputed blocks hold much more than gradients do."""

    rows = 400

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(self.rows, WIDTH, generator=torch.Generator().manual_seed(3))
        return DataLoader(rows.repeat(4, 1), batch_size=self.rows)

    val_dataloader = train_dataloader


def test_two_passes_say_so_where_they_hold_more_than_one(tmp_path: Path) -> None:
    def fit(rows: int, *techniques: Any) -> int:
        torch.manual_seed(0)
        model, peaks = Tall(adamw), LedgerPeaks(with_held=False)  # a warning is of the step alone
        model.rows = rows
        options = {"gradient_clip_val": 0.1, "limit_val_batches": 0}
        recompute = mt.ActivationCheckpointing("full")
        quiet_trainer(tmp_path, recompute, *techniques, peaks, **options).fit(model)
        return peaks.peaks[1]  # when there is state, and gradients are left from the step before

    plain_bytes = fit(Tall.rows)
    with pytest.warns(mt.core.NoEffectWarning, match="keeps the whole graph") as warned:
        two_passes_bytes = fit(Tall.rows, mt.OptimizerInBackward(clip_by_norm="two_pass"))
    assert two_passes_bytes > plain_bytes
    (message,) = [str(one.message) for one in warned if one.category is mt.core.NoEffectWarning]
    said = [text in message for text in map(format_bytes, (two_passes_bytes, plain_bytes))]
    assert said == [True, True], message

    fit(4, mt.OptimizerInBackward(clip_by_norm="two_pass"))  # gradients are the most; a warning is an error
