from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from lightning_memtrain.coordination import aside
from lightning_memtrain.core import CategoryBytes, MemoryBreakdown, TechniqueRecord
from lightning_memtrain.ledger import AllocatorReading, AllocatorStatistics, MemoryLedger
from lightning_memtrain.report import run_recorder as recording
from lightning_memtrain.report.batch_measurement import BatchMeasurement, MeasuredBatch
from lightning_memtrain.report.memory_report import StepPeak
from lightning_memtrain.report.run_recorder import RunRecorder, thinned

CPU = torch.device("cpu")


def _breakdown(num_bytes: int) -> MemoryBreakdown:
    held = CategoryBytes({"parameters": num_bytes})
    return MemoryBreakdown(device="cpu", at_peak=held, maxima=held)


def _take_step(run: RunRecorder, measured: MeasuredBatch, stage: str = "fit") -> None:
    record = run.enter_stage(stage)
    step = record.begin_step(record.num_steps, watched=measured.breakdown is not None)
    step.measured += measured
    run.end_step(record, spared=())


def test_of_several_batches_the_highest_counts():
    both = (
        MeasuredBatch(_breakdown(8), 10)
        + MeasuredBatch(_breakdown(24), 30)
        + MeasuredBatch(_breakdown(16), 20)
    )
    assert both == MeasuredBatch(_breakdown(24), 30)
    assert (MeasuredBatch() + MeasuredBatch(_breakdown(8))).peak_bytes == 8
    assert (MeasuredBatch() + MeasuredBatch()).peak_bytes is None


def test_the_allocator_has_the_last_word_on_the_peak():
    assert MeasuredBatch(_breakdown(8).with_allocator_peak(11), 11).peak_bytes == 11


def test_the_allocators_figures_are_laid_beside_the_ledgers():
    class Allocator(AllocatorStatistics):
        def start(self):
            pass

        def stop(self, start_bytes=0, end_bytes=None):
            return AllocatorReading(500, 400, reserved_bytes=4096, num_alloc_retries=2)

    batch = BatchMeasurement(Allocator(), MemoryLedger(nn.Linear(2, 1)))
    batch.start()
    breakdown = batch.finish(per_module=False, timeline=False).breakdown
    assert breakdown is not None
    assert (breakdown.allocator_peak_bytes, breakdown.reserved_bytes, breakdown.num_alloc_retries) == (
        500,
        4096,
        2,
    )


def test_what_is_aside_is_read_neither_by_the_ledger_nor_from_the_allocator():
    calls: list[tuple[int, ...]] = []

    class Allocator(AllocatorStatistics):
        def start(self):
            calls.append(())

        def stop(self, start_bytes=0, end_bytes=None):
            calls.append((start_bytes, end_bytes or 0))
            return AllocatorReading(start_bytes + 50, 50)

    layer = nn.Linear(2, 1)  # 12 bytes
    batch = BatchMeasurement(Allocator(), MemoryLedger(layer))
    batch.start()
    kept = torch.zeros(2)
    with aside("probe of 2 samples"):
        torch.zeros(1000)
    kept = torch.cat([kept, kept])
    breakdown = batch.finish(per_module=False, timeline=True).breakdown
    assert breakdown is not None
    assert (breakdown.ledger_peak_bytes, breakdown.aside_peak_bytes) == (12 + 8 + 16, 12 + 8 + 4000)
    assert breakdown.timeline[0].name == "probe of 2 samples"
    # Begun, ended before the aside, begun after it, ended with what was live then and is live now.
    assert calls == [(), (0, 0), (), (12 + 8, 12 + 16)]
    assert breakdown.allocator_peak_bytes == 20 + 50
    with aside("probe"):
        pass
    assert len(calls) == 4


def test_of_equally_high_steps_one_without_probes_is_shown():
    with_probe, without = replace(_breakdown(24), aside_peak_bytes=8), _breakdown(24)
    for steps, shown in (([with_probe, without], without), ([with_probe, _breakdown(16)], with_probe)):
        run = RunRecorder(CPU)
        for breakdown in steps:
            _take_step(run, MeasuredBatch(breakdown))
        report = run.report(nn.Linear(2, 1))
        assert report is not None
        assert report.stages["fit"] == shown


def test_the_report_holds_the_techniques():
    run = RunRecorder(CPU)
    _take_step(run, MeasuredBatch(_breakdown(8)))
    record = TechniqueRecord("Microbatching", {"microbatch_size": 2})
    report = run.report(nn.Linear(2, 1), (record,))
    assert report is not None
    assert report.techniques == (record,)


def test_the_highest_step_of_each_stage_is_kept():
    run = RunRecorder(CPU)
    for peak in (8, 24, 16):
        _take_step(run, MeasuredBatch(_breakdown(peak)))
    _take_step(run, MeasuredBatch(_breakdown(4)), "validate")
    report = run.report(nn.Linear(2, 1))
    assert report is not None
    assert {name: stage.peak_bytes for name, stage in report.stages.items()} == {"fit": 24, "validate": 4}
    assert report.steps == (
        StepPeak(0, "fit", 8, True),
        StepPeak(1, "fit", 24, True),
        StepPeak(2, "fit", 16, True),
        StepPeak(0, "validate", 4, True),
    )
    assert (report.model, report.num_parameters) == ("Linear", 3)
    assert run.peak_bytes == 24


def test_nothing_watched_makes_no_report():
    run = RunRecorder(CPU)
    _take_step(run, MeasuredBatch(allocator_peak_bytes=5))
    assert run.report(nn.Linear(2, 1)) is None


def test_lazy_parameters_count_nothing():
    run = RunRecorder(CPU)
    _take_step(run, MeasuredBatch(_breakdown(8)))
    report = run.report(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1)))
    assert report is not None
    assert report.num_parameters == 4


def test_thinning_keeps_the_highest_and_the_order():
    fit = [StepPeak(i, "fit", peak, False) for i, peak in enumerate((3, 9, 4, 1, 7))]
    validate = [StepPeak(i, "validate", peak, False) for i, peak in enumerate((2, 6))]
    assert [(p.stage, p.step) for p in thinned(fit + validate)] == [
        ("fit", 1),
        ("fit", 2),
        ("fit", 4),
        ("validate", 1),
    ]


def test_a_long_run_is_thinned(monkeypatch):
    monkeypatch.setattr(recording, "MAX_STEP_PEAKS", 8)
    run = RunRecorder(CPU)
    for step in range(1000):
        _take_step(run, MeasuredBatch(allocator_peak_bytes=500 if step == 321 else 100))
        assert len(run.step_peaks) <= 8
    assert max(peak.peak_bytes for peak in run.step_peaks) == 500
    assert [peak.step for peak in run.step_peaks if peak.peak_bytes == 500] == [321]


def test_out_of_memory_shows_the_failing_step_even_if_another_was_higher():
    run = RunRecorder(CPU)
    _take_step(run, MeasuredBatch(_breakdown(24)))
    record = run.enter_stage("fit")
    record.begin_step(1, watched=True).measured = MeasuredBatch(_breakdown(16))
    run.end_out_of_memory("no more memory\nsecond line")
    failure = run.out_of_memory
    assert failure is not None
    assert (failure.step, failure.stage, failure.held_bytes) == (1, "fit", 16)
    assert failure.message == "no more memory"
    assert [(holder.name, holder.num_bytes) for holder in failure.holders] == [("parameters", 16)]
    assert run.stages["fit"].highest == _breakdown(16)


def test_out_of_memory_in_a_step_without_the_ledger_says_so():
    run = RunRecorder(CPU)
    _take_step(run, MeasuredBatch(_breakdown(24)))
    run.enter_stage("fit").begin_step(7, watched=False).measured = MeasuredBatch(allocator_peak_bytes=40)
    run.end_out_of_memory("no more memory")
    failure = run.out_of_memory
    assert failure is not None
    assert (failure.step, failure.held_bytes) == (7, 40)
    assert failure.message == (
        "no more memory (The ledger did not watch this step; the holders are those of step 0 of fit.)"
    )
    assert [(holder.name, holder.num_bytes) for holder in failure.holders] == [("parameters", 24)]


def test_out_of_memory_before_any_step_was_measured_is_not_invented():
    run = RunRecorder(CPU)
    run.end_out_of_memory("no more memory")
    run.enter_stage("fit").begin_step(0, watched=False)
    run.end_out_of_memory("no more memory")
    assert run.out_of_memory is None
