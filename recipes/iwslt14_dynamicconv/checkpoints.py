"""Trained models out of a run's checkpoints, and the mean of several."""

from __future__ import annotations

import inspect
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_memtrain.cli.checkpoint_file import read_checkpoint
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.sparsity import dense_state_dict

from .module import VOCABULARY, TranslationModule


def add_options(parser: ArgumentParser) -> None:
    """Declare which checkpoints of a run are used.

    Args:
        parser: of a command.
    """
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=Path, metavar="FILE", help="this checkpoint, not the last ones")
    which.add_argument(
        "--average",
        type=int,
        default=10,
        metavar="N",
        help="the mean of the last N; default: 10, as published",
    )


def load_trained(folder: Path, options: Namespace) -> TranslationModule:
    """Load the model of a run.

    Args:
        folder: of the run.
        options: see :func:`add_options`.

    Returns:
        The model, in evaluation mode.

    Raises:
        CommandError: if there is no checkpoint, or it is no translation model's.
    """
    if options.checkpoint is not None:
        if not options.checkpoint.is_file():
            raise CommandError(f"there is no checkpoint `{options.checkpoint}`.", exit_code=1)
        return load_mean([options.checkpoint])
    if options.average < 1:
        raise CommandError(f"--average must be at least 1, but is {options.average}.")
    return load_mean(last_checkpoints(folder, options.average))


def last_checkpoints(folder: Path, number: int) -> list[Path]:
    """The checkpoints of a run with most optimizer steps, one for each number of steps.

    Args:
        folder: of the run.
        number: how many at most.

    Returns:
        Their paths.

    Raises:
        CommandError: if there is none.
    """
    paths = sorted(folder.glob("checkpoints/*.ckpt"))
    by_steps = {int(read_checkpoint(path)["global_step"]): path for path in paths}
    if not by_steps:
        raise CommandError(
            f"there is no checkpoint in `{folder / 'checkpoints'}`: train until the first one is saved, "
            "after an epoch or at Ctrl-C.",
            exit_code=1,
        )
    return [by_steps[steps] for steps in sorted(by_steps)[-number:]]


def load_mean(paths: Sequence[Path]) -> TranslationModule:
    """Load the mean of the weights of several checkpoints of one run.

    Args:
        paths: the checkpoints, at least one.

    Returns:
        The model with the mean of each parameter, summed in float32, in evaluation mode.

    Raises:
        CommandError: if one is no checkpoint of a translation model, or they have different dictionaries.
    """
    states: list[dict[str, Tensor]] = []
    vocabulary = None
    for path in paths:
        checkpoint = read_checkpoint(path)
        if vocabulary not in (None, checkpoint.get(VOCABULARY)) or VOCABULARY not in checkpoint:
            raise CommandError(
                f"`{path}` is not of the translation model that the other checkpoints are of.", exit_code=1
            )
        vocabulary = checkpoint[VOCABULARY]
        states.append(checkpoint["state_dict"])
    module = _new_module(checkpoint)
    sums: dict[str, Tensor] = {}
    for state in states:
        # Sparse layers store other entries in each checkpoint.
        for name, tensor in dense_state_dict(state, module).items():
            wide = tensor.float()
            sums[name] = sums[name] + wide if name in sums else wide
    module.load_state_dict({name: tensor / len(paths) for name, tensor in sums.items()})
    return module.float().eval()


def _new_module(checkpoint: dict[str, Any]) -> TranslationModule:
    """A model with the arguments and the words of a checkpoint, but without its weights.

    Lightning's ``load_from_checkpoint`` imports and calls what is named in the hyper-parameters, in releases
    before 2.6.6 whatever that is (GHSA-qqmf-gpg7-g8gw). Here it is a class that has been imported already.
    """
    saved = checkpoint.get("hyper_parameters", {})
    kind = _imported_class(str(saved.get("_class_path", TranslationModule.__name__)))
    arguments = inspect.signature(kind).parameters.keys() - {"model", "optimizer"}
    module = kind(**{name: value for name, value in saved.items() if name in arguments})
    module.on_load_checkpoint(checkpoint)
    return module


def _imported_class(path: str) -> type[TranslationModule]:
    """The model's class, which a copy of the recipe has under another name, or a class that extends it."""

    def below(base: type[TranslationModule]) -> Iterator[type[TranslationModule]]:
        for subclass in base.__subclasses__():
            yield subclass
            yield from below(subclass)

    if path.rpartition(".")[2] == TranslationModule.__name__:
        return TranslationModule
    for subclass in below(TranslationModule):
        if path == f"{subclass.__module__}.{subclass.__qualname__}":
            return subclass
    raise CommandError(
        f"the checkpoint is of a `{path}`, which is no `TranslationModule` that the run's code has imported, "
        "and nothing that a checkpoint names is imported. Import its module in the recipe's `module.py`.",
        exit_code=1,
    )
