"""The callback: when it packs, what it leaves behind, and what it says."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback

from lightning_memtrain import CompressedActivations
from lightning_memtrain.core import NoEffectWarning, Technique
from lightning_memtrain.core.technique import is_technique
from lightning_memtrain.precision import ActivationCodec
from tests.helpers.boring_models import BoringModel, ManualModel
from tests.helpers.trainers import assert_torch_is_as_found, quiet_trainer

TINY = ActivationCodec(bits=8, group_size=8, min_numel=8, compiled=False)


class Watcher(Callback):
    """Notes which hooks are in force in forward, by stage, and copies the model amid the run."""

    def __init__(self) -> None:
        self.hooked: dict[str, bool] = {}
        self.copies: list[Any] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        loss = pl_module.loss

        def watched(batch: torch.Tensor) -> torch.Tensor:
            stage = trainer.state.stage.value
            self.hooked[stage] = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            return loss(batch)

        pl_module.loss = watched

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.copies:
            own = pl_module.__dict__.pop("loss")
            self.copies = [
                copy.deepcopy(pl_module),
                pickle.loads(pickle.dumps(pl_module.training_step)).__self__,
            ]
            pl_module.loss = own


def test_it_packs_in_training_and_nowhere_else(tmp_path: Path) -> None:
    watcher, callback = Watcher(), CompressedActivations(TINY)
    model = BoringModel()
    quiet_trainer(tmp_path, callback, watcher).fit(model)
    assert watcher.hooked == {"sanity_check": False, "train": True, "validate": False}
    assert_torch_is_as_found(model)
    assert "training_step" not in model.__dict__


def test_copies_of_a_model_in_training_run_their_own_step(tmp_path: Path) -> None:
    watcher = Watcher()
    model = BoringModel()
    quiet_trainer(tmp_path, CompressedActivations(TINY), watcher).fit(model)
    for other in watcher.copies:
        assert other is not model
        step = other.training_step
        assert step.__self__ is other
        assert step.__func__ is BoringModel.training_step


def test_an_error_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Failing(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ValueError("mine")

    model = Failing()
    with pytest.raises(ValueError, match="mine"):
        quiet_trainer(tmp_path, CompressedActivations(TINY)).fit(model)
    assert "training_step" not in model.__dict__
    assert_torch_is_as_found(model)


def test_a_step_of_the_instances_own_comes_back(tmp_path: Path) -> None:
    model = BoringModel()
    step = model.training_step
    model.training_step = own = lambda batch, batch_idx: step(batch, batch_idx)  # type: ignore[method-assign]
    quiet_trainer(tmp_path, CompressedActivations(TINY)).fit(model)
    assert model.training_step is own


def test_manual_optimization(tmp_path: Path) -> None:
    callback = CompressedActivations(TINY)
    quiet_trainer(tmp_path, callback, limit_val_batches=0).fit(ManualModel(num_batches=2))
    assert callback.technique_record().events


def test_what_it_says_of_itself(tmp_path: Path) -> None:
    callback = CompressedActivations(TINY)
    assert is_technique(callback)
    assert isinstance(callback, Technique)
    assert callback.exact is False
    assert callback.technique_record().events == ()
    quiet_trainer(tmp_path, callback).fit(BoringModel(num_batches=2))
    record = callback.technique_record()
    assert str(record) == "CompressedActivations(bits=8, group_size=8, min_numel=8, stochastic=False)"
    # ReLU's result of 4 rows of 8 numbers; the batch is kept by the trainer in any case, the rest is small.
    assert record.events == ("kept 1 tensors of 128 B in 56 B (largest training step)",)
    seeded = CompressedActivations(ActivationCodec(bits=4, stochastic=True, seed=3))
    assert seeded.technique_record().settings == {
        "bits": 4,
        "group_size": 64,
        "min_numel": 4096,
        "stochastic": True,
        "seed": 3,
    }


def test_a_warning_if_nothing_was_packed(tmp_path: Path) -> None:
    with pytest.warns(
        NoEffectWarning, match=r"packed nothing.*min_numel=4096.*lower `ActivationCodec\(min_numel\)`"
    ):
        quiet_trainer(tmp_path, CompressedActivations()).fit(BoringModel(num_batches=2))


def test_the_warning_is_true_if_only_the_batch_is_saved(tmp_path: Path) -> None:
    class OneLayer(BoringModel):
        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return self.head(batch)

        def loss(self, batch: torch.Tensor) -> torch.Tensor:
            return self(batch).sum()

    with pytest.warns(NoEffectWarning, match=r"parameter or buffer, a part of the batch, which the trainer"):
        quiet_trainer(tmp_path, CompressedActivations(TINY)).fit(OneLayer(num_batches=2))


def test_what_is_no_codec_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException,
        match=r"`CompressedActivations\(codec\)` must be an ActivationCodec or None, but got codec=8. Write",
    ):
        CompressedActivations(8)  # type: ignore[arg-type]


def test_twice_is_refused_by_lightning(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `CompressedActivations`"):
        quiet_trainer(tmp_path, CompressedActivations(TINY), CompressedActivations(TINY))


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    codec = ActivationCodec(bits=4, group_size=8, min_numel=8, stochastic=True, compiled=False)

    def run(folder: Path, max_epochs: int, ckpt_path: str | None = None) -> BoringModel:
        torch.manual_seed(0)
        model = BoringModel()
        trainer = quiet_trainer(folder, CompressedActivations(codec), max_epochs=max_epochs)
        trainer.fit(model, ckpt_path=ckpt_path)
        trainer.save_checkpoint(folder / "last.ckpt")
        return model

    whole = run(tmp_path / "whole", 3)
    run(tmp_path / "first", 1)
    resumed = run(tmp_path / "second", 3, str(tmp_path / "first" / "last.ckpt"))
    restarted = torch.load(tmp_path / "first" / "last.ckpt", weights_only=True)["callbacks"]
    assert {"num_packed": 6} in restarted.values()
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
