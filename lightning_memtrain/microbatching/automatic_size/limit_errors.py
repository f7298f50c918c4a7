"""Errors of a size that cannot be found, and of a limit that cannot be kept, with the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import Category, CategoryBytes, format_bytes

_WORDS = {
    Category.HELD: "what is held beside the step",
    Category.INPUTS: "the batch and other inputs",
    Category.OPTIMIZER_STATE: "optimizer state",
    Category.TEMPORARY: "temporary tensors",
    Category.GATHERED_WEIGHTS: "gathered weights",
    Category.UNSHARDED_GRADIENTS: "unsharded gradients",
    Category.BUCKETS: "buckets of DDP",
}


def uneven_chunks_error(num_chunks: int, batch_size: int, num_samples: int) -> MisconfigurationException:
    """Of a ``split_fn`` whose first chunk is not the largest of even ones.

    Args:
        num_chunks: what was asked for.
        batch_size: samples of the batch.
        num_samples: samples of the first chunk.

    Returns:
        The error.
    """
    return MisconfigurationException(
        '`Microbatching(microbatch_size="auto")` needs chunks of even size, but asked for '
        f"{num_chunks} chunks of {batch_size} samples `split_fn` returned a first one with {num_samples}. "
        "With this `split_fn`, use `num_microbatches` instead."
    )


def limit_error(
    limit_bytes: int,
    needed_bytes: int,
    held: CategoryBytes,
    coming_bytes: int,
    unseen: Mapping[str, int],
    *,
    at_least: bool,
) -> MisconfigurationException:
    """Of a limit that a single sample at a time does not keep.

    Args:
        limit_bytes: what may be used.
        needed_bytes: what is needed.
        held: what was counted of that.
        coming_bytes: optimizer state that is still to be made.
        unseen: what there is beside, in words.
        at_least: whether it may be more that is needed.

    Returns:
        The error.
    """
    needed = f"{'at least ' if at_least else ''}{format_bytes(needed_bytes)}"
    return MisconfigurationException(
        f"`Microbatching(limit)` must have room for one sample at a time, which takes {needed} with "
        f"{_listed(held, coming_bytes, unseen)}, but got limit={format_bytes(limit_bytes)}. Raise it, or "
        "make weights, gradients or optimizer state smaller: microbatching only shrinks activations."
    )


def update_limit_error(
    limit_bytes: int,
    needed_bytes: int,
    held: CategoryBytes,
    coming_bytes: int,
    over_bytes: int,
    unseen: Mapping[str, int] | None = None,
    *,
    at_least: bool = False,
) -> MisconfigurationException:
    """Of a limit that the step of the optimizer does not keep.

    Args:
        limit_bytes: what may be used.
        needed_bytes: what is needed.
        held: what was counted of that before the step.
        coming_bytes: optimizer state that the coming steps make.
        over_bytes: all that they hold at most beyond what there was before.
        unseen: what there is beside, in words.
        at_least: whether it may be more that is needed.

    Returns:
        The error.
    """
    temporary_bytes = over_bytes - coming_bytes
    temporary = f", {format_bytes(temporary_bytes)} of temporary tensors" if temporary_bytes else ""
    needed = f"{'at least ' if at_least else ''}{format_bytes(needed_bytes)}"
    return MisconfigurationException(
        f"`Microbatching(limit)` must have room for the step of the optimizer, which takes {needed} with "
        f"{_listed(held, coming_bytes, unseen)}{temporary}, but got limit={format_bytes(limit_bytes)}. No "
        "size of microbatches changes that. Raise it, let the optimizer step one parameter at a time "
        "(foreach=False) or keep less state, or make weights smaller."
    )


def other_limit_error() -> MisconfigurationException:
    """Of a limit of another technique's that this rank keeps and another one does not."""
    return MisconfigurationException(
        '`Microbatching(microbatch_size="auto")` must find a size with which every rank keeps the limits of '
        "other techniques, but another rank cannot keep one with a single sample at a time; its error says "
        "which and what it needs. Raise that limit."
    )


def _listed(held: CategoryBytes, coming_bytes: int, unseen: Mapping[str, int] | None = None) -> str:
    parts = {_WORDS.get(category, category.value): num_bytes for category, num_bytes in held.items()}
    parts["optimizer state"] += coming_bytes
    parts.update(unseen or {})
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return ", ".join(f"{format_bytes(num_bytes)} of {name}" for name, num_bytes in largest_first if num_bytes)
