"""Random crops and flips of whole batches, each image's own for every epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_memtrain.core import ArgumentError


def generator_for(*key: int | str) -> torch.Generator:
    """A random number generator that depends on ``key`` only.

    Neither torch's global generator nor the order of calls matters, so that a run that was interrupted goes
    on with the same numbers, and so does a data loader's worker process.

    Args:
        *key: what the numbers are for, e.g. ``(seed, "order", epoch)``. Different keys give unrelated
            numbers.

    Returns:
        A new generator on the CPU.

    Example:
        >>> first, again, other = (torch.rand(1, generator=generator_for(0, "flip", e)) for e in (1, 1, 2))
        >>> bool(first == again), bool(first == other)
        (True, False)
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    # 63 bits: manual_seed reads larger ones as negative numbers.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class CropAndFlip:
    """The standard augmentation of CIFAR: a crop of the zero-padded image, mirrored half of the time.

    Args:
        padding: black pixels added on each side before a crop of the original size; at least 0.
        flip: whether to mirror left and right with probability 1/2.

    Raises:
        ArgumentError: if ``padding`` is negative.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ArgumentError(
                f"`CropAndFlip(padding)` must be at least 0 pixels, but got padding={self.padding}. "
                "Use 0 for no crop."
            )

    def draw(self, num_images: int, generator: torch.Generator) -> Tensor:
        """Random numbers for all images of an epoch at once, 3 bytes each.

        Args:
            num_images: how many images.
            generator: where the numbers come from.

        Returns:
            Shape ``(num_images, 3)``, uint8: top and left of the crop in ``[0, 2 * padding]``, and 1 to flip.
        """
        corners = torch.randint(0, 2 * self.padding + 1, (num_images, 2), generator=generator)
        flips = torch.randint(0, 2, (num_images, 1), generator=generator) * int(self.flip)
        return torch.cat([corners, flips], dim=1).to(torch.uint8)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip a batch, without a loop over its images.

        Args:
            images: shape ``(batch, channels, height, width)``, any dtype.
            draws: the rows of :meth:`draw` for these images.

        Returns:
            New images of the same shape and dtype.
        """
        batch, channels, height, width = images.shape
        top, left, flips = draws.long().unbind(1)
        pixels = torch.arange(width)
        rows = top[:, None] + torch.arange(height)
        columns = left[:, None] + torch.where(flips[:, None] == 1, width - 1 - pixels, pixels)
        padded = F.pad(images, [self.padding] * 4)
        padded_width = padded.shape[3]
        # One gather over flattened pixels; the channels share their image's positions.
        positions = (rows[:, :, None] * padded_width + columns[:, None, :]).view(batch, 1, -1)
        crops = padded.flatten(2).gather(2, positions.expand(-1, channels, -1))
        return crops.view(batch, channels, height, width)


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to numbers of about zero mean and unit variance.

    Args:
        images: shape ``(batch, channels, height, width)``, uint8.
        mean: of each channel, where the brightest pixel is 1.
        std: of each channel, on the same scale; above 0.

    Returns:
        ``(images / 255 - mean) / std`` as float32.
    """
    means = torch.tensor(mean).view(-1, 1, 1)
    stds = torch.tensor(std).view(-1, 1, 1)
    return images.float().div_(255).sub_(means).div_(stds)
