"""Low precision: weights, gradients and optimizer state in half the bytes or less."""

from lightning_memtrain.techniques.precision.adam import adam8bit, adamw4bit, adamw8bit
from lightning_memtrain.techniques.precision.plugin import LowPrecision
from lightning_memtrain.techniques.precision.scaler import ScalerConfig
from lightning_memtrain.techniques.precision.sgd8bit import SGD8bit

__all__ = ["LowPrecision", "SGD8bit", "ScalerConfig", "adam8bit", "adamw4bit", "adamw8bit"]
