"""The trainings of `benchmarks.gpu`, with small networks on little data and no GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from lightning_memtrain.recipes.cifar10_wrn28_2.module import WideResNetClassifier
from tests.helpers.cli import IGNORED
from tests.helpers.translation import needs_fairseq, write_corpus
from tests.recipes.conftest import FILES, NUM_PER_FILE
from tests.recipes.test_iwslt14_commands import SMALL


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


class OneEpoch(gpu.SliceTimer):
    """A slice in which no time is left after an epoch."""

    trained = False

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.trained = True

    def time_elapsed(self, stage: Any = "train") -> float:
        return 1e6 if self.trained else 0.0


@needs_fairseq
@pytest.mark.filterwarnings(
    *IGNORED, "ignore:Checkpoint directory .* exists", "ignore:.*dataloader, does not have"
)
def test_translation_goes_on_slice_by_slice_and_is_scored_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "SliceTimer", OneEpoch)
    # Without a validation, Lightning 2.6 goes on from an epoch's end with a batch too many.
    options = [*SMALL, "--trainer.limit_val_batches=1", "--model.num_val_translations=0"]
    results = [gpu.translation(str(data), 9.0, "microbatched", 25, options) for _ in range(3)]
    steps = [result["steps"] for result in results]
    assert 0 < steps[0] < steps[1] < 25 == steps[2], "an epoch per slice"
    assert [result["finished"] for result in results] == [False, False, True]
    assert "test_bleu" not in results[1]
    assert 0 <= results[2]["test_bleu"] <= 100
    assert results[2]["test_loss"] > 0
    assert results[2]["peak_mib"] > 0
