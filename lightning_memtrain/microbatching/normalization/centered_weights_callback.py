"""The callback that keeps the weights of filters centred."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.compat.torch_private import ConvNd
from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.core.arguments.module_selectors import Selector, as_selectors
from lightning_memtrain.microbatching.normalization.centered_weights import (
    SELECTORS_CURE,
    center,
    check_length,
    layers_to_center,
)


class CenteredWeights(Callback):
    r"""Keeps the sum of each filter's weights at zero, for networks whose norms see one sample at a time.

    Each filter's mean is subtracted before the first step and at the end of every batch in which an optimizer
    has stepped, :math:`w \leftarrow w - \bar w`. No tensor is kept for it, and forward and backward are those
    of plain convolutions, so that microbatches of any size stay exact. It has no parameters of its own and
    takes away one degree of freedom per filter. What a checkpoint holds is the network that was trained: it
    needs no callback to be used.

    Pretrained weights are changed by it: each filter loses its mean at the start, and with ``length`` its
    scale.

    Args:
        layers: paths, patterns of paths, class names or classes of convolutions, transposed ones included. By
            default all that are trained, with more than 4 input channels and more than one per filter: so not
            what looks at images, nor depthwise ones, where the mean is most of what a filter does.
        length: Euclidean norm that each filter is kept at, too, above 0; 1 is that of standardised weights.
            ``None`` leaves it to training.

    Raises:
        ArgumentError: if ``layers`` is no list of these, or ``length`` no number above 0. When fit starts, if
            one of ``layers`` means no convolution, or one whose weights cannot be centred: computed from
            other parameters, lazy, frozen, or divided among ranks by FSDP.

    Example:
        >>> callback = CenteredWeights(layers=["encoder.*"])

    References:
        Qiao et al., Micro-Batch Training with Batch-Channel Normalization and Weight Standardization, 2019,
        arXiv:1903.10520. Huang et al., Centered Weight Normalization in Accelerating Training of Deep Neural
        Networks, ICCV 2017. Yong et al., Gradient Centralization, ECCV 2020, arXiv:2004.01461.
    """

    def __init__(self, layers: Sequence[Selector] | None = None, length: float | None = None) -> None:
        super().__init__()
        if layers is not None:
            layers = as_selectors("CenteredWeights", SELECTORS_CURE, layers=layers)
        check_length("CenteredWeights", length)
        self._selectors = layers
        self._length = length
        self._layers: dict[str, ConvNd] = {}
        self._is_restored = False
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers: the model is complete by now."""
        refuse_mix("CenteredWeights", trainer)
        self._layers = layers_to_center("CenteredWeights", pl_module, self._selectors)
        if not self._layers:
            warnings.warn(
                "`CenteredWeights` expects a model with convolutions of more than 4 channels that are "
                f"trained, but {type(pl_module).__name__} has none. Leave it out, or name others in "
                "`layers`.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Center the first weights; those of a checkpoint of this callback are left to the bit."""
        self._step = trainer.global_step
        if not self._is_restored:
            center(self._layers.values(), self._length)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Center again if the optimizer has stepped."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            center(self._layers.values(), self._length)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Another fit may begin with other weights."""
        self._layers, self._is_restored = {}, False

    def state_dict(self) -> dict[str, Any]:
        """That the weights of this checkpoint are centred."""
        return {"centered": True}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._is_restored = state_dict["centered"]
