"""Data modules: CIFAR-10, and handwritten digits that need no download."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.recipes.download import data_places, download, find_or_download, unpack
from lightning_memtrain.recipes.resumable import ResumableLoader

from .augment import CropAndFlip, generator_for
from .batches import (
    FOLDER,
    TEST_FILES,
    TRAIN_FILES,
    find_folder,
    read_batch,
)
from .loader import Batch, ImageOrder, ImageSet

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"


class LabelledImages(NamedTuple):
    """Images of shape ``(n, 3, 32, 32)``, uint8, and their ``n`` labels, int64."""

    images: Tensor
    labels: Tensor


class ImageDataModule(pl.LightningDataModule):
    """Labelled images that fit into memory, in batches.

    Subclasses read the images; this class holds some of the training images out for validation, and makes
    loaders whose order and augmentation depend on the seed and the epoch alone. A last training batch that is
    not full is left out, so that every step needs the same memory.

    Args:
        batch_size: images per step and process, at least 1.
        num_val_images: training images held out for validation; 0 for none (and no validation).
        num_workers: processes that prepare batches; 0 prepares them in the training process, which is fast
            enough for small images.
        seed: of the hold-out, the order and the augmentation.

    Raises:
        ArgumentError: if an argument lies outside its range.
    """

    mean: Sequence[float]
    std: Sequence[float]
    augmentation: CropAndFlip

    def __init__(self, batch_size: int, num_val_images: int, num_workers: int, seed: int) -> None:
        super().__init__()
        name = type(self).__name__
        if batch_size < 1:
            raise ArgumentError(f"`{name}(batch_size)` must be at least 1, but got batch_size={batch_size}.")
        for argument, value in (
            ("num_val_images", num_val_images),
            ("num_workers", num_workers),
            ("seed", seed),
        ):
            if value < 0:
                raise ArgumentError(f"`{name}({argument})` must be at least 0, but got {argument}={value}.")
        self.batch_size = batch_size
        self.num_val_images = num_val_images
        self.num_workers = num_workers
        self.seed = seed
        self._sets: dict[str, ImageSet] = {}
        self._train_loader: ResumableLoader | None = None
        self._progress: dict[str, int] = {}

    def read(self, train: bool) -> LabelledImages:
        """All training images, or all test images.

        Args:
            train: which of the two.

        Returns:
            The images and their labels.
        """
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read what the stage needs and has not been read.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ArgumentError: if too few training images are left for one batch in each process.
        """
        if stage in ("fit", "validate") and "train" not in self._sets:
            images, labels = self.read(train=True)
            num_train = len(images) - self.num_val_images
            num_processes = self.trainer.world_size if self.trainer else 1
            if num_train < self.batch_size * num_processes:
                raise ArgumentError(
                    f"`{type(self).__name__}` must have at least one full batch for each process, but "
                    f"batch_size={self.batch_size} and num_val_images={self.num_val_images} were "
                    f"asked of {len(images)} training images and {num_processes} process(es). "
                    "Make one of them smaller."
                )
            order = torch.randperm(len(images), generator=generator_for(self.seed, "hold-out"))
            train_rows, val_rows = order[:num_train], order[num_train:]
            self._sets["train"] = self._image_set(images[train_rows], labels[train_rows], self.augmentation)
            self._sets["val"] = self._image_set(images[val_rows], labels[val_rows])
        if stage == "test" and "test" not in self._sets:
            self._sets["test"] = self._image_set(*self.read(train=False))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Augmented batches in a new order every epoch; this process's share of them."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        sampler = ImageOrder(self._sets["train"], num_replicas=world_size, rank=rank, seed=self.seed)
        loader = self._loader(self._sets["train"], sampler, drop_last=True)
        assert isinstance(loader, ResumableLoader)
        if self._progress:
            loader.load_state_dict(self._progress)
        self._train_loader = loader
        return loader

    def state_dict(self) -> dict[str, int]:
        """How far training has come in its epoch.

        Lightning saves and restores the loader's state itself, but not if the model asked for
        ``trainer.estimated_stepping_batches``: the loader is then made before there is a state to give it.
        """
        return self._train_loader.state_dict() if self._train_loader is not None else {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep the position for the loader that is made next."""
        self._progress = state_dict

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The held-out images, in order and not augmented."""
        if self.num_val_images == 0:
            warnings.filterwarnings("ignore", message=".*Total length of `list` across ranks is zero")
            return []
        return self._loader(self._sets["val"])

    def test_dataloader(self) -> DataLoader[Batch]:
        """The test images, in order and not augmented."""
        return self._loader(self._sets["test"])

    def _image_set(self, images: Tensor, labels: Tensor, augmentation: CropAndFlip | None = None) -> ImageSet:
        return ImageSet(
            images, labels, mean=self.mean, std=self.std, augmentation=augmentation, seed=self.seed
        )

    def _loader(
        self, image_set: ImageSet, sampler: ImageOrder | None = None, drop_last: bool = False
    ) -> DataLoader[Batch]:
        if self.num_workers == 0:
            # Lightning guesses from the number of workers; benchmarks/cifar10_input_pipeline.py measures.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
        loader_type: type[DataLoader[Batch]] = DataLoader if sampler is None else ResumableLoader
        return loader_type(
            image_set,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=_as_it_is,
        )


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes.

    Reads the folder ``cifar-10-batches-py`` of the "Python version". Looks for it in ``data_dir``, then in
    ``$MEMTRAIN_DATA_DIR``, then in ``~/.cache/lightning_memtrain`` (each may be the folder or hold it), and
    otherwise downloads it into the first of these three that is set. Training images are cropped out of the
    image padded by 4 pixels, and mirrored half of the time.

    Args:
        data_dir: where the data is or shall be; ``None`` to use the other places.
        batch_size: see :class:`ImageDataModule`.
        num_val_images: see :class:`ImageDataModule`; the paper trains on all 50,000, which is 0 here.
        num_workers: see :class:`ImageDataModule`.
        seed: see :class:`ImageDataModule`.
        download: whether to download what is not found.

    Raises:
        ArgumentError: if an argument lies outside its range.

    References:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    # Over the 50,000 training images.
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    augmentation = CropAndFlip(padding=4, flip=True)

    def __init__(
        self,
        data_dir: str | None = None,
        batch_size: int = 100,
        num_val_images: int = 5_000,
        num_workers: int = 0,
        seed: int = 0,
        download: bool = True,
    ) -> None:
        super().__init__(batch_size, num_val_images, num_workers, seed)
        self._places = data_places(data_dir)
        self._download = download
        # Not `data_dir`, which is another on another machine.
        self.save_hyperparameters("batch_size", "num_val_images", "seed")

    def prepare_data(self) -> None:
        """Download the data if it is nowhere to be found; Lightning calls this in one process per machine."""
        obtain_cifar10(self._places, CIFAR10_URL if self._download else None, sha256=CIFAR10_SHA256)

    def read(self, train: bool) -> LabelledImages:
        """All training images, or all test images.

        Args:
            train: which of the two.

        Returns:
            The images and their labels.
        """
        folder = obtain_cifar10(self._places, None, sha256=CIFAR10_SHA256)
        batches = [read_batch(folder / name) for name in (TRAIN_FILES if train else TEST_FILES)]
        images, labels = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*batches, strict=True))
        return LabelledImages(images, labels)


def obtain_cifar10(places: Sequence[Path], url: str | None, *, sha256: str) -> Path:
    """Find the folder ``cifar-10-batches-py``, or download it.

    Args:
        places: folders that may be it or hold it, in this order; a download goes into the first.
        url: where the archive can be downloaded; ``None`` for no download.
        sha256: the archive's checksum.

    Returns:
        The folder that holds the batch files.

    Raises:
        FileNotFoundError: if the data is in none of the places and was not downloaded.
    """

    def fetch(url: str, scratch: Path) -> Path:
        return unpack(download(url, scratch, sha256=sha256), FOLDER, scratch)

    cure = f"pass a `data_dir` that holds the folder `{FOLDER}`"
    return find_or_download("CIFAR-10", places, find_folder, url, fetch, cure=cure)


class DigitsDataModule(ImageDataModule):
    """1,797 handwritten digits out of scikit-learn, enlarged from 8x8 to 32x32 pixels: needs no network.

    The last 360 images in scikit-learn's order are the test images. Training images are cropped out of the
    image padded by 4 pixels, and not mirrored: digits have a side.

    Args:
        batch_size: see :class:`ImageDataModule`.
        num_val_images: see :class:`ImageDataModule`.
        num_workers: see :class:`ImageDataModule`.
        seed: see :class:`ImageDataModule`.

    Raises:
        ArgumentError: if an argument lies outside its range.

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """

    # Over all 1,797 images after they were enlarged.
    mean = (0.3052,) * 3
    std = (0.3236,) * 3
    augmentation = CropAndFlip(padding=4, flip=False)
    num_test_images = 360

    def __init__(
        self, batch_size: int = 100, num_val_images: int = 200, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__(batch_size, num_val_images, num_workers, seed)
        self.save_hyperparameters("batch_size", "num_val_images", "seed")

    def read(self, train: bool) -> LabelledImages:
        """All training images, or all test images.

        Args:
            train: which of the two.

        Returns:
            The images and their labels.
        """
        from sklearn.datasets import load_digits

        digits = load_digits()
        small = torch.from_numpy(digits.images).float().mul_(255 / 16)[:, None]
        images = (
            F.interpolate(small, size=(32, 32), mode="bilinear").round_().to(torch.uint8).repeat(1, 3, 1, 1)
        )
        labels = torch.from_numpy(digits.target).long()
        rows = slice(None, -self.num_test_images) if train else slice(-self.num_test_images, None)
        return LabelledImages(images[rows], labels[rows])


def _as_it_is(batch: Any) -> Any:
    """The image set returns whole batches; there is nothing to collate."""
    return batch
