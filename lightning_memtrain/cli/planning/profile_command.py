"""Train a few steps of a recipe, or of a model of a file, and show where their memory went."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.planning.named_target import (
    assembled,
    class_of_file,
    configurations_of,
    refuse_fixed_batch_size,
    split_class,
)
from lightning_memtrain.cli.writable import require_writable


def show_profile(
    target: str,
    *,
    steps: int = 5,
    variants: Sequence[str] = (),
    batch_size: int | None = None,
    stacks: bool = True,
    output: Path,
    overrides: Sequence[str] = (),
) -> int:
    """Train for real, for a few steps, and print the table; nothing else is kept.

    Args:
        target: a recipe's name or folder, a configuration of LightningCLI, or ``file.py:Class`` for a
            LightningModule that brings its ``train_dataloader``.
        steps: of an optimizer.
        variants: what to lay over the recipe, together.
        batch_size: samples in a batch; ``None`` for what recipe or class have.
        stacks: whether to name lines of code.
        output: folder for the report.
        overrides: options of LightningCLI, for a recipe.

    Returns:
        The exit code of the command.

    Raises:
        CommandError: if something of it is wrong.
    """
    require_writable(output, "the report's folder")
    for name, value in (("--steps", steps), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise CommandError(f"{name} must be at least 1, but got {value}.")
    named = split_class(target, variants, overrides)
    configs = [] if named is not None else configurations_of(target, variants)
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_memtrain.report import MemoryProfiler

    profiler = MemoryProfiler(every_n_steps=1, report_dir=output, stacks=stacks)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if named is not None:
                _of_class(*named, batch_size, steps, profiler, folder)
            else:
                _of_configurations(configs, batch_size, overrides, steps, profiler)
    except MisconfigurationException as error:
        raise CommandError(str(error), exit_code=1) from error
    if profiler.report is None:
        raise CommandError(f"`{target}` has made no training step, so that there is nothing to show.", 1)
    return 0


def _of_class(file: Path, name: str, batch_size: int | None, steps: int, profiler: Any, folder: str) -> None:
    kind = class_of_file(file, name)
    if batch_size is not None:
        refuse_fixed_batch_size(kind, file, name)
    model = kind() if batch_size is None else kind(batch_size=batch_size)
    from lightning.pytorch import LightningModule

    if isinstance(model, LightningModule):
        from lightning.pytorch import Trainer
    else:
        from pytorch_lightning import Trainer  # type: ignore[assignment]
    Trainer(
        max_steps=steps,
        limit_val_batches=0,
        callbacks=[profiler],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    ).fit(model)


def _of_configurations(
    configs: Sequence[str], batch_size: int | None, overrides: Sequence[str], steps: int, profiler: Any
) -> None:
    from lightning_memtrain.report import MemoryProfiler

    ours = [f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0"]
    ours += ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    ours += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    with assembled(configs, batch_size, [*overrides, *ours]) as (cli, trainer):
        others = [one for one in trainer.callbacks if not isinstance(one, MemoryProfiler)]
        trainer.callbacks = [*others, profiler]
        trainer.fit(cli.model, cli.datamodule)
