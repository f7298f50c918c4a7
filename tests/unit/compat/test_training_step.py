"""Running something around `training_step`, and taking it back."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memtrain.compat import wrap_training_step
from tests.helpers.boring_models import BoringModel


def around_noting(notes: list[str], note: str) -> Any:
    def around(step: Any, args: Any, kwargs: Any) -> Any:
        notes.append(note)
        return step(*args, **kwargs)

    return around


def step_of(model: BoringModel) -> None:
    model.log = lambda *_, **__: None  # type: ignore[method-assign]
    model.training_step(next(iter(model.train_dataloader())), batch_idx=0)


def test_wrappers_nest_and_lightning_sees_through_them() -> None:
    model, notes = BoringModel(), []
    undo_inner = wrap_training_step(model, around_noting(notes, "inner"))
    undo_outer = wrap_training_step(model, around_noting(notes, "outer"))
    assert is_overridden("training_step", model)
    step_of(model)
    assert notes == ["outer", "inner"]
    undo_outer()
    step_of(model)
    assert notes == ["outer", "inner", "inner"]
    undo_inner()
    assert "training_step" not in model.__dict__


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_wrappers_are_taken_back_in_any_order(order: tuple[int, ...], own: bool) -> None:
    model, notes = BoringModel(), []
    if own:
        step = model.training_step
        model.training_step = lambda batch, batch_idx: step(batch, batch_idx)  # type: ignore[method-assign]
    before = model.__dict__.get("training_step")
    undos = [wrap_training_step(model, around_noting(notes, str(number))) for number in range(3)]
    left = [2, 1, 0]
    for number in order:
        undos[number]()
        left.remove(number)
        notes.clear()
        step_of(model)
        assert notes == [str(one) for one in left]
    assert model.__dict__.get("training_step") is before
    for undo in undos:  # once more, which does nothing
        undo()
    assert model.__dict__.get("training_step") is before


def test_a_wrapper_inside_of_somebody_elses_does_nothing_once_it_is_taken_back() -> None:
    model, notes = BoringModel(), []
    undo = wrap_training_step(model, around_noting(notes, "ours"))
    step = model.training_step
    model.training_step = theirs = lambda *args, **kwargs: step(*args, **kwargs)  # type: ignore[method-assign]
    undo()
    step_of(model)
    assert notes == []
    assert model.training_step is theirs


def test_copies_run_their_own_step_without_what_is_around() -> None:
    model, notes = BoringModel(), []
    wrap_training_step(model, around_noting(notes, "around"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.training_step.__self__ is other
        step_of(other)
    assert notes == []


def test_a_step_of_the_instances_own_comes_back() -> None:
    model = BoringModel()
    model.training_step = own = lambda batch, batch_idx: None  # type: ignore[method-assign]
    wrap_training_step(model, around_noting([], ""))()
    assert model.training_step is own
