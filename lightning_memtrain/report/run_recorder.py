"""All that is kept of a run while it is profiled, and the report made of it; knows nothing of a trainer."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.core import Growth, MemoryBreakdown, TechniqueRecord
from lightning_memtrain.report.advice import largest_holders
from lightning_memtrain.report.batch_measurement import MeasuredBatch
from lightning_memtrain.report.growth import GrowthDetector
from lightning_memtrain.report.memory_report import MemoryReport, OutOfMemory, StepPeak, StepTimes
from lightning_memtrain.report.predicted.predicted_step import PredictedStep
from lightning_memtrain.report.run_environment import environment
from lightning_memtrain.report.step_clock import StepClock

# A run of millions of steps must neither fill the host's memory nor make a report that no browser opens.
MAX_STEP_PEAKS = 10_000


@dataclass
class OpenStep:
    """A step that is not over yet; of several batches under gradient accumulation.

    Args:
        number: position in the stage, as the report shows it.
        watched: whether the ledger watches its batches.
        has_observer: whether anybody has measured memory in it, which takes time.
    """

    number: int
    watched: bool
    has_observer: bool = False
    measured: MeasuredBatch = field(default_factory=MeasuredBatch)


class StageRecorder:
    """What is known of one stage.

    Args:
        name: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        clock: times its steps; ``None`` where they are none of a real run.
    """

    def __init__(self, name: str, clock: StepClock | None = None) -> None:
        self.name = name
        self.clock = clock
        self.num_steps = 0
        self.open_step: OpenStep | None = None
        self.highest: MemoryBreakdown | None = None
        self.latest: MemoryBreakdown | None = None
        self.latest_number = 0
        self.peak_bytes = 0
        self.since_published = MeasuredBatch()
        self.growth: tuple[Growth, ...] = ()
        self.growth_watch = GrowthDetector()

    def begin_step(self, number: int, watched: bool) -> OpenStep:
        """Open the record of the next step of this stage."""
        self.num_steps += 1
        self.open_step = OpenStep(number, watched)
        return self.open_step

    def drop_step(self) -> None:
        """Forget the open step, which will not be ended."""
        self.open_step = None
        if self.clock is not None:
            self.clock.drop_step()

    def end_step(self, spared: Container[int] | None) -> StepPeak | None:
        """Close the open step and take over what it measured.

        Args:
            spared: storages not to be judged as growth yet, see :meth:`GrowthDetector.end_step`; ``None`` if
                the step broke off, so that nothing can be judged.

        Returns:
            The step's peak, ``None`` if nothing measured it.
        """
        step, self.open_step = self.open_step, None
        if step is None:
            return None
        if self.clock is not None:
            if spared is None:
                self.clock.drop_step()
            else:
                self.clock.end_step(step.has_observer)
        measured = step.measured
        if spared is not None:
            self.growth = self.growth_watch.end_step(measured.survivors, spared=spared)
        if measured.breakdown is not None:
            breakdown = replace(measured.breakdown, growth=self.growth)
            measured = replace(measured, breakdown=breakdown)
            self.latest, self.latest_number = breakdown, step.number
            if self.highest is None or _height(breakdown) > _height(self.highest):
                self.highest = breakdown
        self.since_published += replace(measured, survivors=())
        if measured.peak_bytes is None:
            return None
        self.peak_bytes = max(self.peak_bytes, measured.peak_bytes)
        return StepPeak(step.number, self.name, measured.peak_bytes, ledger=measured.breakdown is not None)

    def take_unpublished(self) -> MeasuredBatch:
        """The highest of all that was measured since the last call."""
        unpublished, self.since_published = self.since_published, MeasuredBatch()
        return unpublished


class RunRecorder:
    """What is known of a run.

    Args:
        device: the device that is profiled.
        timed: whether steps are timed.
    """

    def __init__(self, device: torch.device, timed: bool = True) -> None:
        self.device = device
        self._timed = timed
        self.stages: dict[str, StageRecorder] = {}
        self.step_peaks: list[StepPeak] = []
        self.ranks: dict[str, int] | None = None
        self.out_of_memory: OutOfMemory | None = None
        self.current: StageRecorder | None = None
        self.predicted: PredictedStep | None = None

    @property
    def peak_bytes(self) -> int:
        """The highest peak of all stages."""
        return max((stage.peak_bytes for stage in self.stages.values()), default=0)

    def enter_stage(self, name: str) -> StageRecorder:
        """The record of a stage, which becomes the current one."""
        if name not in self.stages:
            self.stages[name] = StageRecorder(name, StepClock(self.device) if self._timed else None)
        self.current = self.stages[name]
        return self.current

    def forget_stage(self, name: str) -> None:
        """Forget what is known of a stage, which begins anew."""
        self.stages.pop(name, None)
        self.step_peaks = [peak for peak in self.step_peaks if peak.stage != name]

    def end_step(self, stage: StageRecorder, spared: Container[int] | None) -> None:
        """Close a stage's open step, if there is one.

        Args:
            stage: one of :attr:`stages`.
            spared: see :meth:`StageRecorder.end_step`.
        """
        peak = stage.end_step(spared)
        if peak is not None:
            self.step_peaks.append(peak)
            if len(self.step_peaks) > MAX_STEP_PEAKS:
                self.step_peaks = thinned(self.step_peaks)

    def end_out_of_memory(self, message: str) -> None:
        """Close the current step, in which memory ran out; its breakdown is the one to show.

        Args:
            message: the device's own error.
        """
        stage = self.current
        if stage is None:
            return
        failing = stage.open_step
        self.end_step(stage, spared=None)
        first_line = message.strip().partition("\n")[0]
        if failing is not None and failing.measured.breakdown is not None:
            number, stage.highest = failing.number, stage.latest
        else:
            number = failing.number if failing is not None else stage.latest_number
            last = f"step {stage.latest_number} of {stage.name}"
            first_line += f" (The ledger did not watch this step; the holders are those of {last}.)"
        if stage.latest is None:
            return
        known_bytes = failing.measured.peak_bytes if failing is not None else None
        self.out_of_memory = OutOfMemory(
            step=number,
            stage=stage.name,
            message=first_line,
            held_bytes=known_bytes if known_bytes is not None else stage.latest.peak_bytes,
            holders=largest_holders(stage.latest),
        )

    def report(self, model: nn.Module, techniques: tuple[TechniqueRecord, ...] = ()) -> MemoryReport | None:
        """All that is known, as a report.

        Args:
            model: the module that was profiled.
            techniques: what the techniques of the run say of themselves.

        Returns:
            The report, ``None`` if the ledger watched no step.
        """
        watched = {name: stage for name, stage in self.stages.items() if stage.highest is not None}
        if not watched:
            return None
        return MemoryReport(
            model=type(model).__name__,
            num_parameters=sum(p.numel() for p in model.parameters() if not is_lazy(p)),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            environment=environment(self.device),
            stages={name: stage.highest for name, stage in watched.items() if stage.highest is not None},
            steps=tuple(self.step_peaks),
            growth={name: stage.growth_watch.largest for name, stage in watched.items()},
            ranks=self.ranks,
            out_of_memory=self.out_of_memory,
            techniques=techniques,
            predicted=self.predicted,
            step_times=self._step_times(),
        )

    def _step_times(self) -> dict[str, StepTimes]:
        clocks = {name: stage.clock for name, stage in self.stages.items() if stage.highest is not None}
        times = {name: clock.times() for name, clock in clocks.items() if clock is not None}
        return {name: known for name, known in times.items() if known is not None}


def _height(breakdown: MemoryBreakdown) -> tuple[int, bool]:
    # Of equal ones, a step without probes on its timeline is easier to read.
    return breakdown.peak_bytes, breakdown.aside_peak_bytes == 0


def thinned(peaks: list[StepPeak]) -> list[StepPeak]:
    """Keep the higher of any two neighbours of the same stage: half the length, no peak lost.

    Args:
        peaks: peaks in order.

    Returns:
        About half of them, in order.
    """
    kept: list[StepPeak] = []
    index = 0
    while index < len(peaks):
        pair = peaks[index : index + 2]
        if len(pair) == 2 and pair[0].stage == pair[1].stage:
            kept.append(max(pair, key=lambda peak: peak.peak_bytes))
            index += 2
        else:
            kept.append(pair[0])
            index += 1
    return kept
