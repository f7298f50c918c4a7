"""What every technique promises, for each of them and for every pair."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.core import is_technique
from tests.helpers.trainers import LIGHTNING_WARNINGS, PACKAGES, assert_torch_is_as_found, of, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings(*LIGHTNING_WARNINGS),
    # OffloadActivations on the CPU.
    pytest.mark.filterwarnings("ignore::lightning_memtrain.core.NoEffectWarning"),
]

CASES: dict[str, Callable[[], Any]] = {
    "Microbatching": lambda: mt.Microbatching(num_microbatches=3),
    "ActivationCheckpointing": lambda: mt.ActivationCheckpointing("full"),
    "ActivationCheckpointing, auto": mt.ActivationCheckpointing,
    "OffloadActivations": lambda: mt.checkpointing.experimental.OffloadActivations(min_bytes=1),
    "CompressedActivations": lambda: mt.CompressedActivations(
        mt.precision.ActivationCodec(group_size=8, min_numel=8)
    ),
    "LowPrecision": lambda: mt.LowPrecision("bf16-true"),
    "OptimizerInBackward": lambda: mt.OptimizerInBackward(clip_by_norm="two_pass"),
    "SparseTraining": lambda: mt.SparseTraining(
        mt.sparsity.RigL(0.5, drop=0.5), mt.sparsity.UpdateEvery(2, stop=1.0)
    ),
}
# Adam cannot accumulate without a gradient, and what is accumulated in its state cannot be clipped.
REFUSED = ("Microbatching", "OptimizerInBackward")
INEXACT = {"CompressedActivations", "LowPrecision", "SparseTraining"}
PAIRS = [
    pair
    for pair in itertools.combinations(CASES, 2)
    if pair[0] != pair[1].partition(",")[0] and pair != REFUSED
]
IDENTITIES: dict[str, Callable[[], Any]] = {
    "Microbatching": lambda: mt.Microbatching(num_microbatches=1),
    "ActivationCheckpointing": lambda: mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget("1TiB")),
    "OffloadActivations": lambda: mt.checkpointing.experimental.OffloadActivations(min_bytes="1TiB"),
    "CompressedActivations": lambda: mt.CompressedActivations(mt.precision.ActivationCodec(min_numel=2**40)),
    "LowPrecision": lambda: mt.LowPrecision("32-true", weight_rounding="nearest"),
    "OptimizerInBackward": lambda: mt.OptimizerInBackward(clip_by_norm="two_pass"),
    "SparseTraining": lambda: mt.SparseTraining(mt.sparsity.RigL(0.0)),
}
WIDTH, ROWS, NUM_BATCHES = 8, 14, 5


class Net:
    """Blocks without randomness; a batch can be split and parts of it recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU()) for _ in range(3))
        )
        self.head = nn.Linear(WIDTH, 1)
        self.double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = (self.head(self.blocks(batch)) - batch[:, :1]).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.05)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    def train_dataloader(self) -> DataLoader[Tensor]:
        rows = torch.randn(ROWS * NUM_BATCHES, WIDTH, generator=torch.Generator().manual_seed(3)).double()
        return DataLoader(rows, batch_size=ROWS)


class SmallNet(Net, LightningModule):
    """In the package that most tests use."""


def fit(folder: Path, *techniques: Any, max_epochs: int = 2, **options: Any) -> tuple[SmallNet, Trainer]:
    seed_everything(1, verbose=False)
    package = options.get("package", lightning.pytorch)
    model = options.pop("model", None) or of(Net, package.LightningModule)
    checkpoint = options.pop("ckpt_path", None)
    callbacks = [one for one in techniques if not isinstance(one, mt.LowPrecision)]
    plugins = [one for one in techniques if isinstance(one, mt.LowPrecision)]
    trainer = quiet_trainer(
        folder, *callbacks, plugins=plugins, max_epochs=max_epochs, gradient_clip_val=1.0, **options
    )
    trainer.fit(model, ckpt_path=checkpoint)
    return model, trainer


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(tensor, twin, **(tolerance or {"rtol": 0.0, "atol": 0.0}), msg=name)


def made(names: tuple[str, ...]) -> list[Any]:
    return [CASES[name]() for name in names]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("names", [(name,) for name in CASES] + PAIRS, ids=" + ".join)
def test_an_exact_technique_trains_as_without(names: tuple[str, ...], package: str, tmp_path: Path) -> None:
    name = {"package": PACKAGES[package]}
    plain, plain_trainer = fit(tmp_path, **name)
    techniques = made(names)
    model, trainer = fit(tmp_path, *techniques, **name)
    assert {name for name, one in zip(names, techniques, strict=True) if not one.exact} == INEXACT & {*names}
    if not INEXACT.intersection(names):
        assert_same(plain, model, rtol=1e-10, atol=1e-12)
    assert trainer.global_step == plain_trainer.global_step == 2 * NUM_BATCHES
    assert trainer.logged_metrics.keys() == plain_trainer.logged_metrics.keys()
    for name, value in plain_trainer.logged_metrics.items() if not INEXACT.intersection(names) else ():
        torch.testing.assert_close(trainer.logged_metrics[name], value, rtol=1e-6, atol=0)


def test_the_pair_that_cannot_work_is_refused_before_anything_is_stepped(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"but got microbatches. Choose"):
        fit(tmp_path, *made(REFUSED))


@pytest.mark.parametrize("name", IDENTITIES)
def test_an_identity_setting_changes_nothing_at_all(name: str, tmp_path: Path) -> None:
    plain, plain_trainer = fit(tmp_path)
    model, trainer = fit(tmp_path, IDENTITIES[name]())
    assert_same(plain, model)
    assert trainer.logged_metrics == plain_trainer.logged_metrics


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("names", [(name,) for name in CASES] + PAIRS, ids=" + ".join)
def test_a_run_that_is_resumed_equals_the_uninterrupted_one(
    names: tuple[str, ...], package: str, tmp_path: Path
) -> None:
    name = {"package": PACKAGES[package]}
    whole, _ = fit(tmp_path, *made(names), **name)
    _, first = fit(tmp_path, *made(names), max_epochs=1, **name)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(tmp_path, *made(names), ckpt_path=tmp_path / "half.ckpt", **name)
    assert_same(whole, resumed)


# A model in low precision stays in it, and with it the forward of its normalisations; a sparse one, too.
CHANGES_THE_MODEL = {"LowPrecision", "SparseTraining"}
LEAVES_AS_FOUND = [
    names for names in [(name,) for name in CASES] + PAIRS if not CHANGES_THE_MODEL.intersection(names)
]


@pytest.mark.parametrize("names", LEAVES_AS_FOUND, ids=" + ".join)
def test_a_technique_leaves_model_and_torch_as_it_found_them(names: tuple[str, ...], tmp_path: Path) -> None:
    model, _ = fit(tmp_path, *made(names))
    assert_torch_is_as_found(model)
    untouched, _ = fit(tmp_path)
    for (path, module), twin in zip(model.named_modules(), untouched.modules(), strict=True):
        assert type(module) is type(twin)
        own = module.__dict__.keys() - twin.__dict__.keys()
        assert not own, f"{path} has {own}"


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_a_pair_can_train_the_model_again(names: tuple[str, ...], tmp_path: Path) -> None:
    model, _ = fit(tmp_path, *made(names), max_epochs=1)
    assert "training_step" not in model.__dict__
    fit(tmp_path, *made(names), max_epochs=1, model=model)


@pytest.mark.parametrize("name", CASES)
def test_a_technique_says_what_it_is_before_and_after_the_run(name: str, tmp_path: Path) -> None:
    technique = CASES[name]()
    assert is_technique(technique)
    for _ in range(2):
        record = technique.technique_record()
        assert record.name == name.partition(",")[0]
        assert mt.core.TechniqueRecord.from_dict(json.loads(json.dumps(record.to_dict()))) == record
        fit(tmp_path, technique)


def test_the_cases_are_all_public_techniques() -> None:
    public = {
        name
        for namespace in (mt, mt.checkpointing.experimental)
        for name in namespace.__all__
        if isinstance(getattr(namespace, name), type)
        and callable(getattr(getattr(namespace, name), "technique_record", None))
        and not getattr(getattr(namespace, name), "plans_memory", False)  # it applies the others
    }
    assert public == {name.partition(",")[0] for name in CASES} == IDENTITIES.keys()


@pytest.mark.skipif(len(PACKAGES) < 2, reason="needs pytorch_lightning")
@pytest.mark.parametrize("names", [(name,) for name in CASES if "auto" not in name], ids=" + ".join)
def test_a_mix_of_both_packages_is_refused_in_one_sentence(names: tuple[str, ...], tmp_path: Path) -> None:
    timer = PACKAGES["pytorch_lightning"].callbacks.Timer()
    expected = (
        f"`{names[0]}` needs a run whose parts are all of one package, but got a Trainer of `lightning` with "
        "Timer of `pytorch_lightning`. Import both from the same one."
    )
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, timer, *made(names))
    assert str(caught.value) == expected
