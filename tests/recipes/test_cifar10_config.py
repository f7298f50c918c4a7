"""The recipe's YAML files: all are read by LightningCLI, and say what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import lightning_memtrain.recipes.cifar10_wrn28_2 as recipe
from lightning_memtrain import MemoryProfiler, SparseTraining
from lightning_memtrain.recipes.cifar10_wrn28_2.data import CIFAR10DataModule, DigitsDataModule
from lightning_memtrain.recipes.cifar10_wrn28_2.module import WideResNetClassifier
from lightning_memtrain.sparsity import DSR

# Lightning calls a method of jsonargparse that has another name by now.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

FOLDER = Path(recipe.__file__).parent
CONFIG = FOLDER / "config.yaml"
VARIANTS = {path.stem: path for path in sorted((FOLDER / "variants").glob("*.yaml"))}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train"])  # LightningCLI warns of arguments beside those it is given


def parse(*args: str, folder: Path) -> LightningCLI:
    quiet = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--trainer.default_root_dir={folder}"]
    return LightningCLI(
        args=[f"--config={CONFIG}", *args, *quiet],
        run=False,
        seed_everything_default=False,
        save_config_callback=None,
    )


def test_the_variants_are_those_that_are_tested_here() -> None:
    assert sorted(VARIANTS) == [
        "all",
        "bf16",
        "checkpointed",
        "demo",
        "fit",
        "fp16",
        "group",
        "int8",
        "microbatched",
        "microbatched+checkpointed",
        "smoke",
        "sparse",
    ]


def test_the_recipe_is_the_papers(tmp_path: Path) -> None:
    cli = parse(folder=tmp_path)
    assert type(cli.model) is WideResNetClassifier
    assert type(cli.datamodule) is CIFAR10DataModule
    assert sum(parameter.numel() for parameter in cli.model.parameters()) == 1_467_610
    hparams = cli.model.hparams
    assert (hparams.lr, hparams.momentum, hparams.weight_decay, hparams.lr_decay) == (0.1, 0.9, 5e-4, 0.2)
    assert [fraction * cli.trainer.max_epochs for fraction in hparams.lr_milestones] == [60, 120, 160]
    assert cli.datamodule.batch_size == 100
    assert any(isinstance(callback, MemoryProfiler) for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_a_variant_is_read_on_top_of_the_recipe(name: str, tmp_path: Path) -> None:
    cli = parse(f"--config={VARIANTS[name]}", "--trainer.max_epochs=3", folder=tmp_path)
    own_data = "data" in yaml.safe_load(VARIANTS[name].read_text())
    assert type(cli.datamodule) is (DigitsDataModule if own_data else CIFAR10DataModule)
    assert cli.model.hparams.lr_milestones == [0.3, 0.6, 0.8]
    assert any(isinstance(callback, MemoryProfiler) for callback in cli.trainer.callbacks)
    assert cli.trainer.max_epochs == 3


def test_the_sparse_variant_is_that_of_the_authors(tmp_path: Path) -> None:
    cli = parse(f"--config={VARIANTS['sparse']}", folder=tmp_path)
    (sparse,) = [one for one in cli.trainer.callbacks if isinstance(one, SparseTraining)]
    layers = sparse.select.layers(cli.model)
    assert len(layers) == 24
    assert {tuple(layer.kernel_size) for layer in layers.values()} == {(3, 3)}
    assert sum(layer.weight.numel() for layer in layers.values()) == 1_451_520
    assert sparse.method == DSR(0.8, reallocate=20_000, threshold=1e-3)


def has_arrived(written: Any, arrived: Any) -> bool:
    """Whether ``arrived`` is ``written``, with defaults added and short class names completed."""
    if isinstance(written, dict):
        # What extends a list is at its end.
        own = {key: value for key, value in written.items() if not str(key).endswith("+")}
        added = {key[:-1]: value for key, value in written.items() if str(key).endswith("+")}
        return all(key in arrived and has_arrived(value, arrived[key]) for key, value in own.items()) and all(
            has_arrived(value, arrived[key][-len(value) :]) for key, value in added.items()
        )
    if isinstance(written, list):
        return len(written) == len(arrived) and all(map(has_arrived, written, arrived))
    if isinstance(written, str):
        return bool(arrived == written or arrived.endswith(f".{written}"))
    return bool(arrived == written)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_value_of_a_variant_arrives(name: str, tmp_path: Path) -> None:
    written = yaml.safe_load(VARIANTS[name].read_text())
    config = parse(f"--config={VARIANTS[name]}", folder=tmp_path).config.as_dict()
    assert has_arrived(written, config)
    written["trainer"]["max_steps"] = config["trainer"]["max_steps"] + 1
    assert not has_arrived(written, config), "the comparison sees no difference"


def test_the_smoke_variant_trains_two_steps(tmp_path: Path) -> None:
    cli = parse(
        f"--config={VARIANTS['smoke']}", "--trainer.callbacks=[]", "--model.depth=10", folder=tmp_path
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    cli.trainer.save_checkpoint(tmp_path / "model.ckpt")
    checkpoint = torch.load(tmp_path / "model.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["depth"] == 10
    assert set(cli.trainer.callback_metrics) == {"train/loss", "train/accuracy", "val/loss", "val/accuracy"}
