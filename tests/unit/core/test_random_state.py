"""Random numbers go on where they were, whoever has drawn some meanwhile."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lightning_memtrain.core.random_state import (
    NumpyRandom,
    global_random_states,
    load_random_state_dict,
    random_state_dict,
    seeded,
    torch_random_kept,
)


def draw() -> tuple[Any, ...]:
    return random.random(), random.gauss(0, 1), torch.rand(2).tolist(), numpy.random.rand(2).tolist()


def test_a_saved_state_brings_back_the_numbers_of_all_three_libraries(tmp_path: Path) -> None:
    draw()  # Python's generator keeps every other number of a normal distribution
    torch.save(random_state_dict(), tmp_path / "state.pt")
    numbers = draw()
    assert draw() != numbers
    load_random_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == numbers


def test_another_bit_generator_of_numpy_is_saved_too() -> None:
    before = numpy.random.get_bit_generator()
    try:
        numpy.random.set_bit_generator(numpy.random.PCG64(3))
        state = random_state_dict()
        numbers = draw()
        load_random_state_dict(state)
        assert draw() == numbers
    finally:
        numpy.random.set_bit_generator(before)


def test_a_state_of_an_older_version_leaves_numpy_alone() -> None:
    state = random_state_dict()
    del state["numpy"]
    load_random_state_dict(state)
    after = numpy.random.rand(2).tolist()
    load_random_state_dict(state)
    assert numpy.random.rand(2).tolist() != after


@pytest.mark.parametrize("place", range(3))
def test_states_tell_which_library_has_drawn(place: int) -> None:
    states = global_random_states([])
    (torch.rand, random.random, numpy.random.rand)[place](*([1] if place == 0 else []))
    assert [state.has_moved() for state in states] == [one == place for one in range(3)]


def test_states_are_gone_back_to_in_a_block_and_left_after_it() -> None:
    states = global_random_states([])
    numbers = draw()
    torch.rand(1), random.random(), numpy.random.rand()
    after = random_state_dict()
    following = draw()
    load_random_state_dict(after)
    for state in states:
        state.restore()
    assert draw() == numbers
    load_random_state_dict(after)
    with states[0].restored(), states[1].restored(), states[2].restored():
        assert draw() == numbers
    assert draw() == following


def test_numpy_counts_only_where_it_is_asked_for() -> None:
    assert not any(isinstance(state, NumpyRandom) for state in global_random_states([], with_numpy=False))


def test_what_a_block_draws_from_torch_is_as_if_not_drawn() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch_random_kept(torch.device("cpu")):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_a_seed_is_for_all_three_and_tells_who_drew() -> None:
    has_drawn = seeded(7)
    assert not has_drawn()
    numbers = draw()
    assert has_drawn()
    seeded(7)
    assert draw() == numbers
