"""Low precision: weights, gradients, optimizer state and activations in fewer bits."""

from lightning_memtrain.techniques.precision.activation_callback import CompressedActivations
from lightning_memtrain.techniques.precision.activation_codec import ActivationCodec
from lightning_memtrain.techniques.precision.adam import adam8bit, adamw4bit, adamw8bit
from lightning_memtrain.techniques.precision.plugin import LowPrecision
from lightning_memtrain.techniques.precision.scaler import ScalerConfig
from lightning_memtrain.techniques.precision.sgd8bit import SGD8bit

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
