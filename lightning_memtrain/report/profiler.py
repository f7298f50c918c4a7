"""The callback that shows where the memory of a Lightning run goes."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from lightning_memtrain.compat.lightning_packages import misconfiguration_errors
from lightning_memtrain.compat.lightning_private import (
    batches_that_stepped,
    should_accumulate,
    should_update_logs,
)
from lightning_memtrain.coordination import is_watched
from lightning_memtrain.core import ArgumentError, MemoryBreakdown, ReportWarning, is_out_of_memory
from lightning_memtrain.core.arguments.value_checks import check_flags, check_functions, check_kinds
from lightning_memtrain.ledger import AllocatorStatistics, allocator_statistics
from lightning_memtrain.ledger.device_allocator import CpuStatistics
from lightning_memtrain.report.batch_measurement import BatchMeasurement
from lightning_memtrain.report.ledger_schedule import LedgerSchedule
from lightning_memtrain.report.memory_report import MemoryReport
from lightning_memtrain.report.outputs.loggers import define_metrics, describe_techniques
from lightning_memtrain.report.outputs.run_telling import RunTelling, compare_peaks
from lightning_memtrain.report.predicted.predicted_step import PredictedStep, Predictor
from lightning_memtrain.report.predicted.predicting import predict_run
from lightning_memtrain.report.row_limit import validate_max_rows
from lightning_memtrain.report.run_recorder import RunRecorder, StageRecorder
from lightning_memtrain.report.stacks.stack_recorder import KnownLines
from lightning_memtrain.report.trainer_state import (
    evaluation_name,
    held_beside,
    kept_storages,
    profiled_device,
    stage_name,
    technique_records,
    uses_torch_profiler,
)
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors


class MemoryProfiler(Callback):
    """Shows where every byte of training, validation, test and prediction goes.

    The ledger watches the first three steps of each stage and then every N-th; on an accelerator the
    allocator's peak is read on every step. A step is all that leads to one update: under
    ``accumulate_grad_batches`` it is the whole window of batches.

    Metrics with fixed names in MiB (``memory/peak_mib``, ``memory/at_peak/activations_mib``, ...; those of
    validation under ``memory/validate/``) go to every logger and into ``trainer.callback_metrics``, so that
    ``EarlyStopping(monitor="memory/peak_mib")`` works. Training logs each watched step, the other stages log
    once per epoch, the highest watched step. At the end, also after an error, there are a table in the
    terminal, ``memory_report.json`` and ``memory_report.html``.

    The report names the run's techniques (callbacks, strategy and precision plugin that satisfy
    :class:`~lightning_memtrain.core.Technique`), with the settings in force at the end and what they changed.

    Growth is what watched steps leave behind, by the module that made it: storages that outlive the whole
    step after their own and are no parameter, buffer, gradient, optimizer state, logged value or fixed-size
    state of a metric. What a module leaves behind in one step only (a cache) is not growth.

    Args:
        every_n_steps: steps from one that the ledger watches to the next, after the first three; at least 1.
        per_module: whether the report has a row per module.
        timeline: whether the report has the events of the highest step.
        report_dir: folder for the report; ``None`` is ``memory`` in the trainer's ``log_dir``. The files in
            it are those of the latest run; each run keeps its own in a folder in it, named after its time.
        max_rows: modules, and moments of the timeline, that a stage has in ``memory_report.json``: what is
            least is summed up by the module around it (:attr:`report` and the page have all); at least 2,
            or ``None`` for all.
        predict: ``lightning_memtrain.predict``, to predict the training steps before the first one, and to
            say at the end by how much that was off. What cannot be predicted is said in a warning.
        log_all: whether loggers get all metrics, and W&B the timeline as series too; else at most a dozen, by
            which runs are compared. ``trainer.callback_metrics`` has all.
        stacks: whether the report says which line of your code has made what is live at the peak; watched
            steps take longer by it.

    Raises:
        ArgumentError: if ``every_n_steps`` is no whole number from 1 on, or ``max_rows`` none from 2 on.
    """

    # Steps that run without data take other times.
    _times_steps = True

    def __init__(
        self,
        every_n_steps: int = 50,
        per_module: bool = True,
        timeline: bool = True,
        report_dir: str | Path | None = None,
        max_rows: int | None = 1000,
        predict: Predictor | None = None,
        log_all: bool = False,
        stacks: bool = False,
    ) -> None:
        super().__init__()
        self._max_rows = validate_max_rows(max_rows)
        check_flags(
            "MemoryProfiler", per_module=per_module, timeline=timeline, log_all=log_all, stacks=stacks
        )
        kinds, cure = (str, PathLike, type(None)), "Leave it out for `memory` beside the logs."
        check_kinds("MemoryProfiler", kinds, "the path of a folder", cure, report_dir=report_dir)
        check_functions("MemoryProfiler", optional=True, predict=predict)
        self._predict = predict
        self._log_all = log_all
        self._stacks = stacks
        self._schedule = LedgerSchedule(every_n_steps)
        self._per_module = per_module
        self._timeline = timeline
        self._report_dir = None if report_dir is None else Path(report_dir)
        self.report: MemoryReport | None = None
        """The report of the latest run, once it is over."""
        self._forget_run()

    def _forget_run(self) -> None:
        self._run: RunRecorder | None = None
        self._allocator: AllocatorStatistics | None = None
        self._batch: BatchMeasurement | None = None
        self._held = HeldTensors()
        self._lines = KnownLines() if self._stacks else None
        self._predicted: PredictedStep | None = None
        self._model: weakref.ref[LightningModule] | None = None
        self._folder: Path | None = None
        self._telling = RunTelling(self._max_rows, self._log_all)
        self._finished = False

    def __getstate__(self) -> dict[str, Any]:
        # Sent to spawned processes and copied by tuners; what is being measured stays here.
        state = self.__dict__.copy()
        state.update(_run=None, _allocator=None, _batch=None, _model=None, _lines=None)
        return state

    def __repr__(self) -> str:
        settings = f"every_n_steps={self.every_n_steps}, stacks={self._stacks}, report_dir={self._report_dir}"
        return f"MemoryProfiler({settings})"

    @property
    def every_n_steps(self) -> int:
        """Steps from one that the ledger watches to the next."""
        return self._schedule.every_n_steps

    @property
    def breakdowns(self) -> Mapping[str, MemoryBreakdown]:
        """Per stage, the watched step with the highest peak so far."""
        stages = self._run.stages if self._run is not None else {}
        return {name: stage.highest for name, stage in stages.items() if stage.highest is not None}

    # ------------------------------------------------------------------ begin and end of a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder (on all ranks together) and give W&B its axes."""
        name = stage_name(trainer)
        same_model = self._model is not None and self._model() is pl_module
        if name == "fit" or not same_model:
            self._forget_run()
        elif self._run is not None:
            # A test after a fit goes into the report of that fit.
            self._run.forget_stage(name)
            self._run.out_of_memory = None
        self._finished = False
        self._model = weakref.ref(pl_module)
        self._folder = self._report_dir or Path(trainer.log_dir or trainer.default_root_dir) / "memory"
        for logger in trainer.loggers:
            define_metrics(logger, log_all=self._log_all)
        if self._predict is not None and name == "fit" and trainer.is_global_zero:
            self._predicted = predict_run(self._predict, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that cannot be profiled."""
        self._begin_run(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell W&B which techniques are at work: all have begun by now."""
        if self._times_steps:
            describe_techniques(trainer, technique_records(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the peaks of all ranks, while all of them are still there."""
        if self._run is not None:
            compare_peaks(trainer, self._run, None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, log and print the report."""
        self._drop_batch()
        self._finish(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave torch as it was found, and report on the failing step before the exception goes on."""
        try:
            self._end_failing_step(exception)
            self._finish(trainer, pl_module)
        except Exception as error:  # whatever goes wrong here must not hide the exception that matters
            warnings.warn(
                f"`MemoryProfiler` could not report on the step that failed: {type(error).__name__}: {error}",
                ReportWarning,
                stacklevel=2,
            )

    # ------------------------------------------------------------------ training

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to measure a training batch."""
        self._begin_batch(trainer, pl_module, "fit", batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the measurement, and the step unless gradients are still to be accumulated."""
        stage = self._end_batch()
        if stage is None or should_accumulate(trainer):
            return
        self._end_step(trainer, pl_module, stage)
        # A watched step is always logged; the others at the trainer's pace, the highest since the last time.
        watched = stage.since_published.breakdown is not None
        if watched or (self._reads_every_step and should_update_logs(trainer)):
            self._publish(trainer, stage, all_ranks=watched)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop a batch that was begun but skipped (``on_train_batch_start`` of the model returned -1)."""
        self._drop_batch()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """Put the beginning of backward from the loss, a scalar, on the timeline."""
        self._annotate("backward")

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Put the beginning of an optimizer's step on the timeline."""
        self._annotate("optimizer step")

    # ------------------------------------------------------------------ validation, test, prediction

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that cannot be profiled."""
        self._begin_run(trainer, pl_module)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Begin to measure a batch, unless it is one of the sanity check."""
        if not trainer.sanity_checking:
            self._begin_batch(trainer, pl_module, evaluation_name(trainer), batch)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End the measurement of an evaluated batch."""
        self._end_step(trainer, pl_module, self._end_batch())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the highest watched step of the epoch."""
        self._drop_batch()
        if self._run is not None and not trainer.sanity_checking:
            # All ranks meet here, also those whose loader gave no batch.
            self._publish(trainer, self._run.enter_stage(evaluation_name(trainer)), all_ranks=True)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    # ------------------------------------------------------------------ measuring

    @property
    def _reads_every_step(self) -> bool:
        # Reading an accelerator's counters costs nothing, unlike writing down the CPU's allocations.
        return self._allocator is not None and not isinstance(self._allocator, CpuStatistics)

    def _begin_run(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = profiled_device(pl_module)
        if self._run is None or self._run.device != device:
            self._run = RunRecorder(device, timed=self._times_steps)
            self._run.predicted = self._predicted
        self._allocator = self._statistics(device)
        if isinstance(self._allocator, CpuStatistics) and uses_torch_profiler(trainer):
            self._allocator = None  # only one profiler can record in a thread, and the user's goes first

    def _statistics(self, device: torch.device) -> AllocatorStatistics | None:
        """What reads the device's peak; a step that runs without data has another one."""
        return allocator_statistics(device)

    def _begin_batch(self, trainer: Trainer, pl_module: LightningModule, name: str, batch: Any) -> None:
        self._drop_batch()
        assert self._run is not None
        stage = self._run.enter_stage(name)
        if stage.clock is not None:
            stage.clock.start_batch()
        step = stage.open_step
        if step is None:
            number = batches_that_stepped(trainer) if name == "fit" else stage.num_steps
            step = stage.begin_step(number, self._schedule.watches(stage.num_steps))
        if step.watched:
            held = held_beside(self._held, trainer, pl_module)
            self._batch = BatchMeasurement.with_ledger(
                self._allocator, pl_module, trainer.optimizers, batch, self._run.device, held, self._lines
            )
        elif self._reads_every_step or self._schedule.watches(stage.num_steps):
            # The CPU's record of allocations knows the size of a block that is freed only if it saw the block
            # being made; most of what a step frees is from the step before, so it sees that one as well.
            self._batch = BatchMeasurement(self._allocator, None)
        if self._batch is not None:
            self._batch.start()

    def _end_batch(self) -> StageRecorder | None:
        """Add what was measured to the open step; the stage it belongs to, if any is profiled."""
        stage = self._run.current if self._run is not None else None
        if stage is None or stage.open_step is None:
            return None
        step = stage.open_step
        # Whoever else looks at memory takes time, too; reading an accelerator's counters takes none.
        step.has_observer |= is_watched() or (self._batch is not None and not self._reads_every_step)
        if self._batch is not None:
            batch, self._batch = self._batch, None
            try:
                measured = batch.finish(per_module=self._per_module, timeline=self._timeline)
            finally:
                batch.abandon()
            if step.watched or self._reads_every_step:
                step.measured += measured
        if stage.clock is not None:
            stage.clock.end_batch()
        return stage

    def _end_step(self, trainer: Trainer, pl_module: LightningModule, stage: StageRecorder | None) -> None:
        if stage is not None and self._run is not None:
            judging = stage.growth_watch.has_suspects
            self._run.end_step(stage, kept_storages(trainer, pl_module) if judging else ())

    def _drop_batch(self) -> None:
        """Forget a batch that was begun and never ended."""
        if self._batch is not None:
            self._batch.abandon()
            self._batch = None
            if self._run is not None and self._run.current is not None:
                self._run.current.drop_step()

    def _annotate(self, name: str) -> None:
        if self._batch is not None:
            self._batch.annotate(name)

    def _end_failing_step(self, exception: BaseException) -> None:
        if isinstance(exception, (ArgumentError, *misconfiguration_errors())):
            self._drop_batch()  # a step that somebody has refused did not begin
            return
        try:
            stage = self._end_batch()
        finally:
            self._drop_batch()
        if self._run is None:
            return
        if is_out_of_memory(exception):
            self._run.end_out_of_memory(str(exception) or type(exception).__name__)
        elif stage is not None:
            self._run.end_step(stage, spared=None)

    # ------------------------------------------------------------------ telling

    def _publish(self, trainer: Trainer, stage: StageRecorder, all_ranks: bool) -> None:
        assert self._run is not None
        self._telling.publish(
            trainer, self._run, stage, all_ranks=all_ranks, reads_every_step=self._reads_every_step
        )

    def _finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._finished or self._run is None or self._folder is None:
            return
        self._finished = True
        self.report = self._telling.finish(trainer, pl_module, self._run, self._folder) or self.report
