"""Low precision: weights, gradients, optimizer state and activations in fewer bits."""

from lightning_memtrain.precision.activations.activation_codec import ActivationCodec
from lightning_memtrain.precision.activations.compressed_activations import CompressedActivations
from lightning_memtrain.precision.low_precision import LowPrecision
from lightning_memtrain.precision.optimizers.grad_scaler import ScalerConfig
from lightning_memtrain.precision.optimizers.low_bit_adam import adam8bit, adamw4bit, adamw8bit
from lightning_memtrain.precision.optimizers.sgd8bit import SGD8bit

__all__ = [
    "ActivationCodec",
    "CompressedActivations",
    "LowPrecision",
    "SGD8bit",
    "ScalerConfig",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
]
