"""`memtrain predict` prints what a run needs, and says by its exit code whether it fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_memtrain.cli import main, recipes
from lightning_memtrain.cli.recipes import Recipe

MODEL = """
import lightning.pytorch as pl
import torch


class Net(pl.LightningModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.layer, self.batch_size = torch.nn.Linear(64, 64), batch_size

    def training_step(self, batch, index):
        return self.layer(batch[0]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.ones(4 * self.batch_size, 64))
        return torch.utils.data.DataLoader(data, batch_size=self.batch_size)


class Fixed(Net):
    def __init__(self):
        super().__init__()


class Big(Net):
    def __init__(self):
        super().__init__()
        self.big = torch.nn.Linear(100_000, 100_000)


class NoData(Net):
    def train_dataloader(self):
        raise FileNotFoundError("no images in `pictures`: pass `data_dir`.")


class NoOptimizer(Net):
    def configure_optimizers(self):
        return None


class Bare(pl.LightningModule):
    training_step, configure_optimizers = Net.training_step, Net.configure_optimizers

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 64)


class Wide(Net):
    def __init__(self, batch_size: int = 4):
        super().__init__(batch_size)
        self.layer = torch.nn.Linear(64, 10_000)

    def train_dataloader(self):
        row = torch.ones(1, 64).expand(4 * self.batch_size, 64)
        return torch.utils.data.DataLoader([(row[: self.batch_size],)] * 4, batch_size=None)


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self):
        return Net(self.batch_size).train_dataloader()
"""

CONFIG = """
seed_everything: 1
model: {class_path: wanted.net.Net}
data: {class_path: wanted.net.Data}
trainer: {max_steps: 3, accelerator: cpu, logger: false}
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A file with models, as it is named on the command line."""
    (tmp_path / "net_of_test.py").write_text(MODEL)
    return str(tmp_path / "net_of_test.py")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe `wanted` in a folder, with a variant `double` in float64."""
    folder = tmp_path / "wanted"
    (folder / "variants").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "net.py").write_text(MODEL)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "variants" / "double.yaml").write_text("trainer: {precision: 64-true}\n")
    monkeypatch.setattr(recipes, "installed", lambda: {"other": Recipe("other", folder)})
    monkeypatch.chdir(tmp_path)
    return folder


def predicted(capsys: pytest.CaptureFixture[str], *args: str, exit_code: int = 0) -> dict[str, object]:
    assert main(["predict", *args, "--json"]) == exit_code
    read: dict[str, object] = json.loads(capsys.readouterr().out)
    return read


def failure(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    assert main(["predict", *args]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1].removeprefix("memtrain: error: ")


def test_a_class_of_a_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    small = predicted(capsys, f"{model}:Net", "--device", "T4")
    assert (small["model"], small["num_parameters"], small["fits"]) == ("Net", 64 * 65, True)
    large = predicted(capsys, f"{model}:Net", "--device", "T4", "--batch-size", "1000")
    difference = large["allocated_bytes"] - small["allocated_bytes"]  # type: ignore[operator]
    assert difference >= 2 * 996 * 64 * 4  # batch and output


def test_the_exit_code_says_that_it_does_not_fit(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", f"{model}:Big", "--device", "T4"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("Big on T4 16GB: does not fit\n")
    assert "missing" in out


def test_one_of_several_devices(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    alone = predicted(capsys, f"{model}:Net", "--device", "T4")
    ranks = predicted(capsys, f"{model}:Net", "--device", "T4", "--devices", "8", "--strategy", "ddp")
    assert (alone["world_size"], alone["strategy"]) == (1, None)
    assert (ranks["world_size"], ranks["strategy"]) == (8, "ddp")
    assert ranks["breakdown"]["maxima"]["buckets"] == 4 * 64 * 65  # type: ignore[index]
    assert failure(capsys, f"{model}:Net", "--device", "T4", "--devices", "8") == (
        "`--devices 8` needs `--strategy`: add `--strategy ddp` or `fsdp2`."
    )
    assert failure(capsys, f"{model}:Net", "--device", "T4", "--strategy", "ddp") == (
        "`--strategy ddp` needs the number of devices: add `--devices 8`."
    )
    several = ("--devices", "8", "--strategy")
    assert "FSDP1" in failure(capsys, f"{model}:Net", "--device", "T4", *several, "fsdp")
    assert "must be at least 1" in failure(
        capsys, f"{model}:Net", "--device", "T4", "--devices", "0", "--strategy", "ddp"
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI under jsonargparse 4.4x
def test_a_recipe_with_a_variant(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = predicted(capsys, "./wanted", "--device", "T4")
    double = predicted(capsys, "./wanted", "--device", "T4", "--variant", "double", "--batch-size", "8")
    parameters = [one["breakdown"]["at_peak"]["parameters"] for one in (plain, double)]  # type: ignore[index]
    assert parameters == [64 * 65 * 4, 64 * 65 * 8]
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["wanted"]  # no run folder


def test_what_is_wrong_is_said_in_a_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failure(capsys, "--device", "T4") == (
        "`memtrain predict` needs a recipe, a configuration or file.py:Class before its options."
    )
    assert "must have a LightningModule of the name `Nett`" in failure(capsys, f"{model}:Nett")
    assert "Did you mean `Net`?" in failure(capsys, f"{model}:Nett")
    assert failure(capsys, "nowhere.py:Net") == "`nowhere.py` is no file; name one as in `file.py:Class`."
    assert "but got 'T5'" in failure(capsys, f"{model}:Net", "--device", "T5")
    assert "--batch-size must be at least 1" in failure(capsys, f"{model}:Net", "--batch-size", "0")
    assert "`Fixed` of" in failure(capsys, f"{model}:Fixed", "--device", "T4", "--batch-size", "3")
    assert failure(capsys, f"{model}:Net", "--variant", "double") == (
        "`--variant` is for recipes, but a class of a file was named; leave it out."
    )
    said = failure(capsys, f"{model}:NoData", "--device", "T4")
    assert said == "no images in `pictures`: pass `data_dir`."
    assert "unknown recipe `wantde`" in failure(capsys, "wantde", "--device", "T4")


CONFIG_OF_MINE = """
model: {class_path: net_of_test.%s}
%s
trainer: {max_steps: 3, accelerator: cpu, logger: false}
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI under jsonargparse 4.4x
def test_a_configuration_of_own_classes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "mine.yaml"
    file.write_text(CONFIG_OF_MINE % ("Net", "data: {class_path: net_of_test.Data}"))
    read = predicted(capsys, str(file), "--device", "T4", "--batch-size", "8")
    assert (read["model"], read["fits"]) == ("Net", True)
    file.write_text(CONFIG_OF_MINE % ("Bare", ""))
    assert "needs one of the two for a model without `train_dataloader`" in failure(
        capsys, str(file), "--device", "T4"
    )
    assert (
        failure(capsys, "nowhere.yaml") == "`nowhere.yaml` is no file; name a configuration of LightningCLI."
    )
    assert "`--variant` is for recipes" in failure(capsys, str(file), "--variant", "double")


def test_a_model_without_an_optimizer_is_refused(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = failure(capsys, f"{model}:NoOptimizer", "--device", "T4")
    assert "needs a model with an optimizer, but `NoOptimizer.configure_optimizers` returns none" in said


def test_a_batch_that_is_too_large_says_what_is_missing(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", f"{model}:Wide", "--device", "T4", "--batch-size", "400000"]) == 3
    assert "missing" in capsys.readouterr().out
