"""For tests of the command line: runs of a tiny recipe, and a Ctrl-C at a chosen moment."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tests.helpers.forked import run_forked

ROOT = Path(__file__).parents[2]

# Lightning's, about itself and about runs as small as those of tests.
IGNORED = (
    "ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning",
    "ignore:.*LeafSpec.*is deprecated",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
)

# WRN-10-1 on digits, six steps and one validation batch per epoch: 0.1 s per step.
TINY = (
    "cifar10_wrn28_2",
    "--variant=smoke",
    "--model.depth=10",
    "--model.widen_factor=1",
    "--data.batch_size=4",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.max_steps=-1",
    "--trainer.limit_train_batches=6",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
)


def memtrain(*args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lightning_memtrain.cli", *map(str, args)],
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=240,
    )


def memtrain_forked(*args: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, which need not import Lightning first."""
    return run_forked(_command, [*map(str, args)], cwd=cwd, environment=environment(**env))


def _command(args: list[str]) -> int | None:
    from lightning_memtrain.cli import main

    # Lightning starts the other ranks of a distributed run with it.
    sys.argv = [str(ROOT / "lightning_memtrain" / "cli" / "__main__.py"), *args]
    return main(args)


def python_forked(code: str, *args: str, cwd: Path) -> str:
    """The last line that a script prints, which knows nothing of this checkout."""
    # A file, whose folder is searched for modules: jsonargparse changes the working directory as it reads.
    script = cwd / "train.py"
    script.write_text(code)
    result = run_forked(_script, str(script), [*args], cwd=cwd, environment=environment())
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def _script(path: str, args: list[str]) -> None:
    warnings.simplefilter("ignore")
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


def environment(**changes: str) -> dict[str, str]:
    """The environment of a process that finds this checkout's tests and uses one thread."""
    # A W&B service that this process has started would write the other one's files, when it likes to.
    own = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**own, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


class InterruptAt(Callback):
    """Sends a signal in the middle of a training step, when gradients are there and parameters not updated.

    Args:
        batch: number of the batch over the whole run, from 0.
        times: how often.
        name: of the signal.
    """

    def __init__(self, batch: int, times: int = 1, name: str = "SIGINT") -> None:
        self.batch = batch
        self.times = times
        self.name = name

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            for _ in range(self.times):
                signal.raise_signal(signal.Signals[self.name])


class RaiseIn(Callback):
    """Fails in the first training step, as a bug would."""

    def on_train_batch_start(self, *_: Any) -> None:
        raise ValueError("a bug")


class KillAt(Callback):
    """Kills its process once in the middle of training, as a system that runs out of memory does.

    Args:
        batch: number of the batch over the whole run, from 0.
        once: a file that is made before, and keeps it from happening again.
    """

    def __init__(self, batch: int, once: str) -> None:
        self.batch = batch
        self.once = Path(once)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx >= self.batch and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
