"""With `stacks=True` the report says which line of the user's code has made what is live at the peak."""

from __future__ import annotations

import inspect
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_memtrain as mt
from lightning_memtrain.core import CodeSite
from lightning_memtrain.report.outputs.html import render_html
from lightning_memtrain.report.stacks.user_frames import line_of_user
from tests.helpers.browser import visit
from tests.helpers.trainers import LIGHTNING_WARNINGS, fit

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)

    def forward(self, batch):
        wide = self.first(batch)  # site: first
        wide = wide.relu()
        return checkpoint(self.inner, wide * 2, use_reentrant=False)  # site: doubled

    def inner(self, wide):
        return self.last(wide.sigmoid() * 3)  # site: last

    def training_step(self, batch):
        output = self(batch)
        self.cache = torch.zeros(1000)  # site: cache
        return output.square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(64, 8), batch_size=32)


def line_of(mark: str) -> int:
    source = inspect.getsource(sys.modules[__name__]).splitlines()
    return next(number for number, line in enumerate(source, 1) if line.endswith(f"# site: {mark}"))


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> mt.MemoryReport:
    folder = tmp_path_factory.mktemp("stacks")
    profiler = mt.MemoryProfiler(every_n_steps=1, stacks=True, report_dir=folder)
    fit(Net(), profiler, folder, max_epochs=2)
    assert profiler.report is not None
    assert mt.MemoryReport.load(folder / "memory_report.json") == profiler.report
    return profiler.report


def of_line(report: mt.MemoryReport, mark: str) -> list[CodeSite]:
    sites = report.stages["fit"].sites
    return [site for site in sites if (site.file, site.line) == (__file__, line_of(mark))]


def test_all_sites_together_are_the_ledgers_peak(profiled: mt.MemoryReport) -> None:
    fitted = profiled.stages["fit"]
    assert sum(site.num_bytes for site in fitted.sites) == fitted.ledger_peak_bytes
    assert [site.num_bytes for site in fitted.sites] == sorted(
        (s.num_bytes for s in fitted.sites), reverse=True
    )


def test_activations_gradients_and_state_have_the_line_that_made_them(profiled: mt.MemoryReport) -> None:
    (kept,) = (site for site in of_line(profiled, "doubled") if site.category == "activations")
    assert (kept.num_bytes, kept.num_storages, kept.function) == (32 * 64 * 4, 1, "forward")
    # The peak is in the backward of the last layer, whose input was recomputed in it.
    assert {
        (site.category, site.module, site.num_bytes, site.in_backward) for site in of_line(profiled, "last")
    } == {
        ("activations", "last", 2 * 32 * 64 * 4, False),
        ("temporary", "last", 32 * 64 * 4, True),
        ("gradients", "last", 64 * 4 * 4, True),
    }
    assert {site.category for site in of_line(profiled, "cache")} <= {"temporary", "held"}
    sites = profiled.stages["fit"].sites
    state = [site for site in sites if site.category == "optimizer_state"]
    assert {site.file for site in state} == {str(Path(inspect.getfile(fit)))}  # which has called the trainer
    before = [site for site in sites if site.category in ("parameters", "inputs")]
    assert {(site.file, site.was_there) for site in before} == {("", True)}
    assert sum(site.num_bytes for site in before if site.category == "parameters") == 4 * (
        8 * 64 + 64 + 64 * 4 + 4
    )


def test_page_and_table_name_the_lines(profiled: mt.MemoryReport, tmp_path: Path, capsys) -> None:
    mt.report.print_table(profiled)
    printed = capsys.readouterr().out
    assert f"test_profiler_stacks.py:{line_of('doubled')}" in printed
    seen = visit(render_html(profiled), tmp_path, 'return texts("#sites tbody tr td:first-child");').answer
    assert f"{__file__}:{line_of('doubled')} forward" in seen


def test_without_it_nothing_is_followed(tmp_path: Path) -> None:
    profiler = mt.MemoryProfiler(every_n_steps=1)
    fit(Net(), profiler, tmp_path)
    assert profiler.report is not None
    assert profiler.report.stages["fit"].sites == ()


def test_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    trained = []
    for stacks in (False, True):
        torch.manual_seed(0)
        model = Net()
        fit(model, mt.MemoryProfiler(every_n_steps=1, stacks=stacks), tmp_path, max_epochs=2)
        trained.append([*model.parameters()])
    assert all(map(torch.equal, *trained))


def test_an_installed_project_is_the_users_code_within_lightning() -> None:
    """Its frames lie among those of other packages, and only a short script outside."""
    packages = Path(sysconfig.get_path("purelib"))

    def function(file: Path | str, call: Callable[[], object]) -> Callable[[], object]:
        made: dict[str, object] = {"call": call}
        exec(compile("def function():\n    return call()", str(file), "exec"), made)
        return made["function"]

    def line(*files: Path | str) -> tuple[str, int] | None:
        """From the innermost file to the outermost one."""
        call: Callable[[], object] = lambda: line_of_user(sys._getframe(1))  # noqa: E731
        for file in files:
            call = function(file, call)
        found = call()
        return None if found is None else found[:2]

    torch_file, project = packages / "torch" / "nn.py", packages / "project" / "net.py"
    lightning_file, engine = packages / "lightning" / "loop.py", packages / "torch" / "autograd" / "graph.py"
    assert line(torch_file, project, lightning_file, "/home/me/train.py") == (str(project), 2)
    assert line(torch_file, project, "/home/me/net.py", lightning_file, "train.py") == ("/home/me/net.py", 2)
    assert line(torch_file, lightning_file, project, "/home/me/train.py") == ("/home/me/train.py", 2)
    assert line(torch_file, packages / "lightning_memtrain_like" / "x.py", lightning_file) is not None
    assert line(engine, lightning_file, "/home/me/train.py") == ("/home/me/train.py", 2)
    assert line("<string>", "<ipython-input-3-abc>") == ("<ipython-input-3-abc>", 2)
