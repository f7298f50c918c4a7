"""`LowPrecision` in real runs: with everything that Lightning and this library do around a step."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain import MemoryProfiler, Microbatching
from lightning_memtrain.core import Category
from lightning_memtrain.precision import LowPrecision, ScalerConfig, SGD8bit
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer
from tests.helpers.twin_runs import Run, assert_same_run, train

# A first step that is left out for infinite gradients, and the list of batches, which has no state to save.
EXPECTED_WARNINGS = ("ignore:Detected call of `lr_scheduler.step", "ignore:You're resuming from a checkpoint")
pytestmark = [pytest.mark.filterwarnings(text) for text in (*LIGHTNING_WARNINGS, *EXPECTED_WARNINGS)]

Batch = tuple[Tensor, Tensor]


def batches(num: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(12, 6, generator=generator) for _ in range(num)]
    return [(x, x.sum(1, keepdim=True).tanh()) for x in inputs]


class Regression(LightningModule):
    """A network with a normalisation and dropout, and two schedulers."""

    def __init__(self, optimizer: str = "AdamW") -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(6, 40), nn.LayerNorm(40), nn.Tanh(), nn.Dropout(0.1), nn.Linear(40, 1)
        )
        self.optimizer = optimizer

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        kinds: dict[str, Any] = {
            "AdamW": lambda ps: torch.optim.AdamW(ps, lr=1e-2),
            "SGD": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True),
            "SGD8bit": lambda ps: SGD8bit(ps, lr=0.1),
        }
        optimizer = kinds[self.optimizer](self.parameters())
        per_step = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.8)
        per_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": per_step, "interval": "step"}, {"scheduler": per_epoch}]


class NoNoise(Regression):
    """Without dropout, which draws other numbers for chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3] = nn.Identity()


@dataclass
class Case:
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Any = tuple


CASES = {
    "plain": Case(),
    "accumulated": Case({"accumulate_grad_batches": 3}),
    "clipped by norm": Case({"gradient_clip_val": 0.05}),
    "clipped by value": Case({"gradient_clip_val": 0.005, "gradient_clip_algorithm": "value"}),
    "microbatched": Case(callbacks=lambda: [Microbatching(num_microbatches=3)]),
    "microbatched, accumulated, clipped": Case(
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
        lambda: [Microbatching(microbatch_size=5)],
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD8bit"])
def test_at_its_identity_setting_it_is_lightning_to_the_bit(
    name: str, optimizer: str, tmp_path: Path
) -> None:
    case, runs = CASES[name], []
    for plugins in (None, [LowPrecision("32-true", weight_rounding="nearest")]):
        options = case.trainer | {"plugins": plugins}
        runs.append(train(lambda: Regression(optimizer), batches(), tmp_path, *case.callbacks(), **options))
    assert_same_run(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_lightnings_to_the_bit(name: str, precision: Any, tmp_path: Path) -> None:
    case, runs = CASES[name], []
    for plugin in (MixedPrecision(precision, "cpu"), LowPrecision(precision)):
        options = case.trainer | {"plugins": [plugin]}
        runs.append(train(Regression, batches(), tmp_path, *case.callbacks(), **options))
    assert_same_run(*runs, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "SGD8bit"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_trains_as_float32_does(
    name: str, precision: Any, optimizer: str, tmp_path: Path
) -> None:
    case = CASES[name]

    def run(*plugins: Any) -> Run:
        options = case.trainer | {"plugins": list(plugins), "max_epochs": 4}
        return train(lambda: Regression(optimizer), batches(), tmp_path, *case.callbacks(), **options)

    full, half = run(), run(LowPrecision(precision))
    assert half.observed.global_steps == full.observed.global_steps
    rates = [[g["lr"] for g in r.trainer.optimizers[0].param_groups] for r in (full, half)]
    assert rates[0] == rates[1]
    norm = half.model.net[1]
    assert {p.dtype for p in norm.parameters()} == {torch.float32}
    assert {p.dtype for p in half.model.parameters()} == {torch.float32, half.model.dtype}
    assert [len(g) for g in half.observed.gradients] == [len(g) for g in full.observed.gradients]
    losses = [r.observed.on_epoch[-1]["loss"].item() for r in (full, half)]
    assert losses[1] == pytest.approx(losses[0], rel=0.1, abs=0.003)
    # What hooks see of gradients is not scaled.
    norms = [torch.stack([g.float().norm() for g in r.observed.gradients[0]]).norm() for r in (full, half)]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.05)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_microbatches_give_the_gradient_of_the_batch_up_to_rounding(precision: Any, tmp_path: Path) -> None:
    options = {"plugins": [LowPrecision(precision)], "max_steps": 1}
    whole = train(NoNoise, batches(), tmp_path, **options)
    split = train(NoNoise, batches(), tmp_path, Microbatching(num_microbatches=4), **options)
    for one, other in zip(whole.observed.gradients[0], split.observed.gradients[0], strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * one.float().norm() + 1e-6


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed"])
def test_saved_mid_run_and_resumed_is_uninterrupted_to_the_bit(
    precision: Any, early: bool, tmp_path: Path
) -> None:
    scaler = None if precision == "bf16-true" else ScalerConfig(init_scale=8.0, growth_interval=4)
    data = DataLoader(batches(), batch_size=None)

    class SaveAt(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(trainer.global_step)  # dropout
            # A list of batches begins anew when a run is resumed.
            for given, due in zip(batch, batches()[trainer.global_step % 8], strict=True):
                given.copy_(due)

    def run(seed: int, **fit: Any) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        model, plugin = Regression(), LowPrecision(precision, scaler=scaler, seed=seed)
        callbacks = [SaveAt(), Microbatching(num_microbatches=1)] if early else [SaveAt()]
        trainer = quiet_trainer(tmp_path, *callbacks, max_epochs=2, plugins=[plugin], gradient_clip_val=0.5)
        trainer.fit(model, data, **fit)
        state = trainer.optimizers[0].state_dict()["state"]
        scale = None if plugin.scaler is None else plugin.scaler.state_dict()
        moments = [v for s in state.values() for v in s.values()]
        assert {v.dtype for v in moments} == {torch.float32}
        return [*model.state_dict().values(), *moments], scale, plugin._noise.state_dict()

    tensors, scale, noise = run(seed=0)
    resumed = run(seed=99, ckpt_path=tmp_path / "mid.ckpt")
    assert all(torch.equal(*pair) for pair in zip(tensors, resumed[0], strict=True))
    assert scale == resumed[1]
    assert precision == "16-mixed" or noise == resumed[2]
    assert scale is None or scale["scale"] > 8.0


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("before", [None, LowPrecision], ids=["Lightning", "nearest"])
@pytest.mark.filterwarnings("ignore:The checkpoint was written without")
def test_moments_of_a_run_in_half_precision_become_float32(
    before: Any, optimizer: str, tmp_path: Path
) -> None:
    data = DataLoader(batches(), batch_size=None)
    half: dict[str, Any] = {"precision": "bf16-true"}
    if before is not None:
        half = {"plugins": [LowPrecision("bf16-true", weight_rounding="nearest")]}
    first = quiet_trainer(tmp_path, **half)
    first.fit(Regression(optimizer), data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    saved = first.optimizers[0].state_dict()["state"]
    loaded: list[Any] = []

    class Looks(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            loaded.append(copy.deepcopy(trainer.optimizers[0].state_dict()["state"]))

    resumed = quiet_trainer(tmp_path, Looks(), plugins=[LowPrecision("bf16-true")], max_epochs=2)
    resumed.fit(Regression(optimizer), data, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.global_step == 16
    for state in (loaded[0], resumed.optimizers[0].state_dict()["state"]):
        moments = [value for one in state.values() for value in one.values() if value is not None]
        assert {value.dtype for value in moments} == {torch.float32}
    for number, state in saved.items():
        for name, value in state.items():
            assert value is None or torch.equal(loaded[0][number][name], value.float())


def test_seeds_decide_and_nothing_else_does(tmp_path: Path) -> None:
    def weights(seed: int, draw: int = 0) -> Tensor:
        class Draws(Callback):
            def on_before_optimizer_step(self, *args: Any) -> None:
                torch.rand(draw)

        run = train(NoNoise, batches(), tmp_path, Draws(), plugins=[LowPrecision(seed=seed)])
        return run.model.net[0].weight

    assert torch.equal(weights(0), weights(0, draw=3))
    assert not torch.equal(weights(0), weights(1))


def test_training_leaves_the_global_generator_as_plain_lightning_does(tmp_path: Path) -> None:
    states = []
    for plugins in (None, [LowPrecision()]):
        train(Regression, batches(), tmp_path, plugins=plugins)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


class Skips(Regression):
    """Returns no loss for every other batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "16-mixed"])
@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_batches_without_a_loss(precision: Any, tmp_path: Path) -> None:
    scaler = None if precision == "bf16-true" else ScalerConfig(init_scale=8.0)
    run = train(Skips, batches(), tmp_path, plugins=[LowPrecision(precision, scaler=scaler)], max_epochs=1)
    assert run.trainer.global_step == 8
    steps = {int(state["step"]) for state in run.trainer.optimizers[0].state.values()}
    assert steps == {4}


class Overflows(Regression):
    """One batch whose gradients are infinite in float16."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * 60000.0 if batch_idx == 3 else loss


def test_a_step_with_infinite_gradients_is_left_out(tmp_path: Path) -> None:
    plugin = LowPrecision("16-true")
    run = train(Overflows, batches(), tmp_path, plugins=[plugin], max_epochs=1)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 2.0**14
    assert {int(state["step"]) for state in run.trainer.optimizers[0].state.values()} == {7}
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert plugin.technique_record().events == ("1 steps left out for infinite gradients",)


class Undefined(Regression):
    """Gradients are not a number, in the first of its runs."""

    broken = True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (float("nan") if self.broken else 1.0)


def test_a_run_whose_every_step_is_left_out_ends_and_the_plugin_can_train_again(tmp_path: Path) -> None:
    plugin = LowPrecision("16-true", scaler=ScalerConfig(init_scale=1024.0))
    data = DataLoader(batches(50), batch_size=None)
    model = Undefined()
    trainer = quiet_trainer(tmp_path, plugins=[plugin])
    with pytest.raises(
        FloatingPointError, match=r"40 steps in a row.* these steps: 1024, 512, 256, .*, 1.86265e-09."
    ):
        trainer.fit(model, data)
    assert trainer.global_step == 39
    assert plugin.technique_record().events == ("40 steps left out for infinite gradients",)
    assert {len(state) for state in trainer.optimizers[0].state.values()} <= {0}
    model.broken = False
    again = quiet_trainer(tmp_path, plugins=[plugin])
    again.fit(model, data)
    assert plugin.scaler is not None
    assert plugin.scaler.get_scale() == 1024.0
    assert plugin.technique_record().events == ()
    assert {int(state["step"]) for state in again.optimizers[0].state.values()} == {50}


class Adversarial(Regression):
    """Two optimizers, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward((self.net(batch[0]) - batch[1]).square().mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0].parameters(), self.net[4].parameters()
        return torch.optim.Adam(first, lr=1e-2), torch.optim.SGD(last, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("precision", ["16-true", "16-mixed"])
def test_each_fit_begins_with_a_scale_of_its_own(precision: Any, tmp_path: Path) -> None:
    plugin = LowPrecision(precision, scaler=ScalerConfig(init_scale=8.0, growth_interval=8))
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, plugins=[plugin])
        trainer.fit(Regression(), DataLoader(batches(), batch_size=None))
        assert plugin.scaler is not None
        assert plugin.scaler.get_scale() == 16.0  # after 8 steps


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_manual_optimization(precision: Any, tmp_path: Path) -> None:
    errors = []
    for plugins in (None, [LowPrecision(precision)]):
        run = train(Adversarial, batches(), tmp_path, plugins=plugins, max_epochs=4)
        assert run.trainer.global_step == 2 * 8 * 4
        x, y = batches()[0]
        with torch.no_grad():
            output = run.model.eval().net(x.to(run.model.dtype))
        errors.append((output - y).square().mean().item())
    assert errors[1] == pytest.approx(errors[0], rel=0.1)


def test_it_shows_in_the_memory_report_with_its_bytes(tmp_path: Path) -> None:
    profiler = MemoryProfiler(report_dir=tmp_path)
    train(Regression, batches(), tmp_path, profiler, plugins=[LowPrecision()], max_epochs=1)
    report = profiler.report
    assert report is not None
    assert [record.name for record in report.techniques] == ["LowPrecision"]
    # 321 numbers in layers, and 80 in the normalisation, which stay in float32.
    held = report.stages["fit"].maxima
    assert held[Category.PARAMETERS] == held[Category.GRADIENTS] == 2 * 321 + 4 * 80
    # Two moments of each in float32, and a count of steps for each of six parameters.
    assert held[Category.OPTIMIZER_STATE] == 2 * 4 * 401 + 4 * 6


class Counts(Regression):
    """A layer that counts and averages in buffers, and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 6)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("average", torch.zeros(6))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.seen += 1
        self.average.mul_(0.999).add_((batch[0] + 3).mean(0), alpha=0.001)
        x = batch[0] + self.embedding(torch.arange(12) % 3)
        return (self.net(x) - batch[1]).square().mean()


def test_counts_and_averages_are_those_of_float32(tmp_path: Path) -> None:
    full, half = Counts(), Counts()
    for model, plugins in ((full, None), (half, [LowPrecision(keep_in_fp32=("norm", "embedding"))])):
        trainer = quiet_trainer(tmp_path, plugins=plugins)
        trainer.fit(model, DataLoader(batches(300), batch_size=None))
    assert half.seen.item() == full.seen.item() == 300
    assert half.average.dtype == half.embedding.weight.dtype == torch.float32
    torch.testing.assert_close(half.average, full.average, rtol=0, atol=1e-3)
    assert half.net[0].weight.dtype == torch.bfloat16


class Rates(torch.optim.SGD):
    """Counts for itself, in a dictionary, and sets its rate by that."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.history = {"steps": 0}

    def step(self, closure: Any = None) -> Any:
        self.history["steps"] += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.history["steps"]
        return super().step(closure)


def test_an_optimizer_that_counts_for_itself_counts_steps(tmp_path: Path) -> None:
    model = Regression()
    model.configure_optimizers = lambda: Rates(model.parameters())  # type: ignore[method-assign]
    plugin = LowPrecision(bucket_numel=1)
    trainer = quiet_trainer(tmp_path, plugins=[plugin], max_steps=3)
    with pytest.warns(UserWarning, match="steps Rates on all weights at once, since its step changes his"):
        trainer.fit(model, DataLoader(batches(), batch_size=None))
    assert trainer.optimizers[0].history == {"steps": 3}
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.1 / 3
    said = "stepped Rates on all weights at once, since its step changes history['steps']"
    assert plugin.technique_record().events == (said,)


def test_a_change_of_a_buffer_that_no_text_tells_of_is_warned_of_in_training_only(tmp_path: Path) -> None:
    class Hidden(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3))

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            for buffer in list(self.buffers())[:1]:
                buffer.add_(1)
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(tmp_path, plugins=[LowPrecision()], max_steps=2)
    with pytest.warns(UserWarning, match="keeps the buffers 'table' in half precision") as caught:
        trainer.fit(Hidden(), DataLoader(batches(), batch_size=None))
    assert len([w for w in caught if "keeps the buffers" in str(w.message)]) == 1


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_a_model_that_is_left_in_float32_is_one_for_its_own_project(precision: Any, tmp_path: Path) -> None:
    models = []
    for leave in ("half", "float32"):
        torch.manual_seed(0)
        model = Counts()
        plugin = LowPrecision(precision, leave=leave)  # type: ignore[arg-type]
        trainer = quiet_trainer(tmp_path, plugins=[plugin], max_epochs=1)
        trainer.fit(model, DataLoader(batches(), batch_size=None))
        trainer.fit_loop.max_epochs = 2  # goes on as if it had been left as it was
        trainer.fit(model, DataLoader(batches(), batch_size=None))
        models.append(model)
    half, full = models
    half_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    assert {p.dtype for p in half.parameters()} == {half_dtype, torch.float32}
    assert {p.dtype for p in full.parameters()} == {torch.float32} == {b.dtype for b in full.buffers()}
    for name, value in half.state_dict().items():
        assert torch.equal(full.state_dict()[name], value.float())
    # What a project does: computes with float32, saves, loads into a new model, trains without the plugin.
    x = batches()[0][0]
    outputs = full.eval().net(x)
    assert outputs.dtype == torch.float32
    torch.save(full.state_dict(), tmp_path / "weights.pt")
    fresh = Counts()
    fresh.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(fresh.eval().net(x), outputs)
    assert torch.equal(copy.deepcopy(full).net(x), outputs)
    quiet_trainer(tmp_path).fit(full.train(), DataLoader(batches(), batch_size=None))
    assert full.net[0].weight.dtype == torch.float32


def test_checkpoints_of_a_run_are_the_same_whatever_it_leaves(tmp_path: Path) -> None:
    saved = []
    for leave in ("half", "float32"):
        torch.manual_seed(0)
        checkpoint = ModelCheckpoint(tmp_path / leave, filename="last", every_n_epochs=1)
        plugin = LowPrecision(leave=leave)  # type: ignore[arg-type]
        options = {"plugins": [plugin], "enable_checkpointing": True}
        quiet_trainer(tmp_path, checkpoint, **options).fit(
            Regression(), DataLoader(batches(), batch_size=None)
        )
        saved.append(torch.load(tmp_path / leave / "last.ckpt", weights_only=True)["state_dict"])
    assert saved[0]["net.0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(saved[1][name], value) for name, value in saved[0].items())
    loaded = Regression.load_from_checkpoint(tmp_path / "float32" / "last.ckpt")
    assert loaded.net[0].weight.dtype == torch.float32
    assert torch.equal(loaded.net[0].weight, saved[0]["net.0.weight"].float())


def test_a_run_that_ends_in_an_error_leaves_float32_too(tmp_path: Path) -> None:
    class Fails(Regression):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            raise RuntimeError("fails")

    model = Fails()
    with pytest.raises(RuntimeError, match=r"^fails$"):
        quiet_trainer(tmp_path, plugins=[LowPrecision(leave="float32")]).fit(
            model, DataLoader(batches(), batch_size=None)
        )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any("forward" in vars(layer) for layer in model.modules())
