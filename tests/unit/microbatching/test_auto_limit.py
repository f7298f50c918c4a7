"""A limit is a limit: in the probe, in the first step, in the second and in all later ones."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.compat import wrap_training_step
from lightning_memtrain.core import OutOfReach, TechniqueRecord, format_bytes
from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.precision import LowPrecision
from lightning_memtrain.report import MemoryProfiler
from tests.helpers.trainers import LIGHTNING_WARNINGS, LedgerPeaks, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in LIGHTNING_WARNINGS]

NUM_SAMPLES = 128


class Net(LightningModule):
    """Layers, of which some may be frozen; a loss that is logged, and class weights that are no buffer."""

    def __init__(self, optimizer: Callable[[Any], Any], width: int = 32) -> None:
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(width, width), nn.GELU())  # noqa: E731
        self.backbone = nn.Sequential(*(block() for _ in range(3)))
        self.head = nn.Linear(width, 8)
        self.weights = torch.linspace(0, 1, 8)
        self.optimizer = optimizer

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.head(self.backbone(batch)).square() * self.weights).mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class Convolutions(Net):
    """Operators that hold more while they run, and batch normalisation."""

    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(optimizer)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3), nn.Flatten()
        )
        self.head = nn.Linear(4 * 6 * 6, 8)


def data(*sizes: int, shape: tuple[int, ...] = (32,)) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    return DataLoader([torch.randn(size, *shape, generator=generator) for size in sizes], batch_size=None)


@dataclass
class Run:
    """What a run has held."""

    peaks: list[int]
    """Of each batch, by a ledger that counts probes."""
    steps: list[int]
    """Of each step, as the profiler reports it: by the allocator where it is known."""
    trainer: Trainer
    report: Any

    @property
    def highest(self) -> int:
        return max(self.peaks + self.steps)


def train(
    model: LightningModule, loader: DataLoader, folder: Path, *callbacks: Callback, **options: Any
) -> Run:
    fit = {name: options.pop(name) for name in ("ckpt_path",) if name in options}
    peaks, profiler = LedgerPeaks(), MemoryProfiler(every_n_steps=1, report_dir=folder / "memory")
    trainer = quiet_trainer(folder, *callbacks, profiler, peaks, **options)
    torch.manual_seed(0)
    trainer.fit(model, loader, **fit)
    assert profiler.report is not None
    steps = [step.peak_bytes for step in profiler.report.steps if step.stage == "fit"]
    return Run(peaks.peaks, steps, trainer, profiler.report)


def auto(limit_bytes: int, **given: Any) -> Microbatching:
    return Microbatching(microbatch_size="auto", limit=limit_bytes, **given)


def sgd(parameters: Any, **given: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, **{"lr": 1e-3} | given)


OPTIMIZERS = {
    "sgd": sgd,
    "momentum": functools.partial(sgd, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw, all at once": functools.partial(torch.optim.AdamW, foreach=True),
    "adamw, in one kernel": functools.partial(torch.optim.AdamW, fused=True),
}
CLIPPING = {"gradient_clip_val": 1.0}


ACCUMULATED = {"accumulate_grad_batches": 2}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, options) for name in OPTIMIZERS for options in ({}, CLIPPING | ACCUMULATED)),
        ("adam", CLIPPING),
        ("momentum", ACCUMULATED),
    ],
    ids=str,
)
def test_every_step_keeps_the_limit(name: str, options: dict[str, Any], tmp_path: Path):
    # Small batches, since each is run sample by sample, too; one step, a second and what both leave.
    batches = [64] * (2 * options.get("accumulate_grad_batches", 1) + 1)
    model, loader = functools.partial(Net, OPTIMIZERS[name]), data(*batches)
    single = train(model(), loader, tmp_path, Microbatching(microbatch_size=1), **options).highest
    plain = train(model(), loader, tmp_path, **options).highest
    sizes = []
    # To run a batch again takes some room: a copy of random numbers' state, and of gradients amid a window.
    room = 6_000 + 4 * sum(parameter.numel() for parameter in model().parameters())
    for part in (0.0, 0.4):
        limit = int(single + room + part * (plain - single))
        microbatching = auto(limit)
        run = train(model(), loader, tmp_path, microbatching, **options)
        assert run.highest <= limit
        assert len(microbatching.technique_record().events) == 1  # right at first
        assert microbatching.microbatch_size is not None
        sizes.append(microbatching.microbatch_size)
    assert 1 <= sizes[0] <= sizes[1]
    assert sizes[1] > 1


def test_what_the_allocator_holds_beyond_the_ledger_counts(tmp_path: Path):
    model, loader = functools.partial(Convolutions, sgd), data(*[NUM_SAMPLES] * 4, shape=(3, 8, 8))
    plain = train(model(), loader, tmp_path).highest
    for part in (0.3, 0.5, 0.7):
        limit = int(part * plain)
        microbatching = auto(limit)
        assert train(model(), loader, tmp_path, microbatching).highest <= limit
        assert 1 < microbatching.microbatch_size < NUM_SAMPLES


# ---------------------------------------------------------------------- chosen again


class Thaw(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


@pytest.mark.filterwarnings("ignore:.*The provided params to be frozen")
@pytest.mark.parametrize("optimizer", [sgd, torch.optim.Adam])
def test_parameters_that_thaw(optimizer: Any, tmp_path: Path):
    model, loader = functools.partial(Net, optimizer), data(*[NUM_SAMPLES] * 3)
    thawed = train(model(), loader, tmp_path, Thaw(), max_epochs=2)
    limit = int(0.9 * thawed.highest)
    assert max(thawed.peaks[:3]) < limit < max(thawed.peaks[3:])
    microbatching = auto(limit)
    assert train(model(), loader, tmp_path, Thaw(), microbatching, max_epochs=2).highest <= limit
    first, second = microbatching.technique_record().events
    assert first.startswith("step 0: microbatch_size=128 of 128 samples: ")
    assert second.startswith("step 3: microbatch_size=64 of 128 samples, with more parameters in training: ")


def test_larger_batches(tmp_path: Path):
    model = functools.partial(Net, sgd)
    usual = train(model(), data(64), tmp_path).highest
    limit = usual + 20_000
    microbatching = auto(limit)
    run = train(model(), data(64, 100, 64, 100, 101, 150), tmp_path, microbatching)
    assert run.highest <= limit
    sizes = [event.split(":")[1].strip() for event in microbatching.technique_record().events]
    assert sizes[0] == "microbatch_size=64 of 64 samples"
    assert sizes[1].endswith("of 100 samples, for a larger batch")


class Sequences(Net):
    """Attention, whose activations grow with the square of the length."""

    def __init__(self, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(optimizer, width=8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden = self.backbone(batch)
        attention = (hidden @ hidden.mT).softmax(-1)
        return self.head(attention @ hidden).square().mean()


def test_longer_sequences_and_short_ones_after_them(tmp_path: Path):
    generator = torch.Generator().manual_seed(1)
    lengths = (10, 30, 9, 31, 12, 28, 40, 10)
    batches = [torch.randn(8, length, 8, generator=generator) for length in lengths]
    loader = DataLoader(batches, batch_size=None)
    usual = train(Sequences(sgd), DataLoader(batches[:1], batch_size=None), tmp_path).highest
    limit, microbatching = int(2.5 * usual), auto(int(2.5 * usual))
    sizes: list[int | None] = []

    class Sizes(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            sizes.append(microbatching.microbatch_size)

    assert train(Sequences(sgd), loader, tmp_path, microbatching, Sizes()).highest <= limit
    assert sizes[0] == sizes[2] == sizes[4] == sizes[7] == 8  # what is shorter is not held back by the others
    assert sizes[6] < sizes[1] < 8


def test_an_optimizer_that_is_resumed(tmp_path: Path):
    model, loader = functools.partial(Net, torch.optim.Adam), data(*[NUM_SAMPLES] * 4)
    plain = train(model(), loader, tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=2, max_epochs=-1)
    trainer.fit(model(), loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    limit, microbatching = int(0.8 * plain.highest), auto(int(0.8 * plain.highest))
    resumed = {"ckpt_path": tmp_path / "last.ckpt", "max_epochs": 2}
    run = train(model(), loader, tmp_path, microbatching, **resumed)
    assert run.highest <= limit
    assert run.trainer.global_step > 2
    assert len(microbatching.technique_record().events) == 1


class MomentumFrom(Callback):
    """Lets an optimizer begin with what it has not done so far."""

    def __init__(self, batch_idx: int) -> None:
        self.batch_idx = batch_idx

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx + 1 == self.batch_idx:
            for group in trainer.optimizers[0].param_groups:
                group["momentum"] = 0.9


class SlowWeights(torch.optim.SGD):
    """Keeps a copy of all weights from one of its steps on, later than anybody looks ahead."""

    def __init__(self, parameters: Any, in_step: int) -> None:
        super().__init__(parameters, lr=1e-3)
        self.slow: list[Tensor] = []
        self.counts = {"steps": 0, "in_step": in_step}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.counts["steps"] += 1
        if self.counts["steps"] == self.counts["in_step"]:
            self.slow = [p.clone() for group in self.param_groups for p in group["params"]]
        return loss


@pytest.mark.parametrize(
    ("optimizer", "callbacks", "reason", "step"),
    [
        (sgd, [MomentumFrom(3)], ", with another step of the optimizer", 3),
        (
            functools.partial(SlowWeights, in_step=20),
            [],
            ", with more that is kept from batch to batch",
            20,
        ),
    ],
)
def test_another_phase_of_the_optimizer(
    optimizer: Any, callbacks: list[Callback], reason: str, step: int, tmp_path: Path
):
    model, loader = functools.partial(Net, optimizer), data(*[NUM_SAMPLES] * (step + 3))
    at_first = train(model(), data(NUM_SAMPLES), tmp_path, Microbatching(microbatch_size=NUM_SAMPLES))
    limit = at_first.highest + 8_000  # less than what the optimizer will keep
    microbatching = auto(limit)
    assert train(model(), loader, tmp_path, *callbacks, microbatching).highest <= limit
    first, second = microbatching.technique_record().events
    assert first.startswith("step 0: microbatch_size=128 of 128 samples: ")
    assert second.startswith(f"step {step}: microbatch_size=64 of 128 samples{reason}: ")


def test_an_optimizer_whose_state_comes_soon_is_left_room_for_at_once(tmp_path: Path):
    optimizer = functools.partial(SlowWeights, in_step=5)
    model, loader = functools.partial(Net, optimizer), data(*[NUM_SAMPLES] * 8)
    limit = train(model(), loader, tmp_path).highest - 2_000
    microbatching = auto(limit)
    assert train(model(), loader, tmp_path, microbatching).highest <= limit
    (event,) = microbatching.technique_record().events
    assert event.startswith("step 0: microbatch_size=64 of 128 samples: ")


class Unforeseeable(torch.optim.Adam):
    """Asks for numbers, which a stand-in does not have; makes a copy of all gradients in each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        copies = [parameter.grad.clone() for parameter in parameters]
        assert all(copy.numpy().size for copy in copies)
        super().step()
        return loss


@pytest.mark.parametrize("half", [False, True])
def test_an_optimizer_that_cannot_be_foretold_is_followed(half: bool, tmp_path: Path):
    """Weights in half precision step through float32 copies, which a stand-in does not show either."""
    model = functools.partial(Net, torch.optim.Adam if half else Unforeseeable)

    def run(*callbacks: Callback) -> Run:
        options = {"plugins": [LowPrecision()]} if half else {}
        return train(model(), data(*[NUM_SAMPLES] * 4), tmp_path, *callbacks, **options)

    plain = run()
    limit = max(plain.highest - 2_000, plain.peaks[0] + 6_000)
    microbatching = auto(limit)
    assert run(microbatching).highest <= limit
    first, second = microbatching.technique_record().events
    assert first.startswith("step 0: microbatch_size=128 of 128 samples: ")
    assert second.startswith("step 1: microbatch_size=64 of 128 samples, with more that is kept")


@pytest.mark.parametrize("half", [False, True])
def test_a_step_that_cannot_be_foretold_is_broken_off_before_it_breaks_the_limit(half: bool, tmp_path: Path):
    model = Net(torch.optim.Adam if half else Unforeseeable)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    limit = 4 * 4 * num_parameters
    peaks = LedgerPeaks()
    options = {"plugins": [LowPrecision()]} if half else {}
    trainer = quiet_trainer(tmp_path, auto(limit), peaks, **options)
    message = (
        r"^`Microbatching\(limit\)` must have room for the step of the optimizer, which takes at least "
        rf".* KiB with .* of parameters.*, but got limit={re.escape(format_bytes(limit))}\. No size of "
    )
    with pytest.raises(MisconfigurationException, match=message):
        trainer.fit(model, data(8, 8))
    peaks.ledger.__exit__(None, None, None)
    assert peaks.ledger.breakdown().ledger_peak_bytes <= limit


class EvaluatesTwice(torch.optim.SGD):
    """Holds more when it evaluates the model again, beside which the size that was found is too large."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        held = torch.ones(4_000)
        assert held.numpy().size
        closure()
        del held
        super().step()
        return loss


def test_a_second_evaluation_within_a_step_keeps_the_limit_with_smaller_chunks(tmp_path: Path):
    model = functools.partial(Net, functools.partial(EvaluatesTwice, lr=0.1))
    plain = train(model(), data(*[NUM_SAMPLES] * 2), tmp_path)
    microbatching = auto(plain.highest - 8_000)
    run = train(model(), data(*[NUM_SAMPLES] * 2), tmp_path, microbatching)
    assert run.highest <= plain.highest - 8_000
    first, second = microbatching.technique_record().events
    assert first.startswith("step 0: microbatch_size=128 of 128 samples: ")
    assert second.startswith("step 0: a limit is out of reach at microbatch_size=128; microbatch_size=64")


def test_what_grows_from_batch_to_batch(tmp_path: Path):
    class Keeps(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if not hasattr(self, "kept"):
                self.kept: list[Tensor] = []
            self.kept.append(batch.detach().clone())
            return super().training_step(batch, batch_idx)

    loader = data(*[NUM_SAMPLES] * 6)
    limit = train(Net(sgd), data(NUM_SAMPLES), tmp_path).highest + 40_000
    microbatching = auto(limit)
    assert train(Keeps(sgd), loader, tmp_path, microbatching).highest <= limit
    first, second, *_ = microbatching.technique_record().events
    assert first.startswith("step 0: microbatch_size=128 of 128 samples: ")
    # The ledger of a step does not see what earlier ones have left and nobody uses; it is there all the same.
    assert second.startswith("step 2: microbatch_size=64 of 128 samples, with more that is kept from batch")


# ---------------------------------------------------------------------- with another limit


class KeptLimit(OutOfReach, MisconfigurationException):
    """What the technique below raises."""


class KeepsLimit(Callback):
    """Stands for another technique with a limit: it says which sizes are out of its reach."""

    exact = True

    def __init__(self, most: int) -> None:
        self.most = most
        self.limits: list[int] = []

    def technique_record(self) -> TechniqueRecord:
        return TechniqueRecord("KeepsLimit")

    def on_fit_start(self, trainer: Any, pl_module: LightningModule) -> None:
        def around(step: Any, args: Any, kwargs: Any) -> Any:
            if len(args[0]) > self.most:
                raise KeptLimit(f"no more than {self.most} at a time, but got {len(args[0])}")
            return step(*args, **kwargs)

        self._undo = wrap_training_step(pl_module, around)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._undo()


@pytest.mark.parametrize("most", [1, 5, 32])
def test_a_size_that_is_out_of_reach_of_another_limit_does_not_fit(most: int, tmp_path: Path):
    microbatching, model = auto(2**30), Net(sgd)
    trainer = quiet_trainer(tmp_path, KeepsLimit(most), microbatching)
    trainer.fit(model, data(*[NUM_SAMPLES] * 2))
    assert trainer.global_step == 2
    assert microbatching.microbatch_size == most
    assert len(microbatching.technique_record().events) == 1


def test_another_limit_that_no_size_reaches_ends_the_run_in_its_own_words(tmp_path: Path):
    trainer = quiet_trainer(tmp_path, KeepsLimit(0), auto(2**30))
    with pytest.raises(KeptLimit, match=r"^no more than 0 at a time, but got 1$"):
        trainer.fit(Net(sgd), data(*[NUM_SAMPLES] * 2))


def test_another_limit_that_is_out_of_reach_later_halves_the_size(tmp_path: Path):
    class Shrinks(KeepsLimit):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.most = 128 if batch_idx == 0 else 40

    microbatching = auto(2**30)
    quiet_trainer(tmp_path, Shrinks(128), microbatching).fit(Net(sgd), data(*[NUM_SAMPLES] * 2))
    assert microbatching.technique_record().events[1:] == (
        "step 1: a limit is out of reach at microbatch_size=128; microbatch_size=64 from here",
        "step 1: a limit is out of reach at microbatch_size=64; microbatch_size=32 from here",
    )


# ---------------------------------------------------------------------- in the report


def test_the_peak_of_the_run_is_not_the_probes(tmp_path: Path):
    model, loader = functools.partial(Net, sgd), data(*[NUM_SAMPLES] * 3)
    plain = train(model(), loader, tmp_path).highest
    microbatching = auto(int(0.8 * plain))
    run = train(model(), loader, tmp_path, microbatching, max_steps=1)
    fit = run.report.stages["fit"]
    names = [event.name for event in fit.timeline]
    probes = [name for name in names if name.startswith("probe of ")]
    assert probes[:2] == ["probe of 2 samples", "probe of 4 samples"]
    assert probes[-1] in ("probe of 64 samples", "probe of 128 samples")
    peak = next(place for place, name in enumerate(names) if name.startswith("peak"))
    begins, ends = names.index("probe"), names.index("microbatch 1 of 2")
    assert begins < names.index("probe of 2 samples") < ends < peak
    fixed = train(model(), loader, tmp_path, Microbatching(microbatch_size=64), max_steps=1)
    assert fit.ledger_peak_bytes == fixed.report.stages["fit"].ledger_peak_bytes
    assert fit.ledger_peak_bytes < fit.aside_peak_bytes == max(run.peaks) <= 0.8 * plain
    assert run.steps == [fit.peak_bytes]


def test_a_mark_ends_the_probes_also_where_the_batch_is_not_split(tmp_path: Path):
    run = train(Net(sgd), data(NUM_SAMPLES), tmp_path, auto(2**30))
    names = [event.name for event in run.report.stages["fit"].timeline]
    assert names.count("microbatch 1 of 1") == 1
    assert names.index("microbatch 1 of 1") > names.index("probe of 128 samples")
