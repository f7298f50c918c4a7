"""Sizes that ``microbatch_size="auto"`` finds in real runs, against the ledger's exact bytes."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.core import format_bytes, parse_bytes
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.automatic_size import size_choice
from lightning_memtrain.report import MemoryProfiler
from tests.helpers.faults import FailAt
from tests.helpers.trainers import quiet_trainer

NUM_SAMPLES = 24


class Net(LightningModule):
    """Activations that are much larger than the parameters."""

    def __init__(self, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = optimizer
        self._sizes: SimpleQueue[int] = SimpleQueue()  # nothing that is set back with the model

    @property
    def sizes(self) -> list[int]:
        """Samples of all chunks so far, also of those whose batch was run again."""
        sizes = [self._sizes.get() for _ in range(self._sizes.qsize())]
        for size in sizes:
            self._sizes.put(size)
        return sizes

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self._sizes.put(len(batch))
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=0.01)


def loader(num: int, *sizes: int) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    sizes = sizes or (NUM_SAMPLES,) * num
    return DataLoader([torch.randn(size, 40, 4, generator=generator) for size in sizes], batch_size=None)


def auto(limit: int | str = "1GiB", **given: Any) -> Microbatching:
    return Microbatching("auto", limit=limit, **given)  # as microbatch_size="auto", which other tests have


def events_after_the_probe(microbatching: Microbatching) -> list[str]:
    return [e for e in microbatching.technique_record().events if not e.startswith("step 0: ")]


def largest_chunk(microbatching: Microbatching) -> int:
    """Chunks are of even size, so 24 samples in chunks of at most 7 are chunks of 6."""
    return -(-NUM_SAMPLES // -(-NUM_SAMPLES // microbatching.microbatch_size))


@pytest.fixture(autouse=True)
def _peaks_are_the_ledgers(monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU's allocator has a reading for most steps only, which depends on the addresses of blocks.
    for module in ("report.profiler", "microbatching.automatic_size.chunk_trials"):
        monkeypatch.setattr(f"lightning_memtrain.{module}.allocator_statistics", lambda device: None)
    # The limit is one of what steps use; what lies beside them is in the report alone.


def step_peaks(folder: Path, technique: Microbatching, optimizer: Any, accumulate: int = 1) -> list[int]:
    """The ledger's peak of each of three steps."""
    profiler = MemoryProfiler(every_n_steps=1, per_module=False, report_dir=folder)
    trainer = quiet_trainer(folder, technique, profiler, accumulate_grad_batches=accumulate)
    trainer.fit(Net(optimizer), loader(3 * accumulate))
    assert all(step.ledger for step in profiler.report.steps)
    return [step.peak_bytes for step in profiler.report.steps]


# Each chunk keeps its loss until the batch is logged, at most 24 times 4 bytes.
LOSSES_BYTES = 96
RNG_BYTES = torch.get_rng_state().nbytes
# Of what "auto" logs itself, the size in force.
LOGGED_BYTES = 4
PARAMETERS_BYTES = 4 * sum(parameter.numel() for parameter in Net().parameters())


@pytest.mark.parametrize(("size", "smaller"), [(3, 2), (8, 6)])
@pytest.mark.parametrize(("accumulate", "optimizer"), [(1, torch.optim.SGD), (2, torch.optim.Adam)])
def test_it_finds_the_largest_size_within_the_limit(
    size: int, smaller: int, accumulate: int, optimizer: Any, tmp_path: Path
):
    fixed = step_peaks(tmp_path, Microbatching(microbatch_size=size), optimizer, accumulate)
    # To run a batch again, "auto" keeps random numbers' state, and amid a window the gradients.
    # The ledger does not see the former, which no operator makes.
    limit_bytes = fixed[-1] + (PARAMETERS_BYTES if accumulate > 1 else 0)
    exactly = auto(limit_bytes + RNG_BYTES)
    # The first step is that of the probe.
    peak_bytes = step_peaks(tmp_path, exactly, optimizer, accumulate)[-1]
    # Lightning 2.4 holds less amid a window.
    peak_bytes -= LOGGED_BYTES
    assert peak_bytes == limit_bytes or (accumulate > 1 and peak_bytes == limit_bytes - PARAMETERS_BYTES)
    assert largest_chunk(exactly) == size

    too_little = auto(limit_bytes + RNG_BYTES - LOSSES_BYTES)
    assert step_peaks(tmp_path, too_little, optimizer, accumulate)[-1] <= limit_bytes - LOSSES_BYTES
    assert largest_chunk(too_little) == smaller


def test_room_is_left_for_optimizer_state_before_it_is_there(tmp_path: Path):
    first, *_, last = step_peaks(tmp_path, Microbatching(microbatch_size=8), torch.optim.Adam)
    assert last - first == 2 * PARAMETERS_BYTES + 4 * 6  # and the number of steps, for each parameter
    microbatching = auto(last + RNG_BYTES)
    peaks = step_peaks(tmp_path, microbatching, torch.optim.Adam)
    assert peaks == [first, last + LOGGED_BYTES, last + LOGGED_BYTES]
    (event,) = microbatching.technique_record().events
    assert event.startswith("step 0: microbatch_size=8 of 24 samples: ")
    # In the first step, 8 samples would fit.
    microbatching = auto(last + RNG_BYTES - LOSSES_BYTES)
    assert max(step_peaks(tmp_path, microbatching, torch.optim.Adam)) <= last - LOSSES_BYTES
    (event,) = microbatching.technique_record().events
    assert event.startswith("step 0: microbatch_size=6 of 24 samples: ")


BATCH_BYTES = NUM_SAMPLES * 40 * 4 * 4


def refused(limit_bytes: int, optimizer: Any, folder: Path, **options: Any) -> str:
    """Why a limit is refused; it is not broken until then."""
    ledgers = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            ledgers.append(MemoryLedger(pl_module, trainer.optimizers, batch).__enter__())

    trainer = quiet_trainer(folder, Watch(), auto(limit_bytes), **options)
    with pytest.raises(MisconfigurationException) as caught:
        trainer.fit(Net(optimizer), loader(2))
    ledgers[0].__exit__(None, None, None)
    assert trainer.global_step == 0
    breakdown = ledgers[0].breakdown()
    assert breakdown.ledger_peak_bytes <= max(limit_bytes, breakdown.start_bytes)
    return str(caught.value)


@pytest.mark.parametrize("short_by", [1, 3_000, 20_000])
def test_a_limit_below_one_sample_is_refused_with_what_holds_it(short_by: int, tmp_path: Path):
    peak_bytes = step_peaks(tmp_path, Microbatching(microbatch_size=1), torch.optim.SGD)[0]
    limit_bytes = peak_bytes + RNG_BYTES - short_by
    message = (
        r"^`Microbatching\(limit\)` must have room for one sample at a time, which takes "
        r"(at least )?(?P<needed>[\d.]+ KiB) with .*15\.00 KiB of the batch and other inputs.* 5\.51 KiB of "
        rf"parameters.*, but got limit={re.escape(format_bytes(limit_bytes))}\. Raise it, or make weights, "
        r"gradients or optimizer state smaller: microbatching only shrinks activations\.$"
    )
    found = re.match(message, refused(limit_bytes, torch.optim.SGD, tmp_path))
    assert found is not None
    assert limit_bytes < parse_bytes(found["needed"]) + 6  # rounded
    assert parse_bytes(found["needed"]) <= peak_bytes + RNG_BYTES + 6


@pytest.mark.parametrize("foreach", [False, True])
def test_a_limit_below_the_step_of_the_optimizer_is_refused_with_what_holds_it(foreach: bool, tmp_path: Path):
    adam = functools.partial(torch.optim.Adam, foreach=foreach)
    # Root and quotient of the largest parameter; or, at once, the roots of all.
    temporary_bytes = PARAMETERS_BYTES if foreach else 2 * 4 * 64 * 16
    state_bytes = 2 * PARAMETERS_BYTES + 4 * 6
    needed_bytes = 2 * PARAMETERS_BYTES + BATCH_BYTES + state_bytes
    message = (
        r"^`Microbatching\(limit\)` must have room for the step of the optimizer, which takes "
        r"(?P<needed>[\d.]+ KiB) with 15\.00 KiB of the batch and other inputs, 11\.05 KiB of optimizer "
        r"state, 5\.51 KiB of parameters, 5\.51 KiB of gradients, (?P<temporary>[\d.]+ K?i?B) of temporary "
        r"tensors, but got limit=1 B\. No size of microbatches changes that\. Raise it, let the optimizer "
        r"step one parameter at a time \(foreach=False\) or keep less state, or make weights smaller\.$"
    )
    found = re.match(message, refused(1, adam, tmp_path))
    assert found is not None
    assert parse_bytes(found["temporary"]) == pytest.approx(temporary_bytes, abs=300)  # and small ones
    assert parse_bytes(found["needed"]) == pytest.approx(needed_bytes + temporary_bytes, abs=300)


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_batch_of_one_or_two_samples_is_not_split(num_samples: int, tmp_path: Path):
    model, microbatching = Net(), auto()
    quiet_trainer(tmp_path, microbatching).fit(model, loader(2, num_samples, num_samples))
    assert model.sizes[-2:] == [num_samples] * 2
    assert microbatching.microbatch_size == num_samples


def test_three_samples_are_enough_for_a_probe(tmp_path: Path):
    model, microbatching = Net(), auto()
    quiet_trainer(tmp_path, microbatching).fit(model, loader(1, 3))
    assert model.sizes[-1] == 3
    assert microbatching.microbatch_size == 3


# ---------------------------------------------------------------------- out of memory


class Small(Net):
    """Runs out of memory with more than so many samples, from a batch on."""

    def __init__(self, most: int, from_batch: int = 1) -> None:
        super().__init__()
        self.most, self.from_batch = most, from_batch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if len(batch) > self.most and batch_idx >= self.from_batch:
            raise torch.OutOfMemoryError("injected")
        return loss


def test_one_batch_may_fail_several_times(tmp_path: Path):
    model, microbatching = Small(5), auto()
    quiet_trainer(tmp_path, microbatching).fit(model, loader(2))
    assert model.sizes[-12:] == [24, 24, 12, 6, *8 * [3]]
    assert events_after_the_probe(microbatching) == [
        "step 1: out of memory at microbatch_size=24; microbatch_size=12 from here",
        "step 1: out of memory at microbatch_size=12; microbatch_size=6 from here",
        "step 1: out of memory at microbatch_size=6; microbatch_size=3 from here",
    ]
    assert microbatching.state_dict()["grow_after_batches"] == 800


@pytest.mark.parametrize("most", [1, 3, 5])
def test_the_probe_may_run_out_of_memory_itself(most: int, tmp_path: Path):
    model, microbatching = Small(most, from_batch=0), auto()
    trainer = quiet_trainer(tmp_path, microbatching)
    trainer.fit(model, loader(2))
    assert trainer.global_step == 2
    assert 1 <= microbatching.microbatch_size <= most
    assert max(model.sizes[-NUM_SAMPLES // most :]) <= most


def test_a_single_sample_that_does_not_fit_ends_the_run(tmp_path: Path):
    message = (
        "^Out of memory with a single sample at a time, so `Microbatching` cannot help further. "
        "The device said: injected$"
    )
    trainer = quiet_trainer(tmp_path, auto())
    with pytest.raises(torch.OutOfMemoryError, match=message):
        trainer.fit(Small(0, from_batch=0), loader(1))


def test_other_errors_go_on_as_they_are(tmp_path: Path):
    class Breaks(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise ZeroDivisionError("of the model")

    with pytest.raises(ZeroDivisionError, match="of the model"):
        quiet_trainer(tmp_path, auto()).fit(Breaks(), loader(1))


def test_it_grows_back_to_the_ceiling_with_doubled_patience(tmp_path: Path):
    microbatching = auto(grow_after_batches=2)
    model = Net()
    failures = (FailAt("forward", 1), FailAt("backward", 6))
    failures[1].__class__ = type("FailAgain", (FailAt,), {})  # Lightning wants one callback per class
    trainer = quiet_trainer(tmp_path, microbatching, *failures)
    trainer.fit(model, loader(16))
    assert events_after_the_probe(microbatching) == [
        "step 1: out of memory at microbatch_size=24; microbatch_size=12 from here",
        "step 4: 4 clean batches; microbatch_size=24 from here",
        "step 6: out of memory at microbatch_size=24; microbatch_size=12 from here",
        "step 13: 8 clean batches; microbatch_size=24 from here",
    ]
    sizes = [24, 24, *4 * [12, 12], 24, 24, *8 * [12, 12], 24, 24]
    assert model.sizes[-len(sizes) :] == sizes
    assert trainer.callback_metrics["microbatching/microbatch_size"] == 24.0


def test_retries_of_the_allocator_are_soft_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Asked before and after each batch; batches 1, 3 and 4 had to retry.
    counts = iter([0, 0, 0, 1, 1, 1, 1, 2, 2, 4, 4, 4])
    monkeypatch.setattr(size_choice, "allocation_retries", lambda device: next(counts))
    model, microbatching = Net(), auto()
    quiet_trainer(tmp_path, microbatching).fit(model, loader(6))
    assert events_after_the_probe(microbatching) == [
        "step 4: the allocator had to retry in two batches running; microbatch_size=12 from here"
    ]
    assert model.sizes[-7:] == [*5 * [24], 12, 12]
    assert next(counts, None) is None


# ---------------------------------------------------------------------- split_fn


def test_it_recovers_with_a_split_fn(tmp_path: Path):
    model = Small(12)
    microbatching = auto(split_fn=lambda batch, count: list(batch.chunk(count)))
    quiet_trainer(tmp_path, microbatching).fit(model, loader(2))
    assert model.sizes[-4:] == [24, 24, 12, 12]
    assert microbatching.microbatch_size == 12


def test_it_refuses_a_split_fn_whose_samples_it_cannot_count(tmp_path: Path):
    message = (
        '`Microbatching(microbatch_size="auto")` needs chunks of even size, but asked for 12 chunks of 24 '
        "samples `split_fn` returned a first one with 1. With this `split_fn`, use `num_microbatches` "
        "instead."
    )
    microbatching = auto(
        split_fn=lambda batch, count: list(batch.chunk(count, dim=1)), weight_fn=lambda chunk: chunk.size(1)
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        quiet_trainer(tmp_path, microbatching).fit(Net(), loader(1))
