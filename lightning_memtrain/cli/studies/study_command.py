"""``memtrain study``: many runs of a recipe, a few at a time, and what came of them."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import INTERRUPTED, CommandError, did_you_mean
from lightning_memtrain.cli.recipes import Recipe
from lightning_memtrain.cli.studies.config_check import check_run
from lightning_memtrain.cli.studies.study_options import SWEEP_NAME
from lightning_memtrain.cli.studies.study_progress import StudyProgress
from lightning_memtrain.cli.studies.study_setup import check_folder, load_grid, make_plan, say
from lightning_memtrain.cli.writable import require_writable
from lightning_memtrain.core.atomic_files import write_atomically
from lightning_memtrain.study.collect import collect, needs_test
from lightning_memtrain.study.grid import Grid, check_seeds
from lightning_memtrain.study.machine import num_cpus
from lightning_memtrain.study.pages.study_page import save_study
from lightning_memtrain.study.running.study_runner import Listener, StudyRunner
from lightning_memtrain.study.study_folder import StudyFolder
from lightning_memtrain.study.study_plan import PlannedRun, StudyPlan
from lightning_memtrain.study.study_result import StudyResult
from lightning_memtrain.study.wandb_sweep import sweep_config


def run_study(options: argparse.Namespace) -> int:
    """Run a study, or go on with it.

    Args:
        options: see :mod:`study_options`, and the ``recipe``.

    Returns:
        The exit code of the command: 0, 1 if a run has failed, 130 if it was stopped.

    Raises:
        CommandError: if something of it is wrong.
    """
    jobs = _count("--jobs", options.jobs)
    threads = _count("--threads", options.threads)
    niceness = _number("--nice", options.nice, 0, _NICEST, "the priority that runs have below others'")
    seeds = None if options.seeds is None else _seeds(options.seeds)
    recipe = recipes.find(options.recipe)
    if recipe not in recipes.installed().values():
        recipe.make_importable()
    name, grid = load_grid(recipe, options.grid, seeds)
    folder = StudyFolder(options.study_dir or Path("studies") / f"{recipe.name}-{name}")
    require_writable(folder.path, "the study's folder")
    plan = make_plan(recipe, grid, say)
    wanted = plan.only(
        _known([variant.name for variant in grid.variants], options.variant, "variant"),
        _known_seeds(plan, options.seed),
        _known([run.name for run in plan.runs], options.run, "run"),
    )
    if options.wandb_sweep:
        return _write_sweep(recipe, plan, grid, options)
    # An agent of W&B calls this for one run after the other.
    check_folder(folder, plan, resume=None if "WANDB_SWEEP_ID" in os.environ else options.resume)
    _check_runs(recipe, folder, wanted)
    _write_plan(folder, plan)
    study = _Study(recipe, folder, plan, wanted, grid, jobs, threads, niceness, _wandb(options, recipe, plan))
    return study.run()


_NICEST = 19  # what the system knows


@dataclass(frozen=True)
class _Wandb:
    mode: str
    project: str


@dataclass(frozen=True)
class _Study:
    recipe: Recipe
    folder: StudyFolder
    plan: StudyPlan
    wanted: StudyPlan
    grid: Grid
    jobs: int
    threads: int
    niceness: int
    wandb: _Wandb | None

    def run(self) -> int:
        self.save()
        with StudyProgress(self.folder, self.grid, after_run=self.save) as progress:
            listener = Listener(progress.show, progress.tell_end, progress.tell_stopping)
            runner = StudyRunner(
                self.folder, self.wanted, self.jobs, self.command, self.environment, listener
            )
            whole = runner.run()
        result = self.save()
        progress.print_result(result)
        if not whole:
            say(f"stopped; go on with the same command and --resume (the study is in {self.folder.path})")
            return INTERRUPTED
        names = {run.name for run in self.wanted.runs}
        return int(any(run.state != "finished" for run in result.runs if run.name in names))

    def save(self) -> StudyResult:
        result = collect(self.folder, self.plan, self.grid, num_jobs=self.jobs, commit=_commit())
        save_study(result, self.folder)
        return result

    def command(self, run: PlannedRun, resumed: bool) -> Sequence[str]:
        """A process of its own for a run, or for the rest of one."""
        test = ["--test"] if needs_test(self.grid.score) else []
        process = ["lightning_memtrain.cli.studies.run_process", str(os.getpid()), str(self.niceness)]
        python = [sys.executable, "-m", *process]
        if resumed:
            return [*python, "run", "--resume", str(self.folder.run(run.name)), *test]
        installed = self.recipe in recipes.installed().values()
        options = [
            self.recipe.name if installed else str(self.recipe.folder),
            f"--run-dir={self.folder.run(run.name)}",
            f"--config={self.folder.config(run.name)}",
        ]
        return [*python, "run", *options, *self._logger(), *test]

    def _logger(self) -> list[str]:
        if self.wandb is None:
            return []
        offline = str(self.wandb.mode == "offline").lower()
        return [
            "--trainer.logger+=WandbLogger",
            f"--trainer.logger.project={self.wandb.project}",
            f"--trainer.logger.offline={offline}",
        ]

    def environment(self, run: PlannedRun) -> dict[str, str]:
        """What a run's process finds: its threads, and where it belongs in W&B."""
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        variant = self.grid.variant(run.variant)
        study = {
            "study": self.folder.path.resolve().name,
            "variant": run.variant,
            "technique": variant.technique or None,
            "strength": variant.strength,
            "members": list(variant.members),
            "settings": run.config,
        }
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        return {**kept, **threads, "MEMTRAIN_STUDY": json.dumps(study), **self._wandb_environment(run)}

    def _wandb_environment(self, run: PlannedRun) -> dict[str, str]:
        if self.wandb is None:
            return {}
        named = {"WANDB_RUN_GROUP": self.folder.path.resolve().name, "WANDB_MODE": self.wandb.mode}
        if "WANDB_SWEEP_ID" in os.environ:
            return named  # its agent has chosen name and id
        # One id for all parts of a run, so that what is resumed goes on in the same run of W&B.
        number = self.folder.path / "study_id"
        own_id = re.sub(r"[^\w-]", "-", f"{number.read_text(encoding='utf-8').strip()}-{run.name}")
        return {**named, "WANDB_NAME": run.name, "WANDB_RUN_ID": own_id, "WANDB_RESUME": "allow"}


# A service of W&B that this process has started, and the run folder that it has chosen, are its own.
_NOT_INHERITED = ("MEMTRAIN_RUN_DIR", "WANDB_SERVICE")


def _write_plan(folder: StudyFolder, plan: StudyPlan) -> None:
    for run in plan.runs:
        write_atomically(folder.config(run.name), yaml.safe_dump(dict(run.config), sort_keys=False))
    if not (folder.path / "study_id").is_file():
        write_atomically(folder.path / "study_id", f"{uuid.uuid4().hex[:8]}\n")
    write_atomically(folder.plan, plan.to_json())


def _check_runs(recipe: Recipe, folder: StudyFolder, plan: StudyPlan) -> None:
    """Once for each variant that has a run to begin."""
    checked: set[str] = set()
    for run in plan.runs:
        if run.variant not in checked and not folder.run(run.name).is_dir():
            checked.add(run.variant)
            check_run(recipe, run.config, f"the variant `{run.variant}`")


def _write_sweep(recipe: Recipe, plan: StudyPlan, grid: Grid, options: argparse.Namespace) -> int:
    command = ["memtrain", "study", options.recipe]
    for option in ("grid", "seeds", "threads"):
        value = getattr(options, option)
        if value is not None:
            command.append(f"--{option}={value}")
    command += ["--jobs=1", "--wandb=online", f"--wandb-project={options.wandb_project}"]
    if options.study_dir is not None:
        command.append(f"--study-dir={options.study_dir}")
    sweep = sweep_config(plan, grid, command, options.wandb_project)
    write_atomically(Path(SWEEP_NAME), yaml.safe_dump(sweep, sort_keys=False))
    print(f"{SWEEP_NAME}: {len(plan.runs)} runs. Register it once: wandb sweep {SWEEP_NAME}")
    print("Then, on each machine that takes part, run the `wandb agent ...` that this prints.")
    return 0


def _wandb(options: argparse.Namespace, recipe: Recipe, plan: StudyPlan) -> _Wandb | None:
    installed = find_spec("wandb") is not None
    without = _without_loggers(recipe, plan)
    mode = options.wandb or ("offline" if installed and not without else "off")
    if mode != "off" and without:
        raise CommandError(
            f"`--wandb {mode}` adds a logger, but {without} has `trainer.logger: false`. Leave one out."
        )
    if mode == "off":
        return None
    if not installed:
        raise CommandError(f"`--wandb {mode}` needs wandb: pip install 'lightning-memtrain[wandb]'")
    return _Wandb(mode, options.wandb_project)


def _without_loggers(recipe: Recipe, plan: StudyPlan) -> str:
    """Who has switched all loggers off; nothing if nobody has."""
    configs = {"the recipe": yaml.safe_load(recipe.config.read_text(encoding="utf-8")) or {}}
    configs |= {f"`{run.variant}`": run.config for run in plan.runs}
    off = [name for name, one in configs.items() if (one.get("trainer") or {}).get("logger") is False]
    return off[0] if off else ""


def _count(option: str, text: str) -> int:
    why = "the CPUs that this process may use: more would only wait for each other, and spoil the times"
    return _number(option, text, 1, num_cpus(), why)


def _number(option: str, text: str, least: int, most: int, why: str) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise CommandError(
            f"{option} must be a whole number from {least} to {most} ({why}), but got `{text}`."
        )
    return int(text)


def _seeds(text: str) -> tuple[int, ...]:
    values = text.split(",")
    given: object = text
    if all(value.strip().isdecimal() for value in values):
        numbers = [int(value) for value in values]
        given = numbers if len(numbers) > 1 else numbers[0]
    try:
        return check_seeds(given, "--seeds")
    except ValueError as error:
        raise CommandError(str(error)) from error


def _known(known: Sequence[str], names: Sequence[str], what: str) -> tuple[str, ...]:
    for name in names:
        if name not in known:
            raise CommandError(
                f"the grid has no {what} `{name}`, only {', '.join(known)}.{did_you_mean(name, known)}"
            )
    return tuple(names)


def _known_seeds(plan: StudyPlan, seeds: Sequence[int]) -> tuple[int, ...]:
    known = sorted({run.seed for run in plan.runs})
    for seed in seeds:
        if seed not in known:
            raise CommandError(f"`--seed {seed}` is none of the study's seeds, which are {known}.")
    return tuple(seeds)


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, if it does."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
