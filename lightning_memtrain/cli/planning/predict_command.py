"""Predict what a recipe, or a model of a file, will need on a GPU or a CPU."""

from __future__ import annotations

import contextlib
import io
import json
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
from lightning_memtrain.tracing.device import Device

if TYPE_CHECKING:
    from lightning_memtrain.planning import Prediction

#: Exit code of a prediction that it does not fit.
DOES_NOT_FIT = 3


def show_prediction(
    target: str,
    *,
    device: str | None,
    variants: Sequence[str] = (),
    batch_size: int | None = None,
    world_size: int | None = None,
    strategy: str | None = None,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> int:
    """Print a prediction.

    Args:
        target: a recipe's name or folder, the file of a LightningCLI configuration, or ``file.py:Class`` for
            a LightningModule that brings its ``train_dataloader``.
        device: what ``memtrain devices`` lists, or ``"cpu"``; ``None`` for this machine's GPU, or its memory
            if it has none.
        variants: what to lay over the recipe, together.
        batch_size: samples in a batch; ``None`` for what recipe or class have.
        world_size: how many ranks the run has; ``None`` for one, or what the recipe has.
        strategy: what they exchange, as :func:`~lightning_memtrain.planning.predict` takes it.
        as_json: whether to print JSON instead of a table.
        overrides: options of LightningCLI, for a recipe.

    Returns:
        The exit code of the command: 0 if it fits, else :data:`DOES_NOT_FIT`.

    Raises:
        CommandError: if something of it is wrong, or cannot be predicted.
    """
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    refuse_small_batch(batch_size)
    named = split_class(target, variants, overrides)
    ranks = {"world_size": world_size, "strategy": strategy}
    try:
        gpu = Device.here() if device is None else Device.named(device)  # before anything slow
        with contextlib.redirect_stdout(io.StringIO()):  # the answer alone is printed
            if named is not None:
                _refuse_half_a_world(world_size, strategy)
                prediction = _of_class(*named, batch_size, gpu, ranks)
            else:
                configs = configurations_of(target, variants)
                prediction = _of_configurations(configs, batch_size, overrides, gpu, ranks)
    except (MisconfigurationException, OSError, RuntimeError, TypeError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    print(json.dumps(prediction.to_dict(), indent=2) if as_json else prediction)
    return 0 if prediction.fits else DOES_NOT_FIT


def _of_configurations(
    configs: Sequence[str],
    batch_size: int | None,
    overrides: Sequence[str],
    device: Device,
    ranks: dict[str, Any],
) -> Prediction:
    from lightning_memtrain.planning import predict

    with assembled(configs, batch_size, overrides) as (cli, trainer):
        return predict(cli.model, datamodule=cli.datamodule, trainer=trainer, device=device, **ranks)


def _of_class(
    file: Path, name: str, batch_size: int | None, device: Device, ranks: dict[str, Any]
) -> Prediction:
    from lightning_memtrain.planning import predict

    kind = class_of_file(file, name)
    if batch_size is None:
        return predict(kind, device=device, **ranks)
    refuse_fixed_batch_size(kind, file, name)

    class OfSize(kind):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__(batch_size=batch_size)

    OfSize.__name__ = name
    return predict(OfSize, device=device, **ranks)


def _refuse_half_a_world(world_size: int | None, strategy: str | None) -> None:
    """A class of a file has no trainer that could say the other half."""
    if world_size is not None and strategy is None:
        raise CommandError(f"`--devices {world_size}` needs `--strategy`: add `--strategy ddp` or `fsdp2`.")
    if strategy is not None and world_size is None:
        raise CommandError(f"`--strategy {strategy}` needs the number of devices: add `--devices 8`.")
