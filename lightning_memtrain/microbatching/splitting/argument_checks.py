"""Checks of the arguments that say how a batch is split, for all who take them."""

from __future__ import annotations

from typing import Any, get_args

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_choices, check_functions, is_whole
from lightning_memtrain.microbatching.splitting.chunks import LossReduction, SplitFn, WeightFn


def check_count(owner: str, name: str, value: Any, otherwise: str = "", *, optional: bool = True) -> None:
    """Refuse what is no count.

    Args:
        owner: what the user has called.
        name: of the argument.
        value: of the argument; ``None`` if it was not given.
        otherwise: what else it may be, for the error.
        optional: whether it may be left out.

    Raises:
        ArgumentError: unless it is an integer of at least 1.
    """
    if value is None and optional:
        return
    if not is_whole(value) or value < 1:
        raise ArgumentError(
            f"`{owner}({name})` must be an integer of at least 1{otherwise}, but got {name}={value!r}. "
            "Use a positive whole number."
        )


def check_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of some words.

    Args:
        owner: what the user has called.
        name: of the argument.
        value: of the argument.
        choices: the words.

    Raises:
        ArgumentError: unless it is one of them.
    """
    check_choices(owner, choices, **{name: value})


def check_splitting(
    owner: str,
    num_microbatches: Any,
    microbatch_size: Any,
    loss_reduction: LossReduction,
    weight_fn: WeightFn | None,
    split_fn: SplitFn | None,
    *,
    finds_size: bool = False,
) -> None:
    """Refuse arguments that do not say how a batch is split and its losses are added up.

    Args:
        owner: what the user has called.
        num_microbatches: chunks per batch.
        microbatch_size: most samples per chunk.
        loss_reduction: of the loss.
        weight_fn: weighs means.
        split_fn: splits the batch.
        finds_size: whether ``"auto"`` is possible.

    Raises:
        ArgumentError: naming the argument.
    """
    if (num_microbatches is None) == (microbatch_size is None):
        raise ArgumentError(
            f"`{owner}` needs either `num_microbatches` or `microbatch_size`, but got "
            f"num_microbatches={num_microbatches} and microbatch_size={microbatch_size}. "
            "Give one of them" + ('; microbatch_size="auto" finds the size by itself.' if finds_size else ".")
        )
    for name, count in (("num_microbatches", num_microbatches), ("microbatch_size", microbatch_size)):
        if not (finds_size and count == "auto"):
            check_count(owner, name, count, ' or "auto"' if finds_size else "")
    check_choice(owner, "loss_reduction", loss_reduction, get_args(LossReduction))
    check_functions(owner, optional=True, weight_fn=weight_fn, split_fn=split_fn)
    if weight_fn is not None and loss_reduction == "sum":
        raise ArgumentError(
            f"`{owner}(weight_fn)` weighs means, but got loss_reduction='sum', where losses are "
            "added as they are. Leave one of them out."
        )
