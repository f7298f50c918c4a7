"""`memtrain plan` prints and writes a plan, and `memtrain run --plan` follows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.cli import main
from lightning_memtrain.planning import Plan
from tests.helpers.cli import IGNORED
from tests.helpers.stand_in_search import StandInSearch, stand_in

__all__ = ["stand_in"]

pytestmark = [pytest.mark.filterwarnings(one) for one in IGNORED]

NET = """
import lightning.pytorch as pl
import torch


class Net(pl.LightningModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.layer, self.batch_size = torch.nn.Linear(16, 3), batch_size

    def training_step(self, batch, index):
        return self.layer(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(16, 16), batch_size=self.batch_size)
"""

CONFIG = """
seed_everything: 1
model: {class_path: planned.net.Net}
trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_checkpointing: false,
  enable_progress_bar: false, enable_model_summary: false}
"""

SPLIT = """
trainer:
  callbacks+:
    - {class_path: lightning_memtrain.Microbatching, init_args: {microbatch_size: 2}}
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "planned"
    (folder / "variants").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "net.py").write_text(NET)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "variants" / "split.yaml").write_text(SPLIT)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.usefixtures("stand_in")
def test_a_plan_is_printed_written_and_followed(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--limit", "7KiB"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(
        "Net on cpu, batches of 8, limit 7.00 KiB: fits, a step takes 1.02 times as long\n"
    )
    assert said.err.endswith("Plan: plan.yaml; page: plan.html\n")
    assert "<svg" in Path("plan.html").read_text()
    plan = Plan.load("plan.yaml")
    assert plan.limit_bytes == 7 * 1024
    assert main(["run", str(recipe), "--plan", "plan.yaml", "--run-dir", "run"]) == 0
    kept = Path("run/config.yaml").read_text()
    assert "lightning_memtrain.Microbatching" in kept
    assert "microbatch_size: 4" in kept


@pytest.mark.usefixtures("stand_in")
def test_a_run_that_is_not_the_planned_one_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", str(recipe), "--limit", "7KiB"])
    (recipe / "net.py").write_text(NET.replace("Linear(16, 3)", "Linear(16, 4)"))
    assert main(["run", str(recipe), "--plan", "plan.yaml", "--run-dir", "run"]) == 2
    assert (
        "`Plan` was made for another run: parameter `layer.weight` is float32 [4, 16]"
        in capsys.readouterr().err
    )


@pytest.mark.usefixtures("stand_in")
def test_a_plan_and_a_variant_with_one_technique_are_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["plan", str(recipe), "--limit", "7KiB"])
    assert main(["run", str(recipe), "--variant", "split", "--plan", "plan.yaml"]) == 2
    assert "variant `split` and the plan both set `Microbatching`" in capsys.readouterr().err


@pytest.mark.usefixtures("stand_in")
def test_what_does_not_fit_has_exit_code_3_and_no_plan(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", f"{recipe / 'net.py'}:Net", "--limit", "1KiB"]) == 3
    assert "It needs at least 2.16 KiB" in capsys.readouterr().out
    assert not Path("plan.yaml").exists()


@pytest.mark.usefixtures("stand_in")
def test_a_class_of_a_file_as_json(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--limit", "7KiB", "--batch-size", "6", "--json", "--output", "mine.yaml"]
    assert main(["plan", f"{recipe / 'net.py'}:Net", *options]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["made_for"]["batch_size"] == 6
    assert Plan.from_dict(data) == Plan.load("mine.yaml")


@pytest.mark.usefixtures("stand_in")
def test_a_configuration_of_lightning_cli(recipe: Path) -> None:
    Path("own.yaml").write_text(CONFIG)
    assert main(["plan", "own.yaml", "--limit", "1GiB", "--trainer.accumulate_grad_batches=2"]) == 0
    assert Plan.load("plan.yaml").plain == Plan.load("plan.yaml").chosen


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "`memtrain plan` needs a recipe, a configuration or file.py:Class before its options"),
        (["nowhere.yaml", "--limit", "1GiB"], 1, "`nowhere.yaml` is no file"),
        (["planned/net.py:Net", "--limit", "1GiB", "--allow", "bf-16"], 1, "Did you mean 'bf16'?"),
        (["planned/net.py:Net", "--limit", "0.9"], 1, "must be bytes on the CPU"),
        (["planned/net.py:Net"], 1, "`plan(limit, device)` needs one of the two"),
        (["planned/net.py:Net", "--limit", "9000 PB"], 1, "`plan(limit)` must be a number of bytes"),
        (
            ["planned/net.py:Net", "--limit", "1GiB", "--batch-size", "0"],
            2,
            "--batch-size must be at least 1",
        ),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_mistakes(
    arguments: list[str], code: int, said: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) == code
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_plan_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(recipe), "--plan", "nowhere.yaml"]) == 1
    assert "Expected a plan at 'nowhere.yaml'" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI under jsonargparse 4.4x
def test_lightning_cli_makes_it_by_its_class_path(
    tmp_path: Path, stand_in: StandInSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    (tmp_path / "config.yaml").write_text(
        f"""
seed_everything: 1
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  default_root_dir: {tmp_path}
  callbacks:
    - class_path: lightning_memtrain.FitMemory
      init_args:
        limit: 20KiB
        allow: [batchnorm-statistics]
"""
    )

    class Boring(BoringModel):
        def train_dataloader(self) -> DataLoader[torch.Tensor]:
            return DataLoader(torch.ones(16, 32), batch_size=8)

        validation_step = None

    cli = LightningCLI(
        Boring, args=["fit", f"--config={tmp_path / 'config.yaml'}"], save_config_callback=None
    )
    callback = next(one for one in cli.trainer.callbacks if isinstance(one, mt.FitMemory))
    assert (callback.limit, callback.allow) == ("20KiB", ("batchnorm-statistics",))
    assert callback.plan is not None
    assert callback.plan.chosen is not None
    assert str(callback.plan.chosen) == "Microbatching(microbatch_size=4)"
    assert len(stand_in.calls) == 1
