"""`memtrain profile` trains a few steps of a user's own module and shows where their memory went."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_memtrain.cli import main
from lightning_memtrain.report import MemoryReport
from tests.helpers.cli import IGNORED

pytestmark = [pytest.mark.filterwarnings(warning) for warning in IGNORED]

MODULE = """
import lightning as L
import torch


class Net(L.LightningModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size
        self.layer = torch.nn.Linear(8, 64)

    def training_step(self, batch):
        return self.layer(batch).sin().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(64, 8), batch_size=self.batch_size)
"""


def test_a_module_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    Path("profiled_net.py").write_text(MODULE)
    assert main(["profile", "profiled_net.py:Net", "--steps", "3", "--batch-size", "16"]) == 0
    out = capsys.readouterr().out
    assert "Memory report  Net, 576 parameters" in out
    assert "profiled_net.py:13 training_step" in out
    report = MemoryReport.load(Path("memory/memory_report.json"))
    assert [step.step for step in report.steps] == [0, 1, 2]
    assert report.stages["fit"].at_peak.to_dict()["inputs"] == 16 * 8 * 4
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"profiled_net.py", "memory"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profiled_other.py:Net"], "`profiled_other.py` is no file"),
        (["cifar10_wrn28_2", "--steps", "0"], "--steps must be at least 1, but got 0."),
        ([], "`memtrain profile` needs a recipe, a configuration or file.py:Class"),
        (["no.yaml"], "`no.yaml` is no file; name a configuration of LightningCLI."),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *arguments]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
