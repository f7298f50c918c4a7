"""The wide residual network of Zagoruyko and Komodakis for small images."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memtrain.core import ArgumentError


class PreactivationBlock(nn.Module):
    """Batch norm, ReLU and 3x3 convolution, twice, added to a shortcut.

    Where the block keeps its width, the shortcut is the input itself, *not* activated. Where the width
    changes, the shortcut is a 1x1 convolution of the activated input, which both branches then share.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the first convolution and of the shortcut convolution.
        dropout: probability of zeroing an activation between the two convolutions, in ``[0, 1)``.

    Raises:
        ArgumentError: if the block has a stride but keeps its width: the identity shortcut cannot shrink.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        keeps_width = in_channels == out_channels
        if keeps_width and stride != 1:
            raise ArgumentError(
                "`PreactivationBlock(stride)` must be 1 where `in_channels == out_channels`, because the "
                f"identity shortcut keeps the image size, but got "
                f"stride={stride} with {in_channels} channels. Use a stride of 1, or change the width."
            )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        # Dropout with probability 0 would still cost a module call and, on some devices, a mask.
        self.dropout = nn.Dropout(dropout) if dropout > 0 else None
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.shortcut = (
            None if keeps_width else nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus shortcut.

        Args:
            x: images of shape ``(batch, in_channels, height, width)``.

        Returns:
            Images of shape ``(batch, out_channels, height / stride, width / stride)``.
        """
        activated = self.relu1(self.bn1(x))
        residual = self.relu2(self.bn2(self.conv1(activated)))
        if self.dropout is not None:
            residual = self.dropout(residual)
        residual = self.conv2(residual)
        output: Tensor = residual + (x if self.shortcut is None else self.shortcut(activated))
        return output


class WideResNet(nn.Module):
    r"""WRN-`depth`-`widen_factor` for 32x32 images.

    A 3x3 convolution to 16 channels, three groups of :math:`n` blocks with :math:`16k`, :math:`32k` and
    :math:`64k` channels (:math:`k` the widen factor) that halve the image between them, a last batch norm
    and ReLU, the mean over the image, and a linear layer. A block has two convolutions, hence
    :math:`\text{depth} = 6n + 4`.

    Convolutions start from He's normal initialisation over their outputs, as in the authors' code; the
    linear layer's bias starts at 0.

    Args:
        depth: number of convolutions, shortcuts on a widening block included: 10, 16, 22, 28, 34, 40, ...
        widen_factor: :math:`k`, at least 1.
        num_classes: length of the output, at least 1.
        dropout: probability of zeroing an activation inside a block, in ``[0, 1)``. The paper uses 0.3 for
            its widest networks on CIFAR and 0 otherwise.

    Raises:
        ArgumentError: if an argument lies outside its range.

    Example:
        >>> sum(parameter.numel() for parameter in WideResNet(depth=28, widen_factor=2).parameters())
        1467610

    References:
        Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016, arXiv:1605.07146.
        He et al., Delving Deep into Rectifiers, ICCV 2015, arXiv:1502.01852.
    """

    def __init__(
        self, depth: int = 28, widen_factor: int = 2, num_classes: int = 10, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            below = max(10, depth - (depth - 4) % 6)
            raise ArgumentError(
                f"`WideResNet(depth)` must be 6n + 4 with n >= 1 (10, 16, 22, 28, ...), but got "
                f"depth={depth}. Use {below} or {below + 6}."
            )
        for name, value in (("widen_factor", widen_factor), ("num_classes", num_classes)):
            if value < 1:
                raise ArgumentError(f"`WideResNet({name})` must be at least 1, but got {name}={value}.")
        if not 0 <= dropout < 1:
            raise ArgumentError(
                f"`WideResNet(dropout)` must be a probability in [0, 1), but got dropout={dropout}. "
                "Use 0 for none; the paper uses 0.3."
            )
        blocks_per_group = (depth - 4) // 6
        widths = (16, 16 * widen_factor, 32 * widen_factor, 64 * widen_factor)

        def group(index: int) -> nn.Sequential:
            first = PreactivationBlock(
                widths[index], widths[index + 1], stride=1 if index == 0 else 2, dropout=dropout
            )
            rest = (
                PreactivationBlock(widths[index + 1], widths[index + 1], dropout=dropout)
                for _ in range(blocks_per_group - 1)
            )
            return nn.Sequential(first, *rest)

        self.conv = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.groups = nn.Sequential(OrderedDict((f"group{i + 1}", group(i)) for i in range(3)))
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(widths[3], num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weights from torch's global random numbers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        self.fc.reset_parameters()
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores.

        Args:
            images: normalised images of shape ``(batch, 3, height, width)``; the paper's are 32x32.

        Returns:
            Unnormalised log-probabilities of shape ``(batch, num_classes)``.
        """
        features = self.relu(self.bn(self.groups(self.conv(images))))
        scores: Tensor = self.fc(F.adaptive_avg_pool2d(features, 1).flatten(1))
        return scores
