"""A name that another library has taken away is said once, with what to install."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_memtrain.compat import lightning_private, private_names, torch_private
from lightning_memtrain.compat.lightning_private import TrainerAttribute
from lightning_memtrain.compat.private_names import MissingNameError, NewerName, PrivateAttribute, PrivateName

OF_LIGHTNING = {"Closure", "ClosureResult"} | set(lightning_private._NAMES)
TRAINER_ATTRIBUTES = {
    name: value for name, value in vars(lightning_private).items() if isinstance(value, TrainerAttribute)
}


def without(monkeypatch: pytest.MonkeyPatch, owner: str, name: str) -> None:
    """Let ``owner`` be something that has all but one name."""
    found = private_names.resolve(owner)

    class Without:
        def __getattr__(self, asked: str) -> Any:
            if asked in (name, "__mro__"):
                raise AttributeError(asked)
            return getattr(found, asked)

    monkeypatch.setattr(private_names, "resolve", lambda path: Without() if path == owner else found)


@pytest.mark.parametrize("alias", sorted(torch_private._NAMES))
def test_a_name_that_torch_lacks_is_refused(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = torch_private._NAMES[alias]
    assert getattr(torch_private, alias) is not None
    if isinstance(entry, NewerName):
        entry = entry._replace(since=(2, 0))
    without(monkeypatch, entry.owner, entry.name)
    monkeypatch.setitem(torch_private._NAMES, alias, entry)
    monkeypatch.delitem(vars(torch_private), alias)
    with pytest.raises(MissingNameError) as error:
        getattr(torch_private, alias)
    tested = private_names.TESTED["torch"]
    assert str(error.value) == (
        f"torch {torch.__version__} has no `{entry.owner.replace(':', '.')}.{entry.name}`, which is "
        f"needed to {entry.used_for}. lightning_memtrain was tested with torch {tested}: "
        "install one of these, or a newer lightning_memtrain."
    )


@pytest.mark.parametrize("alias", sorted(OF_LIGHTNING))
def test_a_name_that_lightning_lacks_is_refused(alias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = lightning_private._NAMES[alias]
    owner = entry.owner.replace(":", ".")
    assert callable(getattr(lightning_private, alias))
    without(monkeypatch, entry.owner, entry.name)
    monkeypatch.delitem(vars(lightning_private), alias)
    with pytest.raises(MissingNameError, match=rf"^lightning {pl.__version__} has no `{owner}\."):
        getattr(lightning_private, alias)


@pytest.mark.parametrize("name", sorted(TRAINER_ATTRIBUTES))
def test_an_attribute_that_a_trainer_lacks_is_refused(name: str) -> None:
    attribute = TRAINER_ATTRIBUTES[name]
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    assert attribute.of(trainer) == getattr(attribute.holder(trainer), attribute.name)

    class Without:
        """All that the trainer has but the attribute."""

        def __init__(self, found: Any, path: list[str]) -> None:
            self._found, self._path = found, path

        def __getattr__(self, asked: str) -> Any:
            if asked != self._path[0]:
                return getattr(self._found, asked)
            if len(self._path) == 1:
                raise AttributeError(asked)
            return Without(getattr(self._found, asked), self._path[1:])

    call = "" if attribute.arguments is None else f"({', '.join(attribute.arguments)})"
    with pytest.raises(MissingNameError) as error:
        attribute.of(Without(trainer, attribute.path.split(".")))
    assert str(error.value).startswith(
        f"lightning {pl.__version__} has no `lightning.pytorch.Trainer.{attribute.path}{call}`, which is "
        f"needed to {attribute.used_for}. lightning_memtrain was tested with lightning 2.4 to 2.6: "
    )


def test_a_method_with_other_arguments_is_refused() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False)
    other = TrainerAttribute("fit_loop._should_accumulate", "tell", ("batch",))
    with pytest.raises(MissingNameError, match=r"_should_accumulate\(batch\)`, which is needed to tell"):
        other.of(trainer)


def test_closures_are_checked_before_training() -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, enable_model_summary=False, max_steps=1)
    lightning_private.check_closures(trainer)
    trainer.fit_loop.epoch_loop.automatic_optimization._make_closure = lambda other: None
    with pytest.raises(MissingNameError, match=r"_make_closure\(kwargs, optimizer, batch_idx\)"):
        lightning_private.check_closures(trainer)
    assert BoringModel()._trainer is None


def test_an_older_release_does_without_a_newer_name() -> None:
    absent = NewerName("torch", "no_such_name", "test", since=(99, 0), without=7)
    assert absent.look_up() == 7
    with pytest.raises(MissingNameError, match=r"has no `torch\.no_such_name`, which is needed to test\."):
        absent._replace(since=(2, 0)).look_up()


@pytest.mark.parametrize("owner", ["torch:NoSuchClass", "torch.no_such_module", "torch:Tensor"])
def test_an_owner_or_attribute_that_is_gone_is_refused(owner: str) -> None:
    for entry in (PrivateName(owner, "_x", "test"), PrivateAttribute(owner, "_x", "test")):
        with pytest.raises(MissingNameError, match=r"\._x`, which is needed to test"):
            entry.look_up()


def test_names_nobody_promised_are_no_attributes() -> None:
    for module in (torch_private, lightning_private):
        with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
            module.no_such_name  # noqa: B018


def test_backward_is_told_from_forward() -> None:
    seen = []
    weight = torch.ones(1, requires_grad=True)
    weight.register_hook(lambda gradient: seen.append(torch_private.is_backward_running()))
    weight.sum().backward()
    assert seen == [True]
    assert not torch_private.is_backward_running()
