"""Find how a recipe, or a model of a file, keeps a limit of memory."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.planning.named_target import (
    assembled,
    class_of_file,
    configurations_of,
    refuse_fixed_batch_size,
    refuse_small_batch,
    split_class,
)
from lightning_memtrain.cli.planning.predict_command import DOES_NOT_FIT
from lightning_memtrain.cli.writable import require_writable

if TYPE_CHECKING:
    from lightning_memtrain.planning import Plan


def show_plan(
    target: str,
    *,
    limit: str | None,
    device: str | None,
    allow: Sequence[str] = (),
    variants: Sequence[str] = (),
    batch_size: int | None = None,
    output: Path,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> int:
    """Print a plan, and write it.

    Args:
        target: a recipe's name or folder, a configuration of LightningCLI, or ``file.py:Class`` for a
            LightningModule that brings its ``train_dataloader``.
        limit: as for :func:`~lightning_memtrain.plan`, as text.
        device: as for :func:`~lightning_memtrain.plan`.
        allow: likewise.
        variants: what to lay over the recipe, together.
        batch_size: samples in a batch; ``None`` for what recipe or class have.
        output: where the plan goes; its page goes beside it.
        as_json: whether to print JSON instead of the table.
        overrides: options of LightningCLI, for a recipe.

    Returns:
        The exit code of the command: 0 if there is a way, else :data:`~.predict_command.DOES_NOT_FIT`.

    Raises:
        CommandError: if something of it is wrong, or cannot be planned.
    """
    require_writable(output.parent, "the plan's folder")
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    refuse_small_batch(batch_size)
    named = split_class(target, variants, overrides)
    options: dict[str, Any] = {"limit": _number_or_text(limit), "device": device, "allow": allow}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the answer alone is printed
            if named is not None:
                plan = _of_class(*named, batch_size, options)
            else:
                plan = _of_configurations(configurations_of(target, variants), batch_size, overrides, options)
    except (MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    print(json.dumps(plan.to_dict(), indent=2) if as_json else plan)
    plan.save_html(output.with_suffix(".html"))
    if not plan.fits:
        return DOES_NOT_FIT
    plan.save(output)
    print(f"Plan: {output}; page: {output.with_suffix('.html')}", file=sys.stderr)
    return 0


def _of_configurations(
    configs: Sequence[str], batch_size: int | None, overrides: Sequence[str], options: dict[str, Any]
) -> Plan:
    from lightning_memtrain.planning import plan

    with assembled(configs, batch_size, overrides) as (cli, trainer):
        return plan(cli.model, cli.datamodule, trainer=trainer, **options)


def _of_class(file: Path, name: str, batch_size: int | None, options: dict[str, Any]) -> Plan:
    from lightning_memtrain.planning import plan

    kind = class_of_file(file, name)
    if batch_size is None:
        return plan(kind, **options)
    refuse_fixed_batch_size(kind, file, name)
    return plan(lambda: kind(batch_size=batch_size), **options)


def _number_or_text(limit: str | None) -> int | float | str | None:
    if limit is None:
        return None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(limit)
    return limit
