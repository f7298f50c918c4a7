"""Running something around `training_step`, and taking it back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_memtrain.core import wrap_training_step
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
    undo_inner()  # is not the outermost: nothing that others put there may go
    step_of(model)
    assert notes == ["outer", "inner"] * 2
    undo_outer()
    undo_inner()
    assert "training_step" not in model.__dict__


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
