"""`memtrain run`, `report` and `demo` on a tiny network, as a user calls them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
import webbrowser
from pathlib import Path

import pytest
import torch

from lightning_memtrain.cli import demo, main
from lightning_memtrain.core import NoEffectWarning
from tests.helpers.cli import IGNORED, TINY, memtrain, memtrain_forked, python_forked

pytestmark = pytest.mark.filterwarnings(*IGNORED)

TWO_STEPS = (*TINY, "--trainer.max_steps=2")


def error_line(capfd) -> str:
    """The one line that the command wrote for its failure."""
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("memtrain: ")]
    return line.removeprefix("memtrain: error: ")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two steps with the recipe's own callbacks."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    argv = list(sys.argv)
    assert main(["run", *TWO_STEPS, f"--run-dir={folder}"]) == 0
    assert sys.argv == argv  # processes of a distributed run are started with it
    return folder


def test_a_run_folder_holds_everything(finished):
    assert {path.name for path in finished.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "memory",
        "metrics.csv",
        "run.json",
    }
    assert {path.name for path in (finished / "memory").iterdir() if path.is_file()} == {
        "memory_report.json",
        "memory_report.html",
    }
    (checkpoint,) = (finished / "checkpoints").iterdir()
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2
    with (finished / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} == {"0", "1"}
    assert {"train/loss", "memory/peak_mib"} <= rows[0].keys()


def test_the_saved_configuration_is_a_recipe(finished, tmp_path):
    folder = tmp_path / "run"
    assert main(["run", str(finished), f"--run-dir={folder}"]) == 0
    saved = [path.read_text() for path in (finished / "config.yaml", folder / "config.yaml")]
    assert saved[0] == saved[1]
    weights = [
        torch.load(next(p.glob("checkpoints/*")), weights_only=True)["state_dict"] for p in (finished, folder)
    ]
    assert all(torch.equal(one, other) for one, other in zip(*map(dict.values, weights), strict=True))


def test_default_folder_and_values_after_a_space(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    options = [option for option in TINY if "max_steps" not in option]
    assert main(["run", *options, "--trainer.max_steps", "1", "--trainer.callbacks", "null"]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("cifar10_wrn28_2-smoke-2")
    assert capfd.readouterr().out.splitlines()[-1] == f"Run folder: {folder}"


@pytest.mark.parametrize("path", ["", "memory", "memory/memory_report.json"])
def test_report_prints_the_table_again(finished, capsys, path):
    assert main(["report", str(finished / path)]) == 0
    out = capsys.readouterr().out
    assert "WideResNetClassifier" in out
    assert "activations" in out


def test_report_opens_the_page(finished, capsys, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    page = finished / "memory" / "memory_report.html"
    assert main(["report", str(finished), "--open"]) == 0
    assert opened == [page.as_uri()]
    assert capsys.readouterr().out.splitlines()[-1] == str(page)


def test_report_makes_the_page_if_it_is_gone(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(webbrowser, "open", lambda uri: None)
    copy = tmp_path / "other.json"
    copy.write_bytes((finished / "memory" / "memory_report.json").read_bytes())
    assert main(["report", str(copy), "--open"]) == 0
    assert (tmp_path / "memory_report.html").read_text().startswith("<!")


def test_report_refuses_another_version(finished, tmp_path, capfd):
    data = json.loads((finished / "memory" / "memory_report.json").read_text())
    data["schema_version"] = 999
    (tmp_path / "memory_report.json").write_text(json.dumps(data))
    assert main(["report", str(tmp_path)]) == 1
    assert "999" in error_line(capfd)


def test_report_of_a_folder_without_one(tmp_path, capfd):
    assert main(["report", str(tmp_path)]) == 1
    assert error_line(capfd).startswith(f"the folder `{tmp_path}` holds no `memory_report.json`")


@pytest.mark.parametrize(
    ("option", "line"),
    [
        (
            "--trainer.max_epoch=2",
            "unknown option `--trainer.max_epoch`. Did you mean `--trainer.max_epochs`?",
        ),
        ("--trainer.max_steps=many", "`--trainer.max_steps`: Expected a <class 'int'>. Got value: many"),
        ("--data.batch_sise=3", "unknown option `--data.batch_sise`. Did you mean `--data.batch_size`?"),
        ("--model.depht=10", "unknown option `--model.depht`. Did you mean `--model.depth`?"),
        (
            "--trainer.callbacks+=MemoryProfile",
            "`--trainer.callbacks`: there is no class `MemoryProfile`. Did you mean `MemoryProfiler`?",
        ),
        (
            "--trainer.callbacks.every_n_steps=often",
            "`--trainer.callbacks.every_n_steps`: Expected a <class 'int'>. Got value: often",
        ),
        ("--data.batch_size=big", "`--data.batch_size`: Expected a <class 'int'>. Got value: big"),
        ("stray", "unknown option `stray`."),
        (
            "--trainer.default_root_dir=x",
            "`--trainer.default_root_dir` is the run folder; set it with --run-dir.",
        ),
        ("--data.batch_size=0", "`DigitsDataModule(batch_size)` must be at least 1, but got batch_size=0."),
    ],
)
def test_wrong_options(tmp_path, capfd, option, line):
    folder = tmp_path / "run"
    assert main(["run", *TINY, f"--run-dir={folder}", option]) == 2
    assert error_line(capfd) == line
    assert not folder.exists()


def test_a_clash_with_the_trainer(tmp_path, capfd):
    assert main(["run", *TINY, f"--run-dir={tmp_path}", "--trainer.max_epochs=-1"]) == 2
    assert error_line(capfd).startswith("`WideResNetClassifier(lr_milestones)` are fractions of the run, but")


def test_absent_data(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("MEMTRAIN_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ("--data.download=false", f"--data.data_dir={tmp_path}", f"--run-dir={tmp_path / 'run'}")
    assert main(["run", "cifar10_wrn28_2", *options, "--model.depth=10"]) == 1
    assert error_line(capfd).startswith(f"CIFAR-10 was not found in `{tmp_path}`")


def test_other_errors_keep_their_traceback(tmp_path):
    options = (*TWO_STEPS, f"--run-dir={tmp_path / 'run'}", "--trainer.callbacks+=tests.helpers.cli.RaiseIn")
    with pytest.raises(ValueError, match="a bug"):
        main(["run", *options])


def test_wandb_without_wandb(tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["run", *TWO_STEPS, f"--run-dir={tmp_path / 'run'}", "--trainer.logger=WandbLogger"]) == 2
    assert error_line(capfd) == (
        "this run logs to W&B, but wandb is not installed: pip install 'lightning-memtrain[wandb]'"
    )


def test_a_copied_recipe_runs_its_own_code(tmp_path):
    assert memtrain_forked("copy", "cifar10_wrn28_2", "mine", cwd=tmp_path).returncode == 0
    module = tmp_path / "mine" / "module.py"
    code = module.read_text()
    loss = "loss = F.cross_entropy(logits, labels)"
    assert code.count(loss) == 1
    module.write_text(code.replace(loss, f"{loss} * 0"))
    options = (*TWO_STEPS[1:], "--run-dir=run", "--trainer.callbacks=null")

    interrupt = ("--trainer.callbacks+=tests.helpers.cli.InterruptAt", "--trainer.callbacks.batch=0")
    result = memtrain_forked("run", "./mine/", *options, *interrupt, cwd=tmp_path)

    assert result.returncode == 130, result.stderr
    kept = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run" / "recipe").rglob("*.py")}
    assert "recipe/mine/module.py" in kept
    # The resumed run goes on with the code that it began with.
    module.write_text("raise RuntimeError('changed in the meantime')")
    result = memtrain_forked("run", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    # A mistake in it shows its traceback.
    result = memtrain_forked("run", "./mine", cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.endswith("RuntimeError: changed in the meantime\n")
    assert "mine/module.py" in result.stderr
    with (tmp_path / "run" / "metrics.csv").open(newline="") as file:
        assert [row["train/loss"] for row in csv.DictReader(file)] == ["0.0", "0.0"]


# A LightningCLI of the user's own, which knows nothing of `memtrain`.
PLAIN_CLI = """
from lightning.pytorch.cli import LightningCLI

cli = LightningCLI(run=False, save_config_callback=None, seed_everything_default=False)
print(type(cli.model).__module__, type(cli.datamodule).__module__, cli.model.model.mark)
"""
PLAIN_PYTHON = """
import sys
from mine.module import WideResNetClassifier

network = WideResNetClassifier(depth=10, widen_factor=1, num_classes=10).model
installed = [name for name in sys.modules if name.startswith("lightning_memtrain.recipes.cifar10_wrn28_2")]
print(type(network).__module__, network.mark, installed)
"""


def test_an_edited_copy_uses_its_own_code_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["copy", "cifar10_wrn28_2", "mine"]) == 0
    # Not in the module that the configuration names, but in one that it imports.
    model = tmp_path / "mine" / "model.py"
    code = model.read_text()
    head = "class WideResNet(nn.Module):\n"
    assert code.count(head) == 1
    model.write_text(code.replace(head, f"{head}    mark = 7\n"))

    assert python_forked(PLAIN_PYTHON, cwd=tmp_path) == "mine.model 7 []"
    configs = ("--config=mine/config.yaml", "--config=mine/variants/smoke.yaml", "--trainer.accelerator=cpu")
    assert python_forked(PLAIN_CLI, *configs, cwd=tmp_path) == "mine.module mine.data 7"

    # By the command line also where it was moved, and another folder has its name.
    shutil.copytree("mine", "moved")
    model.write_text("raise RuntimeError('the other folder')")
    (tmp_path / "probe.py").write_text(PROBE)
    callback = ("--trainer.callbacks=null", "--trainer.callbacks+=probe.Probe")
    result = memtrain_forked("run", "./moved", *TWO_STEPS[1:], *callback, "--run-dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "mark 7 in mine.model" in result.stdout
    assert (tmp_path / "run" / "recipe" / "moved" / "model.py").is_file()


PROBE = """
from lightning.pytorch import Callback


class Probe(Callback):
    def on_train_start(self, trainer, pl_module):
        print("mark", pl_module.model.mark, "in", type(pl_module.model).__module__)
"""


def test_a_run_with_objects_in_its_hyper_parameters_is_resumed_by_naming_their_class(tmp_path):
    assert memtrain_forked("copy", "cifar10_wrn28_2", "mine", cwd=tmp_path).returncode == 0
    module = tmp_path / "mine" / "module.py"
    code = module.read_text()
    saves = "        self.save_hyperparameters()\n"
    assert code.count(saves) == 1
    own = "class Note:\n    pass\n\n\n"
    code = code.replace("class WideResNetClassifier", f"{own}class WideResNetClassifier")
    module.write_text(code.replace(saves, f'{saves}        self.hparams["note"] = Note()\n'))
    interrupt = ("--trainer.callbacks=null", "--trainer.callbacks+=tests.helpers.cli.InterruptAt")
    options = (*TWO_STEPS[1:], "--run-dir=run", "--trainer.logger=false")
    result = memtrain_forked(
        "run", "./mine", *options, *interrupt, "--trainer.callbacks.batch=0", cwd=tmp_path
    )
    assert result.returncode == 130, result.stderr

    result = memtrain_forked("run", "--resume", "run", cwd=tmp_path)
    assert result.returncode == 1
    assert "is whole, but has objects of `mine.module.Note` among its values" in result.stderr
    assert "resume with --trust mine.module.Note, or" in result.stderr

    result = memtrain_forked("run", "--resume", "run", "--trust", "mine.module.Note", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("epoch*.ckpt")
    assert "step=2" in checkpoint.name


@pytest.fixture(scope="module")
def stopped_by_one_process(tmp_path_factory) -> Path:
    """A run in two processes, of which one got Ctrl-C; both have stopped."""
    folder = tmp_path_factory.mktemp("distributed")
    options = ("--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.callbacks=null", "--run-dir=run")
    interrupt = ("--trainer.callbacks+=tests.helpers.cli.InterruptAt", "--trainer.callbacks.batch=0")
    result = memtrain_forked("run", *TINY, "--trainer.max_steps=4", *options, *interrupt, cwd=folder)
    assert result.returncode == 130, result.stderr
    return folder


def test_distributed_interrupt_that_only_one_process_gets(stopped_by_one_process):
    assert [path.name for path in stopped_by_one_process.iterdir()] == ["run"]
    (path,) = (stopped_by_one_process / "run" / "checkpoints").iterdir()
    assert path.name == "interrupted.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert 0 < checkpoint["global_step"] < 4
    assert len(checkpoint["callbacks"]["RandomState"]["processes"]) == 2


def test_a_distributed_run_goes_on_in_as_many_processes(stopped_by_one_process):
    result = memtrain_forked("run", "--resume", "run", cwd=stopped_by_one_process)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in stopped_by_one_process.iterdir()] == ["run"]
    (path,) = stopped_by_one_process.glob("run/checkpoints/epoch*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 4
    assert len(checkpoint["callbacks"]["RandomState"]["processes"]) == 2


def test_interrupted_process_leaves_checkpoint_and_report(tmp_path):
    interrupt = ("--trainer.callbacks+=tests.helpers.cli.InterruptAt", "--trainer.callbacks.batch=2")
    result = memtrain("run", *TINY, "--run-dir=run", *interrupt, cwd=tmp_path)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "interrupted.ckpt").is_file()
    report = json.loads((tmp_path / "run" / "memory" / "memory_report.json").read_text())
    assert [step["step"] for step in report["steps"]] == [0, 1, 2]
    assert report["out_of_memory"] is None


SMALL_DEMO = (
    "--model.depth=10",
    "--model.widen_factor=1",
    "--data.batch_size=4",
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=2",
    "--trainer.limit_val_batches=1",
    "--trainer.accelerator=cpu",
)


def test_demo(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(
        "lightning_memtrain.cli.demo.print_plan", lambda folder: None
    )  # the test below has it
    monkeypatch.setenv("WANDB_MODE", "")
    monkeypatch.chdir(tmp_path)
    with pytest.warns(NoEffectWarning, match=r"`SparseTraining\(update\)` has no effect.*in the 2 steps"):
        assert main(["demo", *SMALL_DEMO]) == 0
    printed = capfd.readouterr().out
    report, wandb = printed.splitlines()[-2:]
    page = tmp_path / report.removeprefix("Memory report: ")
    assert page.name == "memory_report.html"
    assert page.is_file()
    run = tmp_path / wandb.removeprefix("W&B offline run: ")
    assert run.is_dir()
    assert list(run.glob("*.wandb"))
    # Everything lies in the run's folder.
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert "activations" in printed


def test_the_plan_of_the_demo(tmp_path, monkeypatch, capsys):
    # A network of less depth, which needs a plan at a lower limit.
    monkeypatch.setattr(demo, "_PLAN_OVERRIDES", [*demo._PLAN_OVERRIDES, "--model.depth=16"])
    monkeypatch.setattr(demo, "_LIMIT", "700MiB")
    demo.print_plan(tmp_path)
    printed = capsys.readouterr().out
    # How a GPU with less memory would do, the same on every run; the page has the other ways.
    assert "on RTX 3060 12GB, batches of 100, limit 700.00 MiB: fits, a" in printed
    assert printed.endswith(f"\nPlan: {tmp_path / 'plan.html'}\n")
    assert (tmp_path / "plan.html").is_file()


def test_demo_without_wandb(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning_memtrain.cli.demo.print_plan", lambda folder: None)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(NoEffectWarning, match=r"`SparseTraining\(update\)` has no effect.*in the 2 steps"):
        assert main(["demo", *SMALL_DEMO, "--run-dir=run"]) == 0
    *_, report, wandb = capfd.readouterr().out.splitlines()
    assert report == f"Memory report: {os.path.join('run', 'memory', 'memory_report.html')}"
    assert wandb == (
        "W&B offline run: none, as wandb is not installed (pip install 'lightning-memtrain[wandb]')"
    )
