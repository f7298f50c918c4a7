"""Precision: weights, gradients, optimizer state and activations in fewer bits."""

from lightning_memtrain.techniques.precision.activation_callback import CompressedActivations
from lightning_memtrain.techniques.precision.activation_codec import ActivationCodec

__all__ = ["ActivationCodec", "CompressedActivations"]
