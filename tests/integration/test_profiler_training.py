from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from lightning_memtrain.core import MIB, ArgumentError, Category
from lightning_memtrain.report import MemoryProfiler, MemoryReport
from tests.helpers.boring_models import (
    BATCH_SIZE,
    INPUT_BYTES,
    PARAMETER_BYTES,
    WIDTH,
    BoringModel,
    ManualModel,
)
from tests.helpers.trainers import LIGHTNING_WARNINGS, assert_torch_is_as_found, fit, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

CATEGORIES = [category.value for category in Category]
KEYS = {
    "peak_mib",
    "ledger_peak_mib",
    "recomputed_mib",
    "growth_mib",
    *(f"at_peak/{category}_mib" for category in CATEGORIES),
    *(f"max/{category}_mib" for category in CATEGORIES if category != "workspace"),
}


class Quiet(BoringModel):
    """Logs nothing, so that a step has no bytes but its own."""

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self(batch)


def _watched(report: MemoryReport | None, stage: str = "fit") -> list[int]:
    assert report is not None
    assert all(step.ledger for step in report.steps)  # on the CPU nothing else is measured
    return [step.step for step in report.steps if step.stage == stage]


# ---------------------------------------------------------------------- what is measured


def test_a_step_to_the_byte(tmp_path: Path):
    profiler = MemoryProfiler()
    fit(Quiet(num_batches=3), profiler, tmp_path, limit_val_batches=0)
    breakdown = profiler.breakdowns["fit"]
    maxima = breakdown.maxima
    assert maxima[Category.PARAMETERS] == PARAMETER_BYTES
    assert maxima[Category.GRADIENTS] == PARAMETER_BYTES
    assert maxima[Category.OPTIMIZER_STATE] == PARAMETER_BYTES
    assert maxima[Category.INPUTS] == INPUT_BYTES
    # What relu returns (body to head) and what is squared.
    assert maxima[Category.ACTIVATIONS] == 4 * BATCH_SIZE * WIDTH + 4 * BATCH_SIZE
    assert maxima[Category.BUFFERS] == 0
    assert breakdown.start_bytes == 3 * PARAMETER_BYTES + INPUT_BYTES
    assert breakdown.at_peak.total_bytes == breakdown.allocator_peak_bytes == breakdown.peak_bytes
    assert {row.name for row in breakdown.modules} >= {"body", "head"}
    assert sum(row.optimizer_state_bytes for row in breakdown.modules) == PARAMETER_BYTES


def test_the_allocator_says_the_same_in_every_watched_step(tmp_path: Path):
    # A block that is freed in a watched step was made in the step before: both must be recorded.
    profiler = MemoryProfiler(every_n_steps=5)
    fit(Quiet(num_batches=21), profiler, tmp_path, limit_val_batches=0)
    assert profiler.report is not None
    assert _watched(profiler.report) == [0, 1, 2, 5, 10, 15, 20]
    assert len({step.peak_bytes for step in profiler.report.steps[1:]}) == 1


def test_the_timeline_has_the_hooks(tmp_path: Path):
    profiler = MemoryProfiler()
    fit(Quiet(num_batches=2), profiler, tmp_path, limit_val_batches=0)
    names = [event.name for event in profiler.breakdowns["fit"].timeline]
    assert names.index("forward body") < names.index("forward head") < names.index("backward")
    assert names.index("backward") < names.index("optimizer step")


def test_rows_per_module_and_timeline_can_be_left_out(tmp_path: Path):
    profiler = MemoryProfiler(per_module=False, timeline=False)
    fit(BoringModel(), profiler, tmp_path)
    for breakdown in profiler.breakdowns.values():
        assert breakdown.modules == ()
        assert breakdown.timeline == ()
        assert breakdown.peak_bytes > 0


def test_stages_apart_and_no_sanity_check(tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=100)
    fit(
        BoringModel(num_batches=5, num_val_batches=2),
        profiler,
        tmp_path,
        max_epochs=2,
        num_sanity_val_steps=2,
    )
    assert _watched(profiler.report) == [0, 1, 2]
    assert _watched(profiler.report, "validate") == [0, 1, 2]  # of 4 in two epochs, none of the sanity check
    validate = profiler.breakdowns["validate"]
    assert validate.maxima[Category.ACTIVATIONS] == validate.maxima[Category.GRADIENTS] == 0
    assert validate.maxima[Category.OPTIMIZER_STATE] == PARAMETER_BYTES


def test_training_is_bit_equal_with_the_profiler(tmp_path: Path):
    class Noisy(BoringModel):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.head(nn.functional.dropout(self.body(batch), 0.5))

    results = []
    for callbacks in ((), (MemoryProfiler(every_n_steps=2),)):
        torch.manual_seed(7)
        model = Noisy()
        state_in_fit: list[torch.Tensor] = []

        class RngAtEnd(Callback):
            def on_train_end(self, trainer: Any, pl_module: Any, seen=state_in_fit) -> None:
                seen.append(torch.get_rng_state())

        quiet_trainer(tmp_path, *callbacks, RngAtEnd(), max_epochs=2).fit(model)
        results.append((model.state_dict(), state_in_fit[0], torch.get_rng_state()))
    (plain, *plain_rng), (profiled, *profiled_rng) = results
    for name, value in plain.items():
        assert torch.equal(value, profiled[name])
    for before, after in zip(plain_rng, profiled_rng, strict=True):
        assert torch.equal(before, after)


# ---------------------------------------------------------------------- any module, any loop


class Lbfgs(Quiet):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), max_iter=3)


class SkipsSome(Quiet):
    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class WithScheduler(Quiet):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class NoOptimizer(Quiet):
    def configure_optimizers(self) -> None:
        return None


class FromIterator(Quiet):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.parametrize(
    ("model", "options", "watched"),
    [
        pytest.param(Quiet, {}, [0, 1, 2, 4], id="automatic"),
        pytest.param(ManualModel, {}, [0, 1, 2, 4], id="manual, two optimizers"),
        pytest.param(Lbfgs, {}, [0, 1, 2, 4], id="lbfgs"),
        pytest.param(WithScheduler, {}, [0, 1, 2, 4], id="scheduler"),
        pytest.param(SkipsSome, {}, [0, 1, 2, 4], id="training_step returns None"),
        pytest.param(FromIterator, {}, [0, 1, 2, 4], id="dataloader_iter"),
        pytest.param(Quiet, {"gradient_clip_val": 0.1}, [0, 1, 2, 4], id="clipping"),
        pytest.param(Quiet, {"accumulate_grad_batches": 2}, [0, 1, 2], id="accumulate"),
        pytest.param(Quiet, {"accumulate_grad_batches": 4}, [0, 1], id="accumulate, short window"),
        pytest.param(Quiet, {"max_steps": 2, "max_epochs": -1}, [0, 1], id="max_steps in mid-epoch"),
        pytest.param(Quiet, {"fast_dev_run": True}, [0], id="fast_dev_run"),
        pytest.param(Quiet, {"precision": "bf16-mixed"}, [0, 1, 2, 4], id="bf16"),
        pytest.param(Quiet, {"val_check_interval": 3}, [0, 1, 2, 4], id="validation in mid-epoch"),
        pytest.param(Quiet, {"profiler": "simple"}, [0, 1, 2, 4], id="simple profiler"),
        pytest.param(Quiet, {"inference_mode": False}, [0, 1, 2, 4], id="no_grad validation"),
    ],
)
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument")
@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_any_loop(model: type[Quiet], options: dict[str, Any], watched: list[int], tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=4)
    trained = model()
    fit(trained, profiler, tmp_path, **options)
    assert _watched(profiler.report) == watched
    assert profiler.report is not None
    assert profiler.report.growth["fit"] == ()
    assert profiler.report.stages["fit"].maxima[Category.PARAMETERS] == PARAMETER_BYTES
    assert_torch_is_as_found(trained)


def test_a_module_without_an_optimizer(tmp_path: Path):
    profiler = MemoryProfiler()
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        fit(NoOptimizer(num_batches=2), profiler, tmp_path)
    assert profiler.breakdowns["fit"].maxima[Category.OPTIMIZER_STATE] == 0


def test_lbfgs_state_is_optimizer_state(tmp_path: Path):
    profiler = MemoryProfiler()
    fit(Lbfgs(num_batches=2), profiler, tmp_path)
    # Direction, last gradient, and at least one old direction and step.
    assert profiler.breakdowns["fit"].maxima[Category.OPTIMIZER_STATE] >= 4 * PARAMETER_BYTES


def test_all_optimizers_are_told_apart_from_activations(tmp_path: Path):
    profiler = MemoryProfiler()
    fit(ManualModel(num_batches=2), profiler, tmp_path)
    adam, momentum = 4 * (WIDTH * WIDTH + WIDTH), 4 * (WIDTH + 1)
    step_counters = 2 * 4  # Adam keeps one for each of two parameters
    expected = 2 * adam + momentum + step_counters
    assert profiler.breakdowns["fit"].maxima[Category.OPTIMIZER_STATE] == expected


def test_a_window_of_batches_is_one_step(tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=100)
    fit(Quiet(num_batches=6), profiler, tmp_path, accumulate_grad_batches=2, limit_val_batches=0)
    assert _watched(profiler.report) == [0, 1, 2]
    names = [event.name for event in profiler.breakdowns["fit"].timeline]
    assert names.count("forward body") == 1  # one batch of the window, the higher
    assert profiler.breakdowns["fit"].start_bytes == 3 * PARAMETER_BYTES + INPUT_BYTES


def test_accumulation_that_changes_on_the_way(tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=1)
    scheduler = GradientAccumulationScheduler(scheduling={0: 3, 1: 1})
    quiet_trainer(tmp_path, profiler, scheduler, max_epochs=2).fit(Quiet(num_batches=3))
    assert _watched(profiler.report) == [0, 1, 2, 3]


def test_a_batch_that_the_model_skips_leaves_nothing_open(tmp_path: Path):
    class StopsEpochs(Quiet):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 1 else None

        def on_train_epoch_end(self) -> None:
            assert_torch_is_as_found(self)

    profiler = MemoryProfiler()
    model = StopsEpochs()
    fit(model, profiler, tmp_path, max_epochs=2)
    assert _watched(profiler.report) == [0, 1]
    assert_torch_is_as_found(model)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_torchs_own_profiler_goes_first(tmp_path: Path):
    from lightning.pytorch.profilers import PyTorchProfiler

    schedule = torch.profiler.schedule(wait=2, warmup=1, active=1)  # it begins to record in mid-step
    torch_profiler = PyTorchProfiler(dirpath=tmp_path, filename="torch", schedule=schedule)
    profiler = MemoryProfiler(every_n_steps=1)
    trained = Quiet(num_batches=6)
    fit(trained, profiler, tmp_path, profiler=torch_profiler, limit_val_batches=0)
    assert _watched(profiler.report) == [0, 1, 2, 3, 4, 5]
    assert profiler.breakdowns["fit"].allocator_peak_bytes is None
    assert profiler.breakdowns["fit"].at_peak[Category.WORKSPACE] == 0
    assert_torch_is_as_found(trained)


def test_barebones_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from lightning.pytorch import Trainer

    profiler = MemoryProfiler()
    trainer = Trainer(
        barebones=True, max_epochs=1, accelerator="cpu", callbacks=[profiler], default_root_dir=tmp_path
    )
    trainer.fit(Quiet(num_batches=2))
    assert "Memory report" not in capsys.readouterr().out
    assert (tmp_path / "memory" / "memory_report.json").is_file()


# ---------------------------------------------------------------------- validate, test, predict; several runs


@pytest.mark.parametrize(
    ("run", "stage"), [("validate", "validate"), ("test", "test"), ("predict", "predict")]
)
def test_stages_alone(run: str, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    profiler = MemoryProfiler()
    model = BoringModel(num_val_batches=4)
    trainer = quiet_trainer(tmp_path, profiler)
    getattr(trainer, run)(model)
    assert profiler.report is not None
    assert set(profiler.report.stages) == {stage}
    assert profiler.report.stages[stage].maxima[Category.PARAMETERS] == PARAMETER_BYTES
    assert MemoryReport.load(tmp_path / "memory" / "memory_report.json") == profiler.report
    assert "Memory report" in capsys.readouterr().out
    keys = {
        key.removeprefix(f"memory/{stage}/") for key in trainer.callback_metrics if key.startswith("memory/")
    }
    assert keys == KEYS
    assert_torch_is_as_found(model)


def test_a_test_after_a_fit_joins_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    profiler = MemoryProfiler()
    model = BoringModel()
    trainer = fit(model, profiler, tmp_path)
    fitted = profiler.report
    capsys.readouterr()
    trainer.test(model, verbose=False)
    assert fitted is not None
    assert profiler.report is not None
    assert set(profiler.report.stages) == {"fit", "validate", "test"}
    assert profiler.report.stages["fit"] == fitted.stages["fit"]
    printed = capsys.readouterr().out
    assert "test: peak" in printed
    assert "fit: peak" not in printed
    trainer.test(model, verbose=False)
    assert _watched(profiler.report, "test") == [0, 1]  # not those of the first test as well


def test_each_fit_has_its_own_report(tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=100)
    model = BoringModel(num_batches=4)
    trainer = fit(model, profiler, tmp_path)
    first = profiler.report
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model)
    assert _watched(first) == [0, 1, 2]
    assert _watched(profiler.report) == [4, 5, 6]  # the steps go on as in the loggers
    other = BoringModel()
    quiet_trainer(tmp_path, profiler).test(other)
    assert profiler.report is not None
    assert set(profiler.report.stages) == {"test"}


def test_a_resumed_run_goes_on_counting(tmp_path: Path):
    trainer = fit(BoringModel(num_batches=4), MemoryProfiler(), tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    profiler = MemoryProfiler(every_n_steps=100)
    resumed = quiet_trainer(tmp_path, profiler, max_epochs=2)
    resumed.fit(BoringModel(num_batches=4), ckpt_path=tmp_path / "last.ckpt")
    assert _watched(profiler.report) == [4, 5, 6]
    # A resumed optimizer brings its state along.
    assert profiler.breakdowns["fit"].start_bytes >= 2 * PARAMETER_BYTES


def test_a_copy_starts_afresh(tmp_path: Path):
    # Spawned processes and tuners copy callbacks; what was measured holds weak references, which cannot be.
    profiler = MemoryProfiler(every_n_steps=3)
    fit(BoringModel(), profiler, tmp_path)
    for copied in (copy.deepcopy(profiler), pickle.loads(pickle.dumps(profiler))):
        assert copied.every_n_steps == 3
        assert copied.breakdowns == {}
        assert copied.report == profiler.report
        fit(BoringModel(num_batches=1), copied, tmp_path)
        assert _watched(copied.report) == [0]


def test_no_batches_make_no_report(tmp_path: Path):
    profiler = MemoryProfiler()
    fit(BoringModel(), profiler, tmp_path, max_epochs=0)
    assert profiler.report is None
    assert not (tmp_path / "memory").exists()


def test_a_pytorch_lightning_trainer(tmp_path: Path):
    pl = pytest.importorskip("pytorch_lightning")

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            loss = self.layer(batch).mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self) -> Any:
            return BoringModel(num_batches=4).train_dataloader()

    profiler = MemoryProfiler()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[profiler],
        logger=pl.loggers.CSVLogger(tmp_path),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model())
    assert _watched(profiler.report) == [0, 1, 2]
    assert profiler.breakdowns["fit"].maxima[Category.PARAMETERS] == 4 * (WIDTH + 1)
    assert {
        key.removeprefix("memory/") for key in trainer.callback_metrics if key.startswith("memory/")
    } == KEYS


# ---------------------------------------------------------------------- what is told


def test_metrics_have_fixed_keys_and_the_bytes_of_the_report(tmp_path: Path):
    profiler = MemoryProfiler()
    trainer = fit(BoringModel(num_batches=2), profiler, tmp_path)
    metrics = {
        key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("memory/")
    }
    assert set(metrics) == {f"memory/{key}" for key in KEYS} | {f"memory/validate/{key}" for key in KEYS}
    for prefix, stage in (("memory", "fit"), ("memory/validate", "validate")):
        breakdown = profiler.breakdowns[stage]
        assert metrics[f"{prefix}/peak_mib"] * MIB == breakdown.peak_bytes
        rows = sum(metrics[f"{prefix}/at_peak/{category}_mib"] for category in CATEGORIES)
        assert rows == metrics[f"{prefix}/peak_mib"]
        for category in Category:
            if category is not Category.WORKSPACE:
                assert metrics[f"{prefix}/max/{category}_mib"] * MIB == breakdown.maxima[category]


def test_the_files_the_table_and_the_attribute_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    profiler = MemoryProfiler(report_dir=tmp_path / "here" / "deep")
    fit(BoringModel(), profiler, tmp_path)
    written = MemoryReport.load(tmp_path / "here" / "deep" / "memory_report.json")
    assert written == profiler.report
    assert written.model == "BoringModel"
    assert written.num_parameters == PARAMETER_BYTES // 4
    assert written.environment["torch"] == torch.__version__
    assert written.ranks is None
    assert written.out_of_memory is None
    page = (tmp_path / "here" / "deep" / "memory_report.html").read_text(encoding="utf-8")
    assert "BoringModel" in page
    printed = capsys.readouterr().out
    assert printed.count("Memory report") == 1
    assert re.search(r"fit: peak .* on cpu", printed)


def test_the_report_goes_beside_the_first_loggers_files(tmp_path: Path):
    from lightning.pytorch.loggers import CSVLogger

    fit(BoringModel(), MemoryProfiler(), tmp_path, logger=CSVLogger(tmp_path, name="runs"))
    folder = tmp_path / "runs" / "version_0" / "memory"
    files = ["memory_report.html", "memory_report.json"]
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == files
    (own,) = (path for path in folder.iterdir() if path.is_dir())
    assert sorted(path.name for path in own.iterdir()) == files
    assert json.loads((folder / "memory_report.json").read_text())["model"] == "BoringModel"


def test_the_page_of_a_run_is_named_and_stays_when_the_next_one_comes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pages = []
    for _ in range(2):
        # Not the same object: a script is run again.
        trainer = fit(BoringModel(num_batches=1), MemoryProfiler(report_dir=tmp_path / "out"), tmp_path)
        (page,) = re.findall(r"^Page: (.*)$", capsys.readouterr().out, flags=re.MULTILINE)
        pages.append((Path(page), Path(page).read_bytes()))
    assert pages[0][0] != pages[1][0]
    assert all(page.read_bytes() == written for page, written in pages)
    assert all(page.parent.parent == tmp_path / "out" for page, _ in pages)
    latest = tmp_path / "out" / "memory_report.html"
    assert latest.read_bytes() == pages[1][1]
    # A test of the same run goes on with its report.
    trainer.test(trainer.lightning_module, verbose=False)
    (page,) = re.findall(r"^Page: (.*)$", capsys.readouterr().out, flags=re.MULTILINE)
    assert Path(page) == pages[1][0]
    assert latest.read_bytes() == Path(page).read_bytes() != pages[1][1]


def test_steps_are_timed_with_what_the_ledger_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10_000))
    monkeypatch.setattr("lightning_memtrain.report.step_clock.time.perf_counter", lambda: float(next(clock)))
    profiler = MemoryProfiler(every_n_steps=4)
    fit(BoringModel(num_batches=8), profiler, tmp_path)
    assert profiler.report is not None
    # Steps 0, 1, 2 and 4 have the ledger; in 3 and 7, before such steps, the CPU's allocator is watched.
    times = profiler.report.step_times["fit"]
    assert (times.num_steps, times.num_measured) == (2, 6)
    assert (times.median_seconds, times.added_seconds) == (1.0, 0.0)


def test_a_run_that_is_refused_in_its_first_step_has_no_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Refused(BoringModel):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise ArgumentError("`Refused(batch)` must be another one.")

    profiler = MemoryProfiler(report_dir=tmp_path / "out")
    with pytest.raises(ArgumentError):
        fit(Refused(), profiler, tmp_path)
    assert profiler.report is None
    assert not (tmp_path / "out").exists()
    assert "Memory report" not in capsys.readouterr().out


# ---------------------------------------------------------------------- an accelerator's counters


class FakeCounters:
    """An allocator whose peak grows by one in every step, and is 1000 in step 3."""

    def __init__(self) -> None:
        self.num_starts = 0

    def start(self) -> None:
        self.num_starts += 1

    def stop(self, start_bytes: int = 0, end_bytes: int | None = None) -> Any:
        from lightning_memtrain.ledger import AllocatorReading

        peak_bytes = 10_000 if self.num_starts == 4 else 5_000 + self.num_starts
        return AllocatorReading(peak_bytes=peak_bytes, over_start_bytes=0)


def test_counters_are_read_on_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lightning.pytorch.loggers import CSVLogger

    monkeypatch.setattr(
        "lightning_memtrain.report.profiler.allocator_statistics", lambda device: FakeCounters()
    )
    profiler = MemoryProfiler(every_n_steps=100)
    logger = CSVLogger(tmp_path, name="", version="")
    fit(Quiet(num_batches=10), profiler, tmp_path, logger=logger, log_every_n_steps=5, limit_val_batches=0)
    assert profiler.report is not None
    steps = [(step.step, step.peak_bytes, step.ledger) for step in profiler.report.steps]
    assert steps[:4] == [(0, 5001, True), (1, 5002, True), (2, 5003, True), (3, 10_000, False)]
    assert steps[4:] == [(step, 5001 + step, False) for step in range(4, 10)]
    rows = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    column, step = rows[0].index("memory/allocator_peak_mib"), rows[0].index("step")
    # Logged at the trainer's pace, but no peak is lost: steps 3 and 4 share a row.
    logged = [(int(row[step]), float(row[column]) * MIB) for row in rows[1:] if row[column]]
    assert logged == [(0, 5001), (1, 5002), (2, 5003), (4, 10_000), (9, 5010)]
    assert profiler.breakdowns["fit"].at_peak.total_bytes == 5003
