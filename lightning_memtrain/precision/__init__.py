"""Low precision: weights, gradients, optimizer state and activations in fewer bits."""

from lightning_memtrain.precision.activation_callback import CompressedActivations
from lightning_memtrain.precision.activation_codec import ActivationCodec
from lightning_memtrain.precision.adam import adam8bit, adamw4bit, adamw8bit
from lightning_memtrain.precision.plugin import LowPrecision
from lightning_memtrain.precision.scaler import ScalerConfig
from lightning_memtrain.precision.sgd8bit import SGD8bit

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
