"""Every class of the library may be named without its module, on the command line and in files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.run import configurations
from lightning_memtrain.cli.run_folder import RunFolder
from lightning_memtrain.cli.training.lightning_cli import RecipeCLI
from tests.helpers.cli import IGNORED

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]


def made(folder: Path, *arguments: str) -> RecipeCLI:
    configs = configurations(recipes.find("cifar10_wrn28_2"), ["smoke"])
    return RecipeCLI(RunFolder(folder), [*(f"--config={config}" for config in configs), *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        ["Microbatching", "--trainer.callbacks.microbatch_size=4"],
        ["ActivationCheckpointing"],
        ["FitMemory", "--trainer.callbacks.limit=1GiB"],
        ["OptimizerInBackward"],
        ["CompressedActivations"],
        ["OffloadActivations"],
        ["CenteredWeights"],
        [
            "SparseTraining",
            '--trainer.callbacks.method={"class_path": "RigL", "init_args": {"sparsity": 0.9}}',
        ],
    ],
)
def test_callbacks(arguments: list[str], tmp_path: Path) -> None:
    name, *options = arguments
    cli = made(tmp_path, f"--trainer.callbacks+={name}", *options)
    assert name in [type(callback).__name__ for callback in cli.trainer.callbacks]


def test_what_is_no_callback_and_what_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="`RigL` cannot be used here: another kind of object is expected"):
        made(tmp_path, "--trainer.callbacks+=RigL")
    with pytest.raises(
        CommandError, match=r"there is no class `Microbatchin`\. Did you mean `Microbatching`"
    ):
        made(tmp_path, "--trainer.callbacks+=Microbatchin")
