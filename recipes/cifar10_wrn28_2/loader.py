"""Batches of images held in memory, in an order that an interrupted run can take up again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_memtrain.recipes.resumable import EpochSampler

from .augment import CropAndFlip, generator_for, normalize

Batch = tuple[Tensor, Tensor]


class ImageSet(Dataset[Batch]):
    """Images and labels in memory, fetched, augmented and normalised a batch at a time.

    Index ``epoch * len(self) + i`` is image ``i`` as it looks in that epoch. The epoch travels in the index
    so that a worker process knows it too, and so that an image's augmentation depends on nothing but the
    seed, the epoch and the image: not on the batch size, the number of processes or what was drawn before.

    Args:
        images: shape ``(n, channels, height, width)``, uint8.
        labels: shape ``(n,)``, int64.
        mean: per channel, where the brightest pixel is 1.
        std: per channel, on the same scale.
        augmentation: random crops and flips, or ``None`` for the images as they are.
        seed: of the augmentation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: CropAndFlip | None = None,
        seed: int = 0,
    ) -> None:
        self.images = images
        self.labels = labels
        self._mean = mean
        self._std = std
        self._augmentation = augmentation
        self._seed = seed
        self._draws: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """What PyTorch's loaders call with a whole batch; all of its indices are of one epoch."""
        epoch = indices[0] // len(self)
        rows = torch.tensor(indices) - epoch * len(self)
        images = self.images[rows]
        if self._augmentation is not None:
            if self._draws[0] != epoch:
                generator = generator_for(self._seed, "augmentation", epoch)
                self._draws = (epoch, self._augmentation.draw(len(self), generator))
            images = self._augmentation.apply(images, self._draws[1][rows])
        return normalize(images, self._mean, self._std), self.labels[rows]


class ImageOrder(EpochSampler):
    """The images of an :class:`ImageSet` in a new order every epoch, as the indices that it takes."""

    def order(self) -> list[int]:
        """The indices of all images as they look in the epoch ``self.epoch``."""
        size = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(size, generator=generator_for(self.seed, "order", self.epoch))
        return (order + self.epoch * size).tolist()
