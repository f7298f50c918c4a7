"""What no device has tried yet; it may change or go."""

from lightning_memtrain.checkpointing.experimental.activation_offloading import (
    OffloadActivations,
    offloaded_activations,
)

__all__ = ["OffloadActivations", "offloaded_activations"]
