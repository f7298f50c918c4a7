"""Runs that cannot be split into microbatches, each with the reason and a way out."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_memtrain.core import Category, CategoryBytes, format_bytes
from lightning_memtrain.microbatching import backward_sync, training_loop
from lightning_memtrain.microbatching.automatic_size.size_choice import (
    AutoSize,
    FixedSplit,
    free_device_bytes,
)


def refuse_run(
    trainer: Trainer, model: LightningModule, size: AutoSize | FixedSplit, num_given: int = 1
) -> None:
    """Refuse before anything runs what would go wrong later.

    Args:
        trainer: the trainer that is about to fit.
        model: its module.
        size: how many samples at a time.
        num_given: how many times microbatching was asked for.

    Raises:
        MisconfigurationException: if the run cannot be split.
    """
    if num_given > 1:
        raise MisconfigurationException(
            "`Microbatching` must be given once, but got it twice, as a callback or a strategy. "
            "Remove one of them."
        )
    if not model.automatic_optimization:
        raise MisconfigurationException(
            "`Microbatching` needs automatic optimization, but got a model with "
            "automatic_optimization=False, whose `training_step` calls backward and the optimizer itself. "
            "Split the batch in that method, or return the loss and let Lightning optimize."
        )
    if is_param_in_hook_signature(model.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "`Microbatching` needs `training_step(batch, batch_idx)`, but got "
            "`training_step(dataloader_iter)`, which fetches batches itself so that they cannot be split. "
            "Take the batch as an argument."
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise MisconfigurationException(
            f"`Microbatching` needs a strategy that leaves backward to Lightning, but got "
            f"{type(trainer.strategy).__name__}, which splits batches itself. Use its own setting, e.g. "
            "DeepSpeed's train_micro_batch_size_per_gpu."
        )
    if isinstance(size, AutoSize):
        _refuse_auto(trainer, model, size)


def refuse_to_wait(trainer: Trainer, model: LightningModule) -> None:
    """Refuse ``sync_each_chunk=False`` where it has no effect.

    Args:
        trainer: the trainer that fits.
        model: its module, sharded by now.

    Raises:
        MisconfigurationException: if no module is sharded by FSDP2.
    """
    if not backward_sync.fully_sharded_modules(model):
        raise MisconfigurationException(
            "`Microbatching(sync_each_chunk=False)` needs a model that `fully_shard` was applied to "
            f"(FSDP2, `ModelParallelStrategy`), but got none with {type(trainer.strategy).__name__}. Leave "
            "it out: under ddp gradients are reduced once per batch in any case."
        )


def refuse_left_out(trainer: Trainer, num_left_out: int) -> None:
    """Refuse to leave chunks out where the gradients of the others are taken up already.

    Args:
        trainer: the trainer that fits.
        num_left_out: chunks for which ``training_step`` returned ``None``, not all of the batch.

    Raises:
        MisconfigurationException: if a callback steps during backward.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if getattr(callback, "steps_in_backward", False):
            raise MisconfigurationException(
                f"`Microbatching` beside `{type(callback).__name__}` needs a loss of every microbatch, since "
                "the optimizer has taken up the gradients of some before it is known how much each is to "
                f"count, but got `None` from `training_step` for {num_left_out}. Return a loss of zero that "
                "depends on the parameters, and leave samples out by `weight_fn`."
            )


def _refuse_auto(trainer: Trainer, model: LightningModule, size: AutoSize) -> None:
    device = trainer.strategy.root_device
    if size.limit_bytes is None and free_device_bytes(device) is None:
        raise MisconfigurationException(
            f'`Microbatching(microbatch_size="auto")` needs a limit on {device.type}, which does not tell '
            'what it has free, but got limit=None. Give one, e.g. limit="4GiB".'
        )
    if trainer.world_size == 1:
        return
    reason = None
    if backward_sync.is_sharded(trainer.strategy):
        reason = f"{type(trainer.strategy).__name__}, which communicates in forward and backward"
    elif training_loop.uses_static_graph(trainer.strategy):
        reason = "static_graph=True, which communicates in every backward"
    elif backward_sync.has_synchronized_batchnorm(model):
        reason = "SyncBatchNorm, which communicates in forward and backward"
    if reason is not None:
        raise MisconfigurationException(
            '`Microbatching(microbatch_size="auto")` must be able to stop a rank that is out of memory '
            f"while the others go on, but got {reason}: they would wait forever. "
            "Give num_microbatches or a size."
        )


def uneven_chunks(num_chunks: int, batch_size: int, num_samples: int) -> MisconfigurationException:
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


_WORDS = {
    Category.INPUTS: "the batch and other inputs",
    Category.OPTIMIZER_STATE: "optimizer state",
    Category.TEMPORARY: "temporary tensors",
    Category.GATHERED_WEIGHTS: "gathered weights",
    Category.UNSHARDED_GRADIENTS: "unsharded gradients",
    Category.BUCKETS: "buckets of DDP",
}


def limit_refused(
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


def update_refused(
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


def limit_out_of_reach_elsewhere() -> MisconfigurationException:
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
