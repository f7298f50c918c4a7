"""Augmentation of whole batches against the same thing done image by image."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_memtrain.recipes.cifar10_wrn28_2.augment import CropAndFlip, generator_for, normalize


def one_by_one(images: Tensor, draws: Tensor, padding: int) -> Tensor:
    results = []
    for image, (top, left, flip) in zip(images, draws.tolist(), strict=True):
        channels, height, width = image.shape
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=image.dtype)
        padded[:, padding : padding + height, padding : padding + width] = image
        crop = padded[:, top : top + height, left : left + width]
        results.append(torch.flip(crop, [2]) if flip else crop)
    return torch.stack(results)


@pytest.mark.parametrize("shape", [(50, 3, 32, 32), (9, 1, 8, 5)])
@pytest.mark.parametrize("padding", [0, 4])
def test_a_batch_equals_its_images_one_by_one(shape: tuple[int, ...], padding: int) -> None:
    augmentation = CropAndFlip(padding=padding)
    images = torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator_for(1))
    before = images.clone()
    draws = augmentation.draw(len(images), generator_for(2))
    result = augmentation.apply(images, draws)
    assert torch.equal(result, one_by_one(images, draws, padding))
    assert torch.equal(images, before)
    assert result.dtype == torch.uint8


def test_the_middle_crop_unflipped_is_the_image() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(CropAndFlip().apply(images, torch.tensor([[4, 4, 0]] * 2)), images)


def test_draws_cover_all_crops_evenly_and_flip_half() -> None:
    draws = CropAndFlip().draw(90_000, generator_for(0))
    for column in (0, 1):
        counts = draws[:, column].long().bincount(minlength=9)
        assert counts.shape == (9,)
        # 10,000 expected in each; the standard deviation is 94
        assert (counts - 10_000).abs().max() < 500
    assert abs(int(draws[:, 2].sum()) - 45_000) < 750  # standard deviation 150
    assert CropAndFlip(flip=False).draw(1_000, generator_for(0))[:, 2].sum() == 0


def test_generators_depend_on_their_key_only() -> None:
    torch.manual_seed(1)
    first = torch.rand(4, generator=generator_for(7, "order", 3))
    torch.manual_seed(2)
    assert torch.equal(first, torch.rand(4, generator=generator_for(7, "order", 3)))
    keys = [(7, "order", 4), (8, "order", 3), (7, "flip", 3), (7, "order", 33)]
    assert not any(torch.equal(first, torch.rand(4, generator=generator_for(*key))) for key in keys)


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    CropAndFlip().draw(10, generator_for(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_normalize() -> None:
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    result = normalize(images, mean=(0.5, 0.2, 0.0), std=(0.25, 0.1, 0.5))
    torch.testing.assert_close(result.flatten(), torch.tensor([-2.0, 0.0, 2.0]))
    assert result.dtype == torch.float32


def test_negative_padding_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"`CropAndFlip\(padding\)` must be at least 0 pixels, but got padding=-1"
    ):
        CropAndFlip(padding=-1)
