"""What microbatching saves and costs: peak bytes, time of a step, and the error of the gradients.

    python -m benchmarks.microbatching [--repeats 8] [--threads 1 2] [--only memory time gradients]

memory: the ledger's peak of a step of WideResNet-28-2 at batch 100 in a Trainer, by microbatch size, beside
that of a hand-written loop.

time: all contenders take turns on one model in one Trainer, in an order that changes from turn to turn; each
ratio is the median over the turns. A step is all that happens between two batches of the loader, so that what
Lightning does around it counts; the hand-written loop has nothing around it. At batch 4 the chunks are single
images, so that costs per chunk and per layer show as milliseconds that noise does not hide.

gradients: relative distance of the first gradient, all parameters as one vector, from that of the unsplit
batch in the same precision; and the ledger's peak of the second step. Composer is measured where it is
installed. It wants an older torch, so its rows come from an environment of its own:

    python -m benchmarks.microbatching --only gradients --results composer
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.lightning_steps import Batch, Training, Watch, fit, peak_of, trainer_with
from benchmarks.microbatching_gradients import gradient_rows
from benchmarks.models import Step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import MemoryLedger, Microbatching
from lightning_memtrain.core import MIB
from lightning_memtrain.report.batch_measurement import MeasuredBatch

BATCH_SIZE = 100
PEAK_BARS_MIB = {100: None, 50: 202.4, 25: 110.2, 10: 54.9, 5: 36.7, 2: 25.9, 1: 22.2}
# The most that the first may take, as a multiple of the second.
TIME_RATIOS = {
    ("engine_1", "lightning"): 1.02,
    ("microbatching_4", "torch_4"): 1.03,
    ("lightning", "torch"): None,
    ("torch_4", "torch"): None,
}
# What takes a step: a step by hand, Lightning with a callback, or Lightning alone.
Contender = Step | Microbatching | None


def memory_rows() -> dict[str, Any]:
    rows = {}
    for size, bar in PEAK_BARS_MIB.items():
        row = peak_of(measured_in_lightning(size))
        if bar is not None:
            row |= {"bar_mib": bar, "within_bar": row["ledger_mib"] <= bar}
        row["by_hand_mib"] = peak_by_hand_mib(size)
        rows[f"microbatch_size={size}"] = row
        print("memory", f"microbatch_size={size}", row)
    return rows


def measured_in_lightning(microbatch_size: int) -> MeasuredBatch:
    for _ in range(2):  # until there is a reading of the CPU's allocator, which may fail
        step = wide_resnet_step("cpu", BATCH_SIZE)
        watch = Watch(step, peak=True)
        fit(step, [step.inputs] * 3, Microbatching(microbatch_size=microbatch_size), watch)
        if watch.measured.allocator_peak_bytes is not None:
            break
    return watch.measured


def peak_by_hand_mib(microbatch_size: int) -> float:
    step = wide_resnet_step("cpu", BATCH_SIZE, microbatch_size=microbatch_size)
    step()  # makes the optimizer's state
    with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
        step()
    return round(ledger.breakdown(timeline=False).ledger_peak_bytes / MIB, 2)


class Turns:
    """A loader whose batches are taken by contenders in turn; who steps by hand does so between two batches.

    Args:
        trainer: fits ``module`` on this loader.
        module: the model of all contenders.
        step: the step of all contenders.
        contenders: by name.
        repeats: turns that count.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        module: Training,
        step: Step,
        contenders: Mapping[str, Contender],
        repeats: int,
    ) -> None:
        self._trainer, self._module, self._step, self._contenders = trainer, module, step, contenders
        self._num_turns = repeats + 1
        self.spent: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}

    def __len__(self) -> int:
        return 1 + self._num_turns * sum(not isinstance(one, Step) for one in self._contenders.values())

    def __iter__(self) -> Iterator[Batch]:
        order = random.Random(0)
        for turn in range(self._num_turns):
            for name, contender in order.sample([*self._contenders.items()], len(self._contenders)):
                self._step.optimizer.zero_grad()  # nobody begins with the gradients of the one before
                if isinstance(contender, Microbatching):
                    contender.on_fit_start(self._trainer, self._module)
                gc.collect()
                wall, cpu = time.perf_counter(), time.process_time()
                if isinstance(contender, Step):
                    contender()
                else:
                    yield self._step.inputs
                spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
                if isinstance(contender, Microbatching):
                    contender.teardown(self._trainer, self._module, "fit")
                if turn:  # the first turn warms up
                    self.spent[name].append(spent)
        yield self._step.inputs  # not counted: Lightning does not come back after the last batch


def time_ratios(batch_size: int, repeats: int) -> dict[str, Any]:
    """Medians of seconds, of ratios with their quartiles, and of differences, by wall and by CPU time."""
    step = wide_resnet_step("cpu", batch_size)
    contenders: dict[str, Contender] = {
        "torch": step,
        "torch_4": Step(step.model, step.optimizer, step.inputs, step.loss, batch_size // 4),
        "lightning": None,
        "engine_1": Microbatching(num_microbatches=1),
        "microbatching_4": Microbatching(num_microbatches=4),
    }
    trainer, module = trainer_with(), Training(step)
    turns = Turns(trainer, module, step, contenders, repeats)
    trainer.fit(module, turns)
    row: dict[str, Any] = {}
    for clock in ("wall", "cpu"):
        spent = {name: [one[clock] for one in turns.spent[name]] for name in contenders}
        row |= {f"{name}_{clock}_s": round(statistics.median(values), 4) for name, values in spent.items()}
        for (name, reference), bar in TIME_RATIOS.items():
            pairs = list(zip(spent[name], spent[reference], strict=True))
            quartiles = statistics.quantiles((one / other for one, other in pairs), n=4)
            lower, median, upper = (round(quartile, 4) for quartile in quartiles)
            result: dict[str, Any] = {"median": median, "quartiles": [lower, upper]}
            result["extra_ms"] = round(1000 * statistics.median(one - other for one, other in pairs), 2)
            if bar is not None and batch_size == BATCH_SIZE:
                result |= {"bar": bar, "within_bar": median <= bar}
            row[f"{name}_over_{reference}_{clock}"] = result
    return row


def main() -> None:
    """Measure, print and write."""
    sections = ("memory", "time", "gradients")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[1, 2], help="for the time; the rest uses the most of them"
    )
    parser.add_argument("--only", nargs="+", choices=sections, default=sections)
    parser.add_argument(
        "--results", default="microbatching", help="beginning of the names of the results' files"
    )
    options = parser.parse_args()
    keep_the_heap()
    torch.set_num_threads(max(options.threads))
    if "memory" in options.only:
        write_results(f"{options.results}_memory", memory_rows())
    if "gradients" in options.only:
        write_results(f"{options.results}_gradients", gradient_rows())
    if "time" in options.only:
        ratios = {}
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch_size, repeats in ((BATCH_SIZE, options.repeats), (4, 4 * options.repeats)):
                key = f"batch {batch_size}, {threads} thread{'s' if threads > 1 else ''}"
                ratios[key] = time_ratios(batch_size, repeats)
                print("time", key, ratios[key])
        write_results(f"{options.results}_time", ratios)


if __name__ == "__main__":
    main()
