"""The largest holders of memory, and the techniques that make each smaller."""

from __future__ import annotations

from lightning_memtrain.core import ArgumentError, Category, MemoryBreakdown, ModuleMemory
from lightning_memtrain.report.memory_report import LargestHolder

_ADVICE = {
    Category.PARAMETERS: "store them in lower precision, or train them sparse",
    Category.GRADIENTS: "release each gradient once its parameter is updated (optimizer step in backward), "
    "store them in lower precision, or train the weights sparse",
    Category.OPTIMIZER_STATE: "store it in lower precision, use an optimizer with less state per weight, "
    "or train the weights sparse",
    Category.ACTIVATIONS: "split the batch into microbatches, recompute activations (checkpointing), "
    "compute in lower precision, or use a smaller batch",
    Category.BUFFERS: "keep constants out of the model, or store them in lower precision",
    Category.HELD: "let go of copies and second models, or keep them on another device or in half precision",
    Category.INPUTS: "use a smaller batch, or send inputs to the device in a smaller data type",
    Category.TEMPORARY: "split the batch into microbatches or use a smaller batch, and look for large "
    "intermediate results in the loss or the metrics",
    Category.GATHERED_WEIGHTS: "shard smaller modules (fully_shard on each block), or gather in lower "
    "precision",
    Category.UNSHARDED_GRADIENTS: "shard smaller modules (fully_shard on each block), reduce in lower "
    "precision, or let every backward reduce",
    Category.BUCKETS: "let gradients lie in them (DDPStrategy(gradient_as_bucket_view=True)), or shard "
    "gradients (FSDP2)",
    Category.WORKSPACE: "split the batch into microbatches or use a smaller batch: operators ask for less "
    "scratch memory on smaller inputs",
}
_MODULE_ADVICE = (
    "recompute this module's activations (checkpointing), split the batch into microbatches, "
    "or use a smaller batch"
)


def largest_holders(breakdown: MemoryBreakdown, num_holders: int = 3) -> tuple[LargestHolder, ...]:
    """Name what holds most memory at the peak, and what would help.

    Candidates are the categories, and the modules' activations one by one. A module's activations are a
    part of the category's, so the holders are not meant to be added up.

    Args:
        breakdown: a step's bytes.
        num_holders: the most holders to name, at least 1.

    Returns:
        At most ``num_holders`` holders, largest first; only those that hold anything.

    Raises:
        ArgumentError: if ``num_holders`` is below 1.

    Example:
        >>> from lightning_memtrain.core import CategoryBytes
        >>> at_peak = CategoryBytes({"parameters": 4, "activations": 24})
        >>> breakdown = MemoryBreakdown(device="cpu", at_peak=at_peak, maxima=at_peak)
        >>> [(holder.name, holder.num_bytes) for holder in largest_holders(breakdown)]
        [('activations', 24), ('parameters', 4)]
    """
    if num_holders < 1:
        raise ArgumentError(
            f"`largest_holders(num_holders)` must be at least 1, but got num_holders={num_holders}. "
            f"Ask for the number of holders to name."
        )
    holders = [
        LargestHolder(category.value.replace("_", " "), num_bytes, _ADVICE[category])
        for category, num_bytes in breakdown.at_peak.items()
    ]
    holders += [
        LargestHolder(_module_name(row), row.produced_bytes, _MODULE_ADVICE) for row in breakdown.modules
    ]
    # The sort is stable: of equals, the category comes before the one module that holds all of it.
    largest = sorted(holders, key=lambda holder: -holder.num_bytes)
    return tuple(holder for holder in largest[:num_holders] if holder.num_bytes > 0)


def _module_name(row: ModuleMemory) -> str:
    return f"activations of {row.name} ({row.type_name})" if row.name else f"activations of {row.type_name}"
