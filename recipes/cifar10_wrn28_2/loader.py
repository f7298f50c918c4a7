"""Batches of images held in memory, in an order that an interrupted run can take up again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

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


class EpochSampler(DistributedSampler[Any]):
    """A new order in every epoch, shared out among the processes of a distributed run.

    A ``DistributedSampler``, so Lightning calls ``set_epoch`` and puts no sampler of its own in its place,
    whatever ``Trainer(use_distributed_sampler)`` says. Every process sees equally many images; the fewer than
    ``num_replicas`` that are over are left out, others in each epoch.

    Args:
        dataset: its length counts.
        num_replicas: number of processes.
        rank: this process, in ``[0, num_replicas)``.
        seed: of the order.
    """

    def __init__(self, dataset: ImageSet, *, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.skip_once = 0  # images that the next iteration leaves out, because a resumed run has seen them

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        order = torch.randperm(size, generator=generator_for(self.seed, "order", self.epoch))
        mine = order[self.rank : self.num_samples * self.num_replicas : self.num_replicas]
        first, self.skip_once = self.skip_once, 0
        return iter((mine[first:] + self.epoch * size).tolist())


class ResumableLoader(DataLoader[Batch]):
    """A loader of whole batches that knows how far it has come in its epoch.

    Lightning saves the state of a loader that has one, and gives it back before it resumes.
    """

    _delivered = 0
    _resume_at = (0, 0)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator, of which only the first `next` runs anything: Lightning makes the iterator of a resumed
        # epoch before it tells the sampler which epoch that is.
        epoch, batches = self._resume_at
        self._resume_at = (0, 0)
        self._delivered = 0
        # `Trainer(overfit_batches)` puts a sampler without epochs in the place of ours.
        if isinstance(self.sampler, EpochSampler) and epoch == self.sampler.epoch:
            self._delivered = batches
            self.sampler.skip_once = batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Which epoch this is, and how many of its batches were delivered."""
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._delivered}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that were delivered, if the epoch is still the same."""
        self._resume_at = (state_dict["epoch"], state_dict["batches"])
