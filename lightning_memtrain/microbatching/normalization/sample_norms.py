"""What can stand in the place of batch norm and normalises each sample by itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from lightning_memtrain.compat.torch_private import BatchNorm
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_counts

_CURE = "Use e.g. num_groups=32, the paper's choice, or channels_per_group=4."


class SampleNorm(ABC):
    """A normalisation that sees one sample at a time, for :func:`replace_batchnorm`."""

    @abstractmethod
    def layer_for(self, batchnorm: BatchNorm) -> nn.Module:
        """The layer that takes the place of one batch norm layer.

        Args:
            batchnorm: knows its channels. It is left as it is; its parameters may be used.

        Returns:
            A new layer for inputs of the same shapes.
        """


@dataclass(frozen=True)
class GroupNorm(SampleNorm):
    r"""Group norm: each sample is normalised within groups of channels.

    With :math:`\mu_g` and :math:`\sigma_g^2` the mean and variance of the group's values in one sample, over
    channels and positions, :math:`y_c = \gamma_c (x_c - \mu_g) / \sqrt{\sigma_g^2 + \varepsilon} + \beta_c`.

    Each layer gets the largest number of groups that divides its channels and keeps the bound. It takes the
    batch norm layer's own weight and bias (so values, device, dtype and ``requires_grad``), ``eps`` and
    training mode, and has as many parameters: two per channel. Running statistics are dropped.

    A ``BatchNorm1d`` may get inputs of shape ``(batch, channels)``, where a group of one channel would hold
    one value, and its output would be the bias whatever the input. So there groups have at least two
    channels; for such inputs large groups keep more of the signal.

    Args:
        num_groups: most groups of one layer, at least 1; 1 is layer norm over channels and positions. By
            default 32, the paper's choice, unless ``channels_per_group`` is given.
        channels_per_group: fewest channels of a group, at least 1, in the place of ``num_groups``; a layer
            with fewer channels is one group. 1 is instance norm.

    Raises:
        ArgumentError: if one is below 1, or both are given.

    Example:
        >>> GroupNorm(channels_per_group=4).layer_for(nn.BatchNorm2d(48)).num_groups
        12

    References:
        Wu and He, Group Normalization, ECCV 2018, arXiv:1803.08494.
    """

    num_groups: int | None = None
    channels_per_group: int | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no groups."""
        given = {
            name: value
            for name in ("num_groups", "channels_per_group")
            if (value := getattr(self, name)) is not None
        }
        check_counts("GroupNorm", cure=_CURE, **given)
        if len(given) == 2:
            raise ArgumentError(
                "`GroupNorm(channels_per_group)` must be left out where `num_groups` is given, but got "
                f"num_groups={self.num_groups} and channels_per_group={self.channels_per_group}. {_CURE}"
            )

    def layer_for(self, batchnorm: BatchNorm) -> nn.GroupNorm:
        """Group norm with the parameters of a batch norm layer.

        Args:
            batchnorm: knows its channels.

        Returns:
            The layer.
        """
        channels = batchnorm.num_features
        fewest = self.channels_per_group or -(-channels // (self.num_groups or 32))
        if isinstance(batchnorm, nn.BatchNorm1d):
            fewest = max(fewest, 2)
        num_groups = max(
            (groups for groups in range(1, channels // fewest + 1) if channels % groups == 0), default=1
        )
        layer = nn.GroupNorm(num_groups, channels, eps=batchnorm.eps, affine=False)
        # The very parameters, so that an optimizer or a second owner keeps hold of them.
        layer.affine = batchnorm.affine
        layer.weight, layer.bias = batchnorm.weight, batchnorm.bias
        return layer.train(batchnorm.training)
