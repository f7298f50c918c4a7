"""Order and augmentation of batches are functions of seed and epoch, also in a run that was interrupted."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_memtrain.recipes.cifar10_wrn28_2.augment import CropAndFlip, generator_for
from lightning_memtrain.recipes.cifar10_wrn28_2.data import ImageDataModule, LabelledImages
from lightning_memtrain.recipes.cifar10_wrn28_2.loader import ImageOrder, ImageSet
from lightning_memtrain.recipes.resumable import ResumableLoader


def numbered_images(count: int) -> LabelledImages:
    """Images of noise whose label is their number."""
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator_for(count))
    return LabelledImages(images, torch.arange(count))


def image_set(count: int, augmentation: CropAndFlip | None = None, seed: int = 0) -> ImageSet:
    return ImageSet(
        *numbered_images(count), mean=(0.5,) * 3, std=(0.25,) * 3, augmentation=augmentation, seed=seed
    )


class NumberedImages(ImageDataModule):
    mean = (0.5,) * 3
    std = (0.25,) * 3
    augmentation = CropAndFlip()

    def read(self, train: bool) -> LabelledImages:
        return numbered_images(46)


class Recorder(pl.LightningModule):
    """Learns nothing; writes down, per optimizer step, the numbers and the pixel sums of its batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, list[int], float]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.seen.append((batch_idx, labels.tolist(), images.double().pow(2).sum().item()))
        return self.weight.sum()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class SaveAlways(pl.Callback):
    """A checkpoint after every step, and one at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.save_checkpoint(self.folder / f"epoch={trainer.current_epoch}.ckpt")


def fit(folder: Path, *, resume: Path | None = None, num_workers: int = 0, **options: object) -> Recorder:
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        callbacks=SaveAlways(folder),
        **options,  # type: ignore[arg-type]
    )
    model = Recorder()
    data = NumberedImages(batch_size=4, num_val_images=6, num_workers=num_workers, seed=3)
    trainer.fit(model, datamodule=data, ckpt_path=resume)
    return model


# 40 training images in batches of 4: 10 steps in each epoch.
@pytest.mark.parametrize("stopped_after", [1, 7, 10, 13, 20, 29])
def test_a_resumed_run_sees_what_the_uninterrupted_one_saw(tmp_path: Path, stopped_after: int) -> None:
    whole = fit(tmp_path / "whole", max_epochs=3).seen
    first = fit(tmp_path / "parts", max_epochs=3, max_steps=stopped_after).seen
    rest = fit(
        tmp_path / "parts", max_epochs=3, resume=tmp_path / "parts" / f"step={stopped_after}.ckpt"
    ).seen
    assert len(whole) == 30
    assert first == whole[:stopped_after]
    assert rest == whole[stopped_after:]


def test_a_run_resumed_between_two_epochs(tmp_path: Path) -> None:
    whole = fit(tmp_path, max_epochs=3).seen
    assert fit(tmp_path, max_epochs=3, resume=tmp_path / "epoch=1.ckpt").seen == whole[20:]


def test_a_resumed_run_with_worker_processes(tmp_path: Path) -> None:
    whole = fit(tmp_path / "whole", max_epochs=2).seen
    first = fit(tmp_path / "parts", max_epochs=2, max_steps=7, num_workers=2).seen
    rest = fit(
        tmp_path / "parts", max_epochs=2, resume=tmp_path / "parts" / "step=7.ckpt", num_workers=2
    ).seen
    assert first + rest == whole


def test_a_resumed_run_that_uses_a_part_of_each_epoch(tmp_path: Path) -> None:
    options = {"max_epochs": 3, "limit_train_batches": 5}
    whole = fit(tmp_path / "whole", **options).seen
    assert [step[0] for step in whole] == [0, 1, 2, 3, 4] * 3
    for stopped_after in (3, 5, 8):
        rest = fit(
            tmp_path / "rest", resume=tmp_path / "whole" / f"step={stopped_after}.ckpt", **options
        ).seen
        assert rest == whole[stopped_after:]


def test_an_epoch_has_every_image_once_and_each_epoch_another_order(tmp_path: Path) -> None:
    seen = fit(tmp_path, max_epochs=2).seen
    orders = [[number for _, numbers, _ in seen[i : i + 10] for number in numbers] for i in (0, 10)]
    assert len(set(orders[0])) == 40
    assert set(orders[0]) == set(orders[1])
    assert orders[0] != orders[1]


def test_overfitting_repeats_the_same_augmented_images(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="You requested to overfit"):
        seen = fit(tmp_path, max_epochs=2, overfit_batches=3).seen
    assert [numbers for _, numbers, _ in seen[:3]] == [numbers for _, numbers, _ in seen[3:]]
    assert seen[:3] == seen[3:]


def test_augmentation_depends_on_seed_epoch_and_image_only() -> None:
    images = image_set(20, CropAndFlip())
    batch = images.__getitems__([23, 27, 21])[0]  # images 3, 7 and 1 in epoch 1
    torch.rand(5)
    again = image_set(20, CropAndFlip())
    assert torch.equal(again.__getitems__([27])[0][0], batch[1])
    assert torch.equal(again[27][0], batch[1])
    assert not torch.equal(again.__getitems__([7])[0][0], batch[1])
    assert not torch.equal(image_set(20, CropAndFlip(), seed=1).__getitems__([27])[0][0], batch[1])


def test_images_are_normalised_and_labels_stay_with_them() -> None:
    source = numbered_images(20)
    images, labels = image_set(20).__getitems__([4, 19])
    assert labels.tolist() == [4, 19]
    torch.testing.assert_close(images, (source.images[[4, 19]].float() / 255 - 0.5) / 0.25)


@pytest.mark.parametrize(("count", "world_size"), [(40, 2), (41, 2), (47, 4), (40, 1)])
def test_processes_share_an_epoch_evenly(count: int, world_size: int) -> None:
    samplers = [
        ImageOrder(image_set(count), num_replicas=world_size, rank=rank) for rank in range(world_size)
    ]
    shares = []
    for sampler in samplers:
        sampler.set_epoch(5)
        shares.append([index - 5 * count for index in sampler])
    assert [len(share) for share in shares] == [count // world_size] * world_size
    assert [len(sampler) for sampler in samplers] == [count // world_size] * world_size
    together = [index for share in shares for index in share]
    assert len(set(together)) == len(together)
    assert all(0 <= index < count for index in together)


def test_the_state_of_a_loader_is_plain_numbers() -> None:
    images = image_set(12)
    loader = ResumableLoader(images, batch_size=4, sampler=ImageOrder(images), collate_fn=lambda batch: batch)
    iterator = iter(loader)
    assert loader.state_dict() == {"epoch": 0, "batches": 0}
    next(iterator)
    next(iterator)
    assert loader.state_dict() == {"epoch": 0, "batches": 2}
    rest = next(iterator)[1]
    loader.load_state_dict({"epoch": 0, "batches": 2})
    batches = list(loader)
    assert len(batches) == 1
    assert torch.equal(batches[0][1], rest)
    assert len(list(loader)) == 3  # the next time round it is whole again


class Shares(Recorder):
    """Leaves what its process saw in a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def on_train_end(self) -> None:
        torch.save([numbers for _, numbers, _ in self.seen], self.folder / f"rank{self.global_rank}.pt")


def test_two_processes_of_a_real_run_see_one_half_each(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = NumberedImages(batch_size=4, num_val_images=6, num_workers=0, seed=3)
    trainer.fit(Shares(tmp_path), datamodule=data)
    halves = [torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1)]
    for epoch in (0, 1):
        steps = slice(5 * epoch, 5 * epoch + 5)
        mine, theirs = ({number for numbers in half[steps] for number in numbers} for half in halves)
        assert len(mine) == len(theirs) == 20
        assert not mine & theirs
    assert halves[0][:5] != halves[0][5:]
