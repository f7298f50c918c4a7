"""The folder of one run: its configuration, metrics, checkpoints and memory report."""

from __future__ import annotations

import csv
import os
import shutil
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lightning_memtrain.cli.checkpoint_file import DamagedError, read_checkpoint
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.recipes import CONFIG, Recipe, installed, package_in
from lightning_memtrain.cli.writable import require_writable

# Where the first process of a distributed run tells those it starts which folder it chose.
_CHOSEN = "MEMTRAIN_RUN_DIR"


@dataclass(frozen=True)
class RunFolder:
    """Paths in the folder of one run.

    Args:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Every option of the run, as LightningCLI resolved it."""
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        """What was logged, one row per step at which something was."""
        return self.path / "metrics.csv"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, as the recipe asks for them."""
        return self.path / "checkpoints"

    @property
    def interrupt_checkpoint(self) -> Path:
        """Where the checkpoint is that Ctrl-C, or another signal to end, leaves."""
        return self.checkpoints / "interrupted.ckpt"

    @property
    def code(self) -> Path:
        """Code of the recipe that was run, if it was the user's own."""
        return self.path / "recipe"

    @classmethod
    def new(cls, path: Path | None, label: str) -> RunFolder:
        """Choose the folder of a new run, without making it: its options may still turn out wrong.

        Args:
            path: the folder, or ``None`` for ``runs/<label>-<timestamp>``.
            label: names the recipe and the variant.

        Returns:
            The run's folder.

        Raises:
            CommandError: if the folder holds something already, or cannot be written to.
        """
        if launched_by_first_process():
            # The path that was given, or else the timestamp of the first process.
            return cls(path or Path(os.environ.get(_CHOSEN, f"runs/{label}")))
        folder = path or _unused(Path("runs") / f"{label}-{datetime.now():%Y%m%d-%H%M%S}")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CommandError(
                f"the run folder `{folder}` exists and is not an empty folder; name another one, "
                f"or go on with the run in it: memtrain run --resume {folder}"
            )
        require_writable(folder, "the run folder")
        os.environ[_CHOSEN] = str(folder)
        return cls(folder)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The folder of an earlier run.

        Args:
            path: the folder.

        Returns:
            The run's folder.

        Raises:
            CommandError: if no run was started in it.
        """
        folder = cls(path)
        if not folder.config.is_file():
            what = "has no `config.yaml`" if path.is_dir() else "does not exist"
            raise CommandError(f"`{path}` is no run folder: it {what}.")
        return folder

    def keep_code(self, recipe: Recipe) -> None:
        """Copy the code of a user's recipe, so that a resumed run goes on with the code it began with.

        Runs that lie in the recipe's folder are none of its code: each would hold all earlier ones.

        Args:
            recipe: the recipe.
        """
        for source in sorted([*recipe.folder.rglob("*.py"), *recipe.folder.rglob("*.yaml")]):
            target = self.code / recipe.folder.name / source.relative_to(recipe.folder)
            if any(self._is_run(folder) for folder in source.parents if recipe.folder in folder.parents):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def _is_run(self, folder: Path) -> bool:
        """Whether a folder is this run's, or one in which another was started, and not more of a recipe."""
        if folder == self.path.resolve():
            return True
        run = RunFolder(folder)
        return run.config.is_file() and any(p.exists() for p in (run.code, run.metrics, run.checkpoints))

    def kept_recipe(self) -> Recipe | None:
        """What :meth:`keep_code` kept, or ``None`` if the run is of an installed recipe."""
        for config in self.code.glob(f"*/{CONFIG}"):
            return Recipe(config.parent.name, config.parent.resolve())
        return None

    def recipe(self) -> Recipe | None:
        """The recipe of the run, or ``None`` if it is neither an installed one nor was kept."""
        return self.kept_recipe() or installed().get(package_in(self.config) or "")

    def last_checkpoint(self) -> tuple[Path, int]:
        """The checkpoint with most optimizer steps done; of several, the one written last.

        Returns:
            Its path, and how many steps those are.

        Raises:
            CommandError: if there is none that is whole, or one that is cannot be read.
        """
        found: list[tuple[int, float, Path]] = []
        damaged: list[DamagedError] = []
        for path in sorted(self.checkpoints.glob("*.ckpt")):
            try:
                global_step = int(read_checkpoint(path, check=False)["global_step"])
            except DamagedError as error:
                damaged.append(error)
            else:
                found.append((global_step, path.stat().st_mtime, path))
        for global_step, _, path in sorted(found, reverse=True):
            try:
                read_checkpoint(path)
            except DamagedError as error:
                damaged.append(error)
                continue
            if damaged and not launched_by_first_process():
                reasons = " ".join(str(error) for error in damaged)
                print(f"memtrain: {reasons} Going on from `{path}`, {global_step} steps", file=sys.stderr)
            return path, global_step
        reasons = "".join(f" {error}" for error in damaged)
        raise CommandError(
            f"there is no {'whole ' if damaged else ''}checkpoint in `{self.checkpoints}` to resume from."
            f"{reasons}",
            exit_code=1,
        )

    def drop_metrics_from(self, step: int) -> None:
        """Leave out what was logged after a checkpoint; the resumed run logs it again.

        Args:
            step: number of optimizer steps done in the checkpoint. Lightning counts logged steps from 0.
        """
        if not self.metrics.is_file():
            return
        header, rows, num_torn = _whole_rows(self.metrics)
        if not header:
            aside = self.metrics.with_suffix(".csv.damaged")
            os.replace(self.metrics, aside)
            print(f"memtrain: `{self.metrics}` had no header; it is now `{aside}`", file=sys.stderr)
            return
        if num_torn:
            print(f"memtrain: {num_torn} torn rows of `{self.metrics}` are left out", file=sys.stderr)
        place = header.index("step")
        scratch = self.metrics.with_suffix(".csv.part")
        with scratch.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *(row for row in rows if int(row[place]) < step)])
        os.replace(scratch, self.metrics)


def launched_by_first_process() -> bool:
    """Whether this is one of the further processes of a distributed run, which only the first one leads."""
    return int(os.environ.get("LOCAL_RANK", "0")) > 0


def _whole_rows(path: Path) -> tuple[list[str], list[list[str]], int]:
    """Header and rows of a table whose writing may have been broken off, and how many rows are torn."""
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\0", "").splitlines()
    header, *rows = [*csv.reader(lines)] or [[]]
    if "step" not in header:
        return [], [], 0
    place = header.index("step")
    whole = [row for row in rows if len(row) == len(header) and row[place].isdecimal()]
    return header, whole, sum(bool(row) for row in rows) - len(whole)


def _unused(folder: Path) -> Path:
    """The folder, or one with a number where another run began within the same second."""
    candidate, number = folder, 2
    while candidate.exists():
        candidate, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return candidate
