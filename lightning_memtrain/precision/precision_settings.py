"""What a user asks of :class:`LowPrecision`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_memtrain.core.arguments.module_selectors import Selector
from lightning_memtrain.precision.activations.activation_codec import ActivationCodec
from lightning_memtrain.precision.optimizers.grad_scaler import ScalerConfig

PrecisionName = Literal["bf16-true", "16-true", "bf16-mixed", "16-mixed", "32-true"]
WeightRounding = Literal["stochastic", "nearest"]
Leave = Literal["half", "float32"]


@dataclass(frozen=True)
class PrecisionSettings:
    """The arguments of the plugin.

    Args:
        precision: of the computation, and of the weights where it is ``"true"``.
        weight_rounding: how weights in half precision are written.
        keep_in_fp32: layers in float32.
        scaler: scaling of the loss in float16.
        activations: how activations are kept.
        cast_targets: whether targets are cast.
        seed: of the noise for rounding.
        bucket_numel: weights that are float32 at a time during a step.
        leave: what the weights are after a run.
    """

    precision: PrecisionName
    weight_rounding: WeightRounding
    keep_in_fp32: Sequence[Selector]
    scaler: ScalerConfig | None
    activations: ActivationCodec | None
    cast_targets: bool
    seed: int
    bucket_numel: int | None
    leave: Leave = "half"

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights in half precision."""
        return torch.bfloat16 if self.precision == "bf16-true" else torch.float16

    @property
    def halves_weights(self) -> bool:
        """Whether weights are kept in half precision."""
        return self.precision in ("bf16-true", "16-true")

    @property
    def rounds_stochastically(self) -> bool:
        """Whether there are weights to be rounded stochastically."""
        return self.halves_weights and self.weight_rounding == "stochastic"
