"""Low precision: weights, gradients, optimizer state and activations in fewer bits."""

from lightning_memtrain.precision.activations.activation_codec import ActivationCodec
from lightning_memtrain.precision.activations.activation_packing import ActivationPacking, PackedBytes
from lightning_memtrain.precision.activations.compressed_activations import CompressedActivations
from lightning_memtrain.precision.batch_casting import cast_batch
from lightning_memtrain.precision.low_precision import LowPrecision
from lightning_memtrain.precision.optimizers.bucketed_step import BucketedStep
from lightning_memtrain.precision.optimizers.grad_scaler import HalfGradScaler, ScalerConfig
from lightning_memtrain.precision.optimizers.low_bit_adam import adam8bit, adamw4bit, adamw8bit
from lightning_memtrain.precision.optimizers.sgd8bit import SGD8bit
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise, stochastic_round
from lightning_memtrain.precision.weights.converted_buffers import ConvertedBuffers, NamedBuffer
from lightning_memtrain.precision.weights.model_conversion import (
    convert_to_low_precision_,
    restore_float32_,
)

__all__ = [
    "ActivationCodec",
    "ActivationPacking",
    "BucketedStep",
    "CompressedActivations",
    "ConvertedBuffers",
    "HalfGradScaler",
    "LowPrecision",
    "NamedBuffer",
    "PackedBytes",
    "RoundingNoise",
    "SGD8bit",
    "ScalerConfig",
    "adam8bit",
    "adamw4bit",
    "adamw8bit",
    "cast_batch",
    "convert_to_low_precision_",
    "restore_float32_",
    "stochastic_round",
]
