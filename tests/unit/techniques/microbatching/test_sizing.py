from __future__ import annotations

import pytest
import torch

from lightning_memtrain.techniques.microbatching.sizing import (
    AutoSize,
    FixedSplit,
    allocation_retries,
    free_device_bytes,
)

CPU = torch.device("cpu")


def settled(size: int, grow_after_batches: int = 3) -> AutoSize:
    auto = AutoSize(None, grow_after_batches)
    auto.start(0, size, 64, peak_bytes=900, free_bytes=1000, has_optimizer_state=True)
    auto.events.clear()
    return auto


def run_batches(auto: AutoSize, num: int, retried: bool = False) -> list[int | None]:
    sizes = []
    for step in range(num):
        auto.succeeded(step, retried)
        sizes.append(auto.size)
    return sizes


def test_fixed_split_keeps_what_it_was_given():
    split = FixedSplit(3, None)
    assert (split.num_microbatches, split.microbatch_size) == (3, None)


def test_a_found_size_is_an_event_with_its_reason():
    auto = AutoSize(None, 100)
    auto.start(0, 10, 64, peak_bytes=2000, free_bytes=2048, has_optimizer_state=False)
    assert auto.size == 10
    assert not auto.is_unknown_for(64, has_optimizer_state=False)
    assert auto.is_unknown_for(64, has_optimizer_state=True)
    assert auto.events == ["step 0: microbatch_size=10 of 64 samples: 1.95 KiB of 2.00 KiB"]


def test_a_size_is_found_again_once_there_is_optimizer_state():
    auto = AutoSize(None, 100)
    auto.start(0, 10, 64, peak_bytes=2000, free_bytes=2048, has_optimizer_state=False)
    auto.start(1, 7, 64, peak_bytes=2010, free_bytes=2048, has_optimizer_state=True)
    assert auto.size == 7
    assert not auto.is_unknown_for(64, has_optimizer_state=True)
    assert auto.events[1:] == [
        "step 1: microbatch_size=7 of 64 samples with optimizer state: 1.96 KiB of 2.00 KiB"
    ]


def test_optimizer_state_never_makes_the_size_larger():
    auto = AutoSize(None, 100)
    auto.start(0, 5, 64, peak_bytes=2000, free_bytes=2048, has_optimizer_state=False)
    auto.start(1, 9, 64, peak_bytes=2000, free_bytes=2048, has_optimizer_state=True)
    assert auto.size == 5
    assert len(auto.events) == 1


@pytest.mark.parametrize(("attempted", "expected"), [(8, 4), (7, 4), (3, 2), (2, 1)])
def test_a_failure_halves_what_was_tried(attempted: int, expected: int):
    auto = settled(8)
    auto.failed(12, attempted)
    assert auto.size == expected
    assert auto.events == [
        f"step 12: out of memory at microbatch_size={attempted}; microbatch_size={expected} from here"
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


def test_the_state_goes_on_where_it_was():
    auto = settled(8, grow_after_batches=1)
    auto.failed(0, 8)
    run_batches(auto, 1)
    state = auto.state_dict()
    resumed = AutoSize(None, 1)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert run_batches(resumed, 1) == run_batches(auto, 1) == [8]


def test_the_state_knows_whether_optimizer_state_is_still_to_come():
    auto = AutoSize(None, 100)
    auto.start(0, 10, 64, peak_bytes=2000, free_bytes=2048, has_optimizer_state=False)
    resumed = AutoSize(None, 100)
    resumed.load_state_dict(auto.state_dict())
    assert not resumed.is_unknown_for(64, has_optimizer_state=False)
    assert resumed.is_unknown_for(64, has_optimizer_state=True)


def test_a_batch_larger_than_one_that_fitted_as_a_whole_is_probed_again():
    auto = AutoSize(None, 100)
    assert auto.is_unknown_for(1, has_optimizer_state=True)
    auto.start(0, 16, 16, peak_bytes=1000, free_bytes=2048, has_optimizer_state=True)
    assert not auto.is_unknown_for(16, has_optimizer_state=True)
    assert auto.is_unknown_for(17, has_optimizer_state=True)
    auto.start(1, 20, 40, peak_bytes=2000, free_bytes=2048, has_optimizer_state=True)
    assert auto.size == 20
    assert not auto.is_unknown_for(80, has_optimizer_state=True)


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
