"""Runs that cannot be split into microbatches, each with the reason and a way out."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature

from lightning_memtrain.core.devices.device_memory import free_device_bytes
from lightning_memtrain.microbatching import backward_sync, rank_agreement, training_loop
from lightning_memtrain.microbatching.automatic_size.size_choice import AutoSize, GivenSize
from lightning_memtrain.microbatching.splitting.chunks import FixedSplit


def validate_run(
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
            f"`Microbatching` must be given once, but got {num_given} callbacks of it. Leave one."
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


def validate_sync_each_chunk(trainer: Trainer, model: LightningModule) -> None:
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


def _refuse_auto(trainer: Trainer, model: LightningModule, size: AutoSize) -> None:
    device = trainer.strategy.root_device
    is_given = isinstance(size, GivenSize)
    if size.limit_bytes is None and free_device_bytes(device) is None and not is_given:
        raise MisconfigurationException(
            f'`Microbatching(microbatch_size="auto")` needs a limit on {device.type}, which does not tell '
            'what it has free, but got limit=None. Give one, e.g. limit="4GiB".'
        )
    if trainer.world_size == 1:
        return
    reason = None
    if rank_agreement.is_sharded(trainer.strategy):
        reason = f"{type(trainer.strategy).__name__}, which communicates in forward and backward"
    elif training_loop.uses_static_graph(trainer.strategy):
        reason = "static_graph=True, which communicates in every backward"
    elif rank_agreement.has_synchronized_batchnorm(model):
        reason = "SyncBatchNorm, which communicates in forward and backward"
    if reason is not None:
        asked = "recover=True" if is_given else 'microbatch_size="auto"'
        cure = "Leave `recover` out." if is_given else "Give num_microbatches or a size."
        raise MisconfigurationException(
            f"`Microbatching({asked})` must be able to stop a rank that is out of memory "
            f"while the others go on, but got {reason}: they would wait forever. {cure}"
        )
