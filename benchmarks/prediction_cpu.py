"""What is predicted for a CPU beside what its allocator counted, and what a prediction costs beside the step.

    python -m benchmarks.prediction_cpu [--write [NAME]] [ROW...]

Each row has processes of its own: one predicts, one trains three steps that a ledger watches, and one trains
three that nothing watches. The allocator's figures are those of torch's profiler. The rows of GPT-2 small
compare time and memory of a whole prediction with those of a run of one step; the larger needs 6 GiB and runs
only if it is named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl

from benchmarks.cpu_models import MODELS, Made, gpt2
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryProfiler
from lightning_memtrain.core import MIB
from lightning_memtrain.ledger.device_allocator import CpuStatistics
from lightning_memtrain.planning import predict
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.predict import Repeated

_SMALL = {"n_layer": 12, "n_embd": 768, "n_head": 12}
_COSTS: dict[str, Callable[[], Made]] = {
    "GPT-2 124M, 1 x 512": partial(gpt2, 1, 512, **_SMALL),
    "GPT-2 124M, 4 x 512": partial(gpt2, 4, 512, **_SMALL),
}
_ONLY_IF_NAMED = ("GPT-2 124M, 4 x 512",)


def _trainer(precision: Any = "32-true", **options: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def _used() -> tuple[float, float]:
    """Most MiB that this process had, and the most of one that it made."""
    own, made = (
        resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return own / 1024, made / 1024


def _processor_seconds() -> float:
    """What this process and those that it made have worked."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def predicted(make: Callable[[], Made], precision: Any, *, without_weights: bool = False) -> dict[str, Any]:
    """What a prediction says, and what it took.

    Args:
        make: makes model and batch.
        precision: to train in.
        without_weights: whether the model is made in the prediction only.

    Returns:
        MiB, seconds.
    """
    start = time.perf_counter()
    model, batch = (lambda: make()[0], make_batch(make)) if without_weights else make()
    before, _ = _used()
    prediction = predict(model, batch, device="cpu", trainer=_trainer(precision))
    own, copy = _used()
    return {
        "predicted_mib": prediction.allocated_bytes / MIB,
        "ledger_mib": prediction.breakdown.ledger_peak_bytes / MIB,
        "prediction_seconds": round(time.perf_counter() - start, 1),
        "prediction_processor_seconds": round(_processor_seconds(), 1),
        # The copy shares what the process had when it was made.
        "prediction_resident_mib": round(own + max(copy - before, 0)),
        "not_measured": list(prediction.unmeasured),
    }


def make_batch(make: Callable[[], Made]) -> Any:
    """A batch of language, without the model that comes with it."""
    import torch

    rows, length = make.args  # type: ignore[attr-defined]
    return torch.randint(50_000, (rows, length))


def watched(make: Callable[[], Made], precision: Any) -> dict[str, Any]:
    """What the allocator counted in steps that a ledger watches, and what was live when one began."""
    model, batch = make()
    with tempfile.TemporaryDirectory() as folder:
        profiler = MemoryProfiler(every_n_steps=1, report_dir=folder)
        trainer = _trainer(precision, max_steps=3, callbacks=[profiler])
        trainer.fit(model, Repeated(batch))
    assert profiler.report is not None
    breakdown = profiler.report.stages["fit"]
    assert breakdown.allocator_peak_bytes is not None
    return {
        "allocator_mib": breakdown.allocator_peak_bytes / MIB,
        "real_ledger_mib": breakdown.ledger_peak_bytes / MIB,
        "start_mib": breakdown.start_bytes / MIB,
    }


class _Alone(pl.Callback):
    """Reads the allocator in each step."""

    def __init__(self) -> None:
        self.over_start_bytes = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self._statistics = CpuStatistics()
        self._statistics.start()

    def on_train_batch_end(self, *args: Any) -> None:
        reading = self._statistics.stop()
        self.over_start_bytes = reading.over_start_bytes if reading is not None else 0


def unwatched(make: Callable[[], Made], precision: Any) -> float:
    """MiB that the last of three steps took beyond what was there when it began, with no ledger at work."""
    model, batch = make()
    alone = _Alone()
    _trainer(precision, max_steps=3, callbacks=[alone]).fit(model, Repeated(batch))
    return alone.over_start_bytes / MIB


def run_once(make: Callable[[], Made]) -> dict[str, Any]:
    """What one step takes when it is run, on all cores."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)  # copies of a process begin with one thread
    start = time.perf_counter()
    model, batch = make()
    _trainer(max_steps=1).fit(model, Repeated(batch))
    return {
        "step_seconds": round(time.perf_counter() - start, 1),
        "step_processor_seconds": round(_processor_seconds(), 1),
        "step_resident_mib": round(_used()[0]),
    }


def _apart(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In a process of its own, without what libraries print."""

    def quiet() -> Any:
        warnings.simplefilter("ignore")
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(io.StringIO()):
            os.dup2(nowhere.fileno(), 2)
            return function(*args, **kwargs)

    return call_in_copy(quiet)


def accuracy(make: Callable[[], Made], precision: Any) -> dict[str, Any]:
    """A row of the first table."""
    row = {**_apart(predicted, make, precision), **_apart(watched, make, precision)}
    row["unwatched_mib"] = row.pop("start_mib") + _apart(unwatched, make, precision)
    row["off_percent"] = (row["predicted_mib"] / row["allocator_mib"] - 1) * 100
    row["off_unwatched_percent"] = (row["predicted_mib"] / row["unwatched_mib"] - 1) * 100
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in row.items()}


def cost(make: Callable[[], Made]) -> dict[str, Any]:
    """A row of the second table."""
    return {**_apart(predicted, make, "32-true", without_weights=True), **_apart(run_once, make)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows, or parts of them; all by default")
    parser.add_argument(
        "--write",
        metavar="NAME",
        nargs="?",
        const="prediction_cpu",
        help="write benchmarks/results/NAME.json",
    )
    options = parser.parse_args()
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        **{name: partial(accuracy, *model) for name, model in MODELS.items()},
        **{name: partial(cost, make) for name, make in _COSTS.items()},
    }
    results = {}
    for name, measure in rows.items():
        named = any(part in name for part in options.rows)
        if named or (not options.rows and name not in _ONLY_IF_NAMED):
            results[name] = measure()
            print(name, results[name], flush=True)
            if options.write:
                write_results(options.write, results)


if __name__ == "__main__":
    main()
