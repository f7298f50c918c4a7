"""`memtrain study` before anything runs: plans, sweeps, and one line for every mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_memtrain.cli import main, recipes
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.studies import study_command
from lightning_memtrain.cli.studies.config_check import check_run
from lightning_memtrain.cli.studies.study_setup import load_grid, make_plan
from lightning_memtrain.study.running.study_runner import StudyRunner
from tests.helpers.cli import IGNORED, environment

pytestmark = pytest.mark.filterwarnings(*IGNORED)

RECIPE = "cifar10_wrn28_2"
SPARSE = """
variants:
  plain: {}
  sparse:
    config:
      trainer:
        callbacks+:
          - class_path: lightning_memtrain.SparseTraining
            init_args:
              method: {class_path: lightning_memtrain.sparsity.METHOD, init_args: {sparsity: PART}}
"""
CHUNKS = """
variants:
  "{size}":
    for: {size: [1, 2]}
    config:
      trainer:
        callbacks+: [{class_path: lightning_memtrain.Microbatching, init_args: {microbatch_size: "{size}"}}]
combinations: {both: ["1", "2"]}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    # Whatever gets so far is right; what it would run is tested elsewhere.
    monkeypatch.setattr(StudyRunner, "run", lambda self: True)
    monkeypatch.setattr(study_command, "num_cpus", lambda: 2)
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    return tmp_path


def grid(folder: Path, text: str, **values: object) -> str:
    for name, value in values.items():
        text = text.replace(name, str(value))
    (folder / "grid.yaml").write_text(text)
    return "--grid=grid.yaml"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main(["study", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs=0"], "--jobs must be a whole number from 1 to 2 (the CPUs that this process may use: "),
        (["--jobs=3"], "but got `3`"),
        (["--jobs=two"], "but got `two`"),
        (["--threads=3"], "--threads must be a whole number from 1 to 2"),
        (["--nice=20"], "--nice must be a whole number from 0 to 19"),
        (["--seeds=0"], "`--seeds` must be a number of seeds from 1 to 100, or a list of different seeds"),
        (["--seeds=1,1"], "but got [1, 1]"),
        (["--seeds=many"], "but got 'many'"),
        (["--grid=tny"], "the recipe has default, tiny. Did you mean `tiny`?"),
        (["--grid=tiny", "--variant=plin"], "only plain, microbatches-5, bf16, both. Did you mean `plain`?"),
        (["--grid=tiny", "--run=bf16"], "no run `bf16`, only plain-seed1, "),
        (["--grid=tiny", "--seed=9"], "`--seed 9` is none of the study's seeds, which are [1, 2]."),
        (["--grid=tiny", "--resume"], "no study in `studies/cifar10_wrn28_2-tiny` to go on with"),
        (["--sedes=2"], "unknown argument `--sedes=2`. Did you mean `--seeds`?"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(here, capsys, options, message):
    assert message in error_of(capsys, RECIPE, *options)
    assert not (here / "studies").exists()


def test_an_unknown_recipe(here, capsys):
    assert "unknown recipe `cifar10`. Did you mean `cifar10_wrn28_2`?" in error_of(capsys, "cifar10")


def test_an_unknown_variant_of_the_recipe(here, capsys):
    option = grid(here, "variants: {half: {recipe_variants: bf61}}")
    assert "unknown variant `bf61`" in (error := error_of(capsys, RECIPE, option))
    assert "Did you mean `bf16`?" in error


def test_an_unknown_method_is_answered_with_the_nearest(here, capsys):
    error = error_of(capsys, RECIPE, grid(here, SPARSE, METHOD="Rigl", PART=0.5))
    assert (
        "`trainer.callbacks+[0].init_args.method.class_path` of `sparse` names "
        "`lightning_memtrain.sparsity.Rigl`, but lightning_memtrain.sparsity has no `Rigl`. Did you mean "
        "`RigL`?"
    ) in error
    error = error_of(
        capsys, RECIPE, grid(here, "variants: {x: {config: {model: {class_path: nowhere.Net}}}}")
    )
    assert "but nowhere cannot be imported" in error


def test_a_value_that_its_class_refuses_is_found_before_anything_runs(here, capsys):
    error = error_of(capsys, RECIPE, grid(here, SPARSE, METHOD="RigL", PART=1.5))
    assert "the variant `sparse` cannot be run: " in error
    assert "sparsity" in error
    assert not (here / "studies").exists()


def test_an_option_that_there_is_not(here, capsys):
    error = error_of(capsys, RECIPE, grid(here, "variants: {x: {config: {model: {init_args: {dpth: 10}}}}}"))
    assert "the variant `x` cannot be run: " in error
    assert "dpth" in error


def test_two_that_cannot_go_together(here, capsys):
    error = error_of(capsys, RECIPE, grid(here, CHUNKS))
    assert "`both` cannot be run: variant `1` and variant `2` both set `Microbatching`" in error


def test_a_file_that_is_no_yaml(here, capsys):
    assert "grid.yaml: " in error_of(capsys, RECIPE, grid(here, "variants: ["))


def test_a_grid_of_another_recipe(here, capsys):
    option = grid(here, "recipe: net\nvariants: {plain: {}}")
    assert f"is a grid for the recipe `net`, but the recipe is `{RECIPE}`." in error_of(
        capsys, RECIPE, option
    )


def study(option: str, *more: str) -> int:
    return main(["study", RECIPE, option, "--study-dir=s", "--wandb=off", *more])


def test_a_folder_with_a_study_of_its_own(here, capsys):
    option = grid(here, "seeds: 1\nvariants: {plain: {}}")
    assert study(option) == 1  # nothing was run
    capsys.readouterr()
    assert json.loads((here / "s" / "study.json").read_text())["runs"][0]["state"] == "waiting"
    assert yaml.safe_load((here / "s" / "configs" / "plain-seed1.yaml").read_text())["seed_everything"] == 1

    assert "`s` holds this study already; go on with it by --resume." in error_of(
        capsys, RECIPE, option, "--study-dir=s", "--wandb=off"
    )
    assert study(option, "--resume", "--seeds=2") == 1  # more may be asked for
    capsys.readouterr()
    assert "the study in `s` is another one: the run `plain-seed2` is no longer asked for." in error_of(
        capsys, RECIPE, option, "--study-dir=s", "--resume"
    )
    other = grid(here, "seeds: 2\nvariants: {plain: {config: {trainer: {max_epochs: 3}}}}")
    assert "`trainer.max_epochs` of `plain` is 3, but was not set. Take its recipe and grid" in error_of(
        capsys, RECIPE, other, "--study-dir=s", "--resume"
    )
    assert "the recipe is `iwslt14_dynamicconv`, but was `cifar10_wrn28_2`" in error_of(
        capsys, "iwslt14_dynamicconv", option, "--study-dir=s", "--resume"
    )


def test_a_folder_that_is_no_study(here, capsys):
    option = grid(here, "variants: {plain: {}}")
    (here / "s").mkdir()
    (here / "s" / "mine.txt").touch()
    error = error_of(capsys, RECIPE, option, "--study-dir=s")
    assert "`s` exists and is no study: it has no `plan.json`. Name another --study-dir." in error
    (here / "s" / "plan.json").write_text("{")
    assert "is no plan of a study" in error_of(capsys, RECIPE, option, "--study-dir=s", code=1)


def test_an_agent_begins_a_study_and_goes_on_with_it(here, capsys, monkeypatch):
    option = grid(here, "seeds: 2\nvariants: {plain: {}}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert study(option, "--run=plain-seed1") == 1  # nothing was run
    assert study(option, "--run=plain-seed2") == 1
    assert "no study" not in capsys.readouterr().err


def test_the_environment_of_a_run_names_it_in_wandb(here, monkeypatch):
    seen = []
    monkeypatch.setattr(StudyRunner, "run", lambda self: seen.append(self) or True)
    option = grid(here, "seeds: 1\nvariants: {plain: {technique: none, strength: 0.5}}")
    main(["study", RECIPE, option, "--study-dir=mine", "--wandb=offline", "--wandb-project=p"])
    (runner,) = seen
    (run,) = runner._plan.runs
    found = runner._env(run)
    assert (found["WANDB_RUN_GROUP"], found["WANDB_NAME"]) == ("mine", "plain-seed1")
    assert found["WANDB_RUN_ID"] == f"{(here / 'mine' / 'study_id').read_text().strip()}-plain-seed1"
    assert (found["WANDB_MODE"], found["WANDB_RESUME"], found["OMP_NUM_THREADS"]) == ("offline", "allow", "1")
    told = json.loads(found["MEMTRAIN_STUDY"])
    assert (told["study"], told["variant"], told["technique"], told["strength"]) == (
        *("mine", "plain", "none", 0.5),
    )
    command = runner._command(run, False)
    assert command[4:] == [
        *("10", "run", RECIPE, "--run-dir=mine/runs/plain-seed1", "--config=mine/configs/plain-seed1.yaml"),
        *("--trainer.logger+=WandbLogger", "--trainer.logger.project=p", "--trainer.logger.offline=true"),
    ]
    assert runner._command(run, True)[5:] == ["run", "--resume", "mine/runs/plain-seed1"]
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert "WANDB_RUN_ID" not in runner._env(run)  # its agent's, if it has one


def test_wandb_where_loggers_are_switched_off(here, capsys, monkeypatch):
    option = grid(here, "seeds: 1\nvariants: {quiet: {config: {trainer: {logger: false}}}}")
    error = error_of(capsys, RECIPE, option, "--study-dir=a", "--wandb=offline")
    assert "`--wandb offline` adds a logger, but `quiet` has `trainer.logger: false`." in error
    seen = []
    monkeypatch.setattr(StudyRunner, "run", lambda self: seen.append(self) or True)
    main(["study", RECIPE, option, "--study-dir=b"])
    assert not any("Wandb" in word for word in seen[0]._command(seen[0]._plan.runs[0], False))


def test_a_process_whose_study_is_gone_does_not_begin(here):
    command = [sys.executable, "-m", "lightning_memtrain.cli.studies.run_process"]
    for parent, code in (("1", 143), (str(os.getpid()), 0)):
        done = subprocess.run(
            [*command, parent, "3", "recipes"], capture_output=True, text=True, env=environment(), timeout=60
        )
        assert (done.returncode, RECIPE in done.stdout) == (code, code == 0)


def test_a_grid_may_name_classes_of_the_users_own_recipe(here, capsys):
    assert main(["copy", RECIPE, "mine"]) == 0
    option = grid(
        here, "seeds: 1\nvariants: {plain: {config: {model: {class_path: mine.module.WideResNetClassifer}}}}"
    )
    error = error_of(capsys, "./mine", option)
    assert "mine.module has no `WideResNetClassifer`. Did you mean `WideResNetClassifier`?" in error


def test_a_sweep_is_written_and_nothing_run(here, capsys):
    assert main(["study", RECIPE, "--grid=tiny", "--wandb-sweep", "--wandb-project=mine"]) == 0
    out = capsys.readouterr().out
    assert "sweep.yaml: 8 runs. Register it once: wandb sweep sweep.yaml" in out
    sweep = yaml.safe_load((here / "sweep.yaml").read_text())
    assert sweep["project"] == "mine"
    variants = ["plain", "microbatches-5", "bf16", "both"]
    names = [f"{variant}-seed{seed}" for seed in (1, 2) for variant in variants]
    assert sweep["parameters"] == {"run": {"values": names}}
    assert sweep["command"] == [
        *("${env}", "memtrain", "study", RECIPE, "--grid=tiny", "--threads=1", "--jobs=1"),
        *("--wandb=online", "--wandb-project=mine", "${args}"),
    ]
    assert not (here / "studies").exists()


def test_a_profiler_is_added_where_there_is_none(here):
    recipe = recipes.find(RECIPE)
    (here / "none.yaml").write_text("variants: {plain: {}, none: {config: {trainer: {callbacks: []}}}}")
    _, read = load_grid(recipe, "none.yaml", (1,))
    plain, none = (run.config.get("trainer", {}) for run in make_plan(recipe, read).runs)
    assert plain == {}
    assert none == {"callbacks": [{"class_path": "lightning_memtrain.MemoryProfiler"}]}


@pytest.mark.parametrize("name", ["default", "tiny"])
def test_the_grids_of_the_recipe_can_be_run(here, name):
    recipe = recipes.find(RECIPE)
    _, read = load_grid(recipe, name, (1,))
    plan = make_plan(recipe, read)
    # Of each technique the last strength; the others differ by a number.
    one_each = {read.variant(run.variant).technique or run.variant: run for run in plan.runs}
    for run in one_each.values():
        check_run(recipe, run.config, run.variant)
    assert {run.variant for run in plan.runs} == {variant.name for variant in read.variants}


def test_a_recipe_without_a_grid_says_so(here):
    with pytest.raises(CommandError, match=r"`iwslt14_dynamicconv` brings no grid along; write one"):
        load_grid(recipes.find("iwslt14_dynamicconv"), None, None)
