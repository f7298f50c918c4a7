"""The training of `benchmarks.gpu`, with a small network on a few images and no GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from lightning_memtrain.recipes.cifar10_wrn28_2.module import WideResNetClassifier
from tests.recipes.conftest import FILES, NUM_PER_FILE


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*LeafSpec")
def test_all_training_images_are_trained_on_and_none_is_validated(
    mini_cifar10: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"train": 0, "val": 0}

    class Counting(WideResNetClassifier):
        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
            seen["train"] += len(batch[0])
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
            seen["val"] += len(batch[0])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "WideResNetClassifier", partial(Counting, depth=10, widen_factor=1))
    monkeypatch.setattr(gpu, "CIFAR10DataModule", partial(gpu.CIFAR10DataModule, batch_size=4))
    device = torch.device("cpu")
    result = gpu.training(device, str(mini_cifar10), minutes=9.0, max_epochs=2, method="dense", sparsity=0.8)
    assert (result["epochs"], result["finished"]) == (2, True)
    assert seen == {"train": 2 * NUM_PER_FILE * (len(FILES) - 1), "val": 0}
