from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from lightning_memtrain.core.devices.device_memory import free_device_bytes
from lightning_memtrain.microbatching.automatic_size.fitting_size import BatchConditions, FittingSize
from lightning_memtrain.microbatching.automatic_size.size_choice import (
    AutoSize,
    allocation_retries,
)
from lightning_memtrain.microbatching.splitting.chunks import FixedSplit

CPU = torch.device("cpu")

USUAL = BatchConditions(
    num_samples=64,
    shapes=((10, 4),),
    batch_bytes=1_000,
    trained=0b0110,
    accumulating=False,
    held_bytes=500,
    update="SGD",
)


def batch(**given: Any) -> BatchConditions:
    return USUAL._replace(**given)


def found(size: int, **given: Any) -> FittingSize:
    usual = FittingSize(
        size=size,
        peak_bytes=1_900,
        limit_bytes=2_048,
        growing_bytes=800,
        kept_bytes=8,
        coming_bytes=100,
        updates=("SGD", "SGD later"),
        made_for=USUAL,
    )
    return usual._replace(**given)


def settled(size: int, grow_after_batches: int = 3) -> AutoSize:
    auto = AutoSize(None, grow_after_batches)
    auto.start(0, found(size))
    auto.events.clear()
    return auto


def run_batches(auto: AutoSize, num: int, retried: bool = False) -> list[int | None]:
    sizes = []
    for step in range(num):
        auto.choose(USUAL)
        auto.succeeded(step, retried)
        sizes.append(auto.size)
    return sizes


def test_fixed_split_keeps_what_it_was_given():
    split = FixedSplit(3, None)
    assert (split.num_microbatches, split.microbatch_size) == (3, None)


# ---------------------------------------------------------------------- what was found


def test_a_found_size_is_an_event_with_its_reason():
    auto = AutoSize(None, 100)
    assert auto.choose(USUAL) is None
    assert auto.size is None
    auto.start(0, found(10))
    assert auto.size == 10
    assert auto.choose(USUAL) == 10
    assert auto.events == ["step 0: microbatch_size=10 of 64 samples: 1.86 KiB of 2.00 KiB"]


def test_a_size_that_is_only_hoped_to_fit_says_so():
    auto = AutoSize(None, 100)
    auto.start(0, found(1, peak_bytes=None))
    assert auto.events == ["step 0: microbatch_size=1 of 64 samples: no size was found that fits of 2.00 KiB"]
    assert auto.choose(USUAL) == 1
    assert auto.choose(batch(held_bytes=10**9)) == 1
    assert auto.choose(batch(shapes=((11, 4),))) is None


ROOM = 2_048 - 1_900


@pytest.mark.parametrize(
    "now",
    [
        batch(),
        batch(num_samples=3, batch_bytes=50),
        batch(num_samples=64 + 18 * 10),  # 18 chunks more of 8 bytes each
        batch(batch_bytes=1_000 + ROOM),
        batch(held_bytes=500 + 100 + ROOM),  # the optimizer state to come is in the peak already
        batch(batch_bytes=1_100, held_bytes=500 + 100 + ROOM - 100),
        batch(trained=0b0100),
        batch(update="SGD later"),
        batch(shapes=((9, 4),)),
        batch(shapes=((2, 4),), batch_bytes=10),
    ],
)
def test_it_holds_for_batches_that_cannot_need_more_than_there_is(now: BatchConditions):
    assert found(10).holds_for(now, None)
    assert found(10).holds_for(now, 2_048)


@pytest.mark.parametrize(
    ("now", "why"),
    [
        (batch(num_samples=64 + 19 * 10), ", for a larger batch"),
        (batch(batch_bytes=1_001 + ROOM), ", with more that is kept from batch to batch"),
        (batch(held_bytes=601 + ROOM), ", with more that is kept from batch to batch"),
        (batch(trained=0b1110), ", with more parameters in training"),
        (batch(trained=0b1000), ", with more parameters in training"),
        (batch(update="Adam"), ", with another step of the optimizer"),
        (batch(accumulating=True), ", with gradients of earlier batches"),
        (batch(shapes=((11, 4),)), ", for a larger batch"),  # 800 bytes may become 968
        (batch(shapes=((10, 4), (1,))), ", for a larger batch"),
        (batch(shapes=((10, 4, 1),)), ", for a larger batch"),
        (batch(shapes=()), ", for a larger batch"),
    ],
)
def test_it_is_found_again_for_those_that_can(now: BatchConditions, why: str):
    auto = AutoSize(None, 100)
    auto.start(0, found(10))
    assert auto.choose(now) is None
    assert auto.size == 10
    auto.start(7, found(9, made_for=now))
    assert (
        auto.events[1] == f"step 7: microbatch_size=9 of {now.num_samples} samples{why}: 1.86 KiB of 2.00 KiB"
    )


def test_a_slightly_larger_sample_may_fit_without_a_probe():
    assert found(10, growing_bytes=400).holds_for(batch(shapes=((11, 4),)), None)
    shared = batch(shapes=((10, 4), (10,)))
    longer = batch(shapes=((11, 4), (11,)))  # one dimension of two tensors
    assert found(10, growing_bytes=400, made_for=shared).holds_for(longer, None)
    assert not found(10, growing_bytes=400).holds_for(batch(shapes=((11, 5),)), None)
    assert not found(10, made_for=batch(shapes=((0, 4),))).holds_for(batch(shapes=((1, 4),)), 10**12)


def test_a_batch_that_fitted_as_a_whole_says_nothing_of_chunks():
    whole = found(64)
    assert whole.holds_for(batch(num_samples=64), None)
    assert whole.holds_for(batch(num_samples=63), None)
    assert not whole.holds_for(batch(num_samples=65), 10**12)


def test_another_limit_is_another_question():
    auto = AutoSize(1_899, 100)
    auto.start(0, found(10))
    assert auto.choose(USUAL) is None
    auto = AutoSize(1_900, 100)
    auto.start(0, found(10))
    assert auto.choose(USUAL) == 10


def test_several_sizes_are_remembered_and_the_largest_is_taken_that_holds():
    auto = AutoSize(None, 100)
    long, longer = batch(shapes=((20, 4),)), batch(shapes=((40, 4),))
    auto.start(0, found(10))
    auto.start(1, found(5, made_for=long))
    auto.start(2, found(2, made_for=longer))
    assert [auto.choose(now) for now in (USUAL, long, longer, USUAL)] == [10, 5, 2, 10]
    auto.start(3, found(6, made_for=longer))  # what was found for less is of no use any more
    assert [auto.choose(now) for now in (USUAL, long, longer)] == [10, 6, 6]
    assert len(auto.state_dict()["found"]) == 2


def test_not_all_sizes_are_remembered():
    auto = AutoSize(None, 100)
    for step in range(100):
        now = batch(shapes=((2**step, 2 ** (100 - step)),))  # none is nearly within another
        auto.start(step, found(10, made_for=now))
    assert len(auto.state_dict()["found"]) == 32
    assert auto.choose(now) == 10


# ---------------------------------------------------------------------- failures


@pytest.mark.parametrize(("attempted", "expected"), [(8, 4), (7, 4), (3, 2), (2, 1)])
def test_a_failure_halves_what_was_tried(attempted: int, expected: int):
    auto = settled(8)
    auto.failed(12, attempted)
    assert auto.size == expected
    assert auto.choose(USUAL) == expected
    assert auto.events == [
        f"step 12: out of memory at microbatch_size={attempted}; microbatch_size={expected} from here"
    ]


def test_a_failure_says_what_failed():
    auto = settled(8)
    auto.failed(12, 8, "a limit is out of reach")
    assert auto.events == [
        "step 12: a limit is out of reach at microbatch_size=8; microbatch_size=4 from here"
    ]


def test_a_smaller_size_grows_back_to_the_ceiling_and_each_failure_doubles_the_patience():
    auto = settled(6, grow_after_batches=2)
    auto.failed(0, 6)  # 3; patience 4
    assert run_batches(auto, 9) == [3, 3, 3, 6, 6, 6, 6, 6, 6]
    assert auto.events[1:] == ["step 3: 4 clean batches; microbatch_size=6 from here"]
    auto.failed(9, 6)  # 3; patience 8
    auto.failed(9, 3)  # 2; patience 16
    assert run_batches(auto, 33) == [2] * 15 + [4] * 16 + [6] * 2


def test_a_failure_starts_the_count_of_clean_batches_again():
    auto = settled(8, grow_after_batches=1)
    auto.failed(0, 8)  # patience 2
    assert run_batches(auto, 1) == [4]
    auto.failed(1, 4)  # patience 4
    assert run_batches(auto, 4) == [2, 2, 2, 4]


def test_what_a_probe_finds_does_not_undo_a_failure():
    auto = settled(8)
    auto.failed(0, 8)
    auto.start(1, found(6, made_for=batch(num_samples=100)))
    assert auto.size == 4
    assert len(auto.events) == 1


def test_retries_in_two_batches_running_halve_the_size():
    auto = settled(8)
    assert run_batches(auto, 1, retried=True) == [8]
    assert run_batches(auto, 1, retried=False) == [8]
    assert run_batches(auto, 4, retried=True) == [8, 4, 4, 2]
    assert auto.events == [
        "step 1: the allocator had to retry in two batches running; microbatch_size=4 from here",
        "step 3: the allocator had to retry in two batches running; microbatch_size=2 from here",
    ]
    assert auto.state_dict()["grow_after_batches"] == 12


def test_a_single_sample_is_not_halved():
    assert run_batches(settled(1), 4, retried=True) == [1] * 4


# ---------------------------------------------------------------------- checkpoints


def test_the_state_goes_on_where_it_was():
    auto = settled(8, grow_after_batches=1)
    auto.failed(0, 8)
    run_batches(auto, 1)
    state = json.loads(json.dumps(auto.state_dict()))  # plain values
    resumed = AutoSize(None, 1)
    resumed.load_state_dict(state)
    assert json.loads(json.dumps(resumed.state_dict())) == state
    assert resumed.choose(USUAL) == 4
    assert run_batches(resumed, 1) == run_batches(auto, 1) == [8]


def test_a_size_below_all_that_was_found_is_one_since_a_failure():
    auto = settled(8)
    auto.load_state_dict(auto.state_dict() | {"microbatch_size": 4})
    assert auto.choose(USUAL) == 4


# ---------------------------------------------------------------------- what the device says


def test_the_cpu_does_not_tell_what_it_has_free():
    assert free_device_bytes(CPU) is None
    assert allocation_retries(CPU) == 0


def test_what_the_process_holds_already_counts_as_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 200)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: {"num_alloc_retries": 3})
    assert free_device_bytes(torch.device("cuda", 0)) == 900
    assert allocation_retries(torch.device("cuda", 0)) == 3
