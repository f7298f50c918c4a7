"""Chunks for which ``training_step`` returns ``None``: the batch is what is left of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.merging.batch_outcome import factor_of_the_rest
from lightning_memtrain.microbatching.splitting.chunks import Chunk
from tests.helpers.twin_runs import assert_same, train

Batch = tuple[Tensor, Tensor]
SIZE, NUM_CHUNKS = 10, 4  # 3, 3, 2 and 2 samples
SLICES = slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10)
WARNING = r"`training_step` returned `None` for {} of 4 microbatches of a batch, so its loss, gradients, logs"


class Picky(LightningModule):
    """Leaves out whatever holds a sample that is not a number; the others have a weight each."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        self.reduction = reduction
        self.num_seen = SumMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any] | None:
        inputs, weights = batch
        outputs = self.net(inputs).square()[:, 0]
        loss = (outputs * weights).sum()
        if self.reduction == "mean":
            loss = loss / weights.sum()
        self.log("loss", loss, on_step=True, on_epoch=False)
        self.log("largest", outputs.max(), reduce_fx="max", on_step=True, on_epoch=False)
        self.num_seen(len(inputs))
        if loss.isnan():
            self.log("skipped", 1.0)
            return None
        return {"loss": loss, "outputs": outputs.detach(), "mean": loss.detach()}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def batches(left_out: Sequence[Sequence[int]]) -> tuple[list[Batch], list[Batch]]:
    """Batches with samples that are no numbers in some chunks, and the same without these chunks."""
    generator = torch.Generator().manual_seed(1)
    whole, rest = [], []
    for numbers in left_out:
        inputs = torch.randn(SIZE, 3, generator=generator, dtype=torch.float64)
        weights = torch.rand(SIZE, generator=generator, dtype=torch.float64)
        keeps = torch.ones(SIZE, dtype=torch.bool)
        for number in numbers:
            keeps[SLICES[number]] = False
            inputs[SLICES[number].start, 0] = torch.nan
        whole.append((inputs, weights))
        rest.append((inputs[keeps], weights[keeps]))
    return whole, rest


def weight_of(batch: Batch) -> Tensor:
    return batch[1].sum()


@pytest.fixture(autouse=True)
def _lightning_warns_once_per_process() -> None:
    Closure.warning_cache.clear()


@pytest.mark.parametrize("split", [{"num_microbatches": NUM_CHUNKS}, {"microbatch_size": 3}], ids=str)
@pytest.mark.parametrize("numbers", [[0], [1, 2], [3], [0, 1, 3]], ids=str)
def test_a_batch_is_that_of_the_samples_that_are_left(
    numbers: list[int], split: dict[str, int], tmp_path: Path
):
    whole, rest = batches([[], numbers, [0], []])
    plain = train(Picky, rest, tmp_path)
    with pytest.warns(UserWarning, match=WARNING.format(len(numbers)) + ".* other m"):
        chunked = train(Picky, whole, tmp_path, Microbatching(**split, weight_fn=weight_of))
    assert_same(plain.observed.gradients, chunked.observed.gradients)
    assert_same(plain.observed.outputs, chunked.observed.outputs)
    assert_same(dict(plain.model.net.state_dict()), dict(chunked.model.net.state_dict()))
    for one, other in zip(plain.observed.on_step, chunked.observed.on_step, strict=True):
        assert_same([one["loss"], one["largest"]], [other["loss"], other["largest"]])
    assert float(chunked.observed.on_step[1]["skipped"]) == 1.0
    assert int(chunked.model.num_seen.compute()) == 2 * 4 * SIZE


def test_losses_that_are_added_up_need_no_weights(tmp_path: Path):
    whole, rest = batches([[], [2]])
    plain = train(lambda: Picky("sum"), rest, tmp_path)
    technique = Microbatching(num_microbatches=NUM_CHUNKS, loss_reduction="sum")
    with pytest.warns(UserWarning, match=WARNING.format(1)):
        chunked = train(lambda: Picky("sum"), whole, tmp_path, technique)
    assert_same(plain.observed.gradients, chunked.observed.gradients)


def test_a_batch_without_any_loss_is_left_out_as_in_plain_lightning(tmp_path: Path):
    whole, _ = batches([[], [0, 1, 2, 3], []])
    with pytest.warns(UserWarning, match="`training_step` returned `None`. If"):
        plain = train(Picky, whole, tmp_path)
    Closure.warning_cache.clear()
    technique = Microbatching(num_microbatches=NUM_CHUNKS, weight_fn=weight_of)
    with pytest.warns(UserWarning, match="`training_step` returned `None`. If"):
        chunked = train(Picky, whole, tmp_path, technique)
    assert plain.observed.outputs[1] == chunked.observed.outputs[1] == {}
    assert_same(plain.observed.gradients, chunked.observed.gradients)
    assert_same(dict(plain.model.net.state_dict()), dict(chunked.model.net.state_dict()))


def test_within_a_window_what_is_missing_counts_as_zero(tmp_path: Path):
    whole, rest = batches([[1], []])
    first = train(Picky, rest[:1], tmp_path, max_epochs=1)
    second = train(Picky, rest[1:], tmp_path, max_epochs=1)
    technique = Microbatching(num_microbatches=NUM_CHUNKS, weight_fn=weight_of)
    with pytest.warns(UserWarning, match="except that zero is accumulated for the gradients that are"):
        chunked = train(Picky, whole, tmp_path, technique, max_epochs=1, accumulate_grad_batches=2)
    share = float(rest[0][1].sum() / whole[0][1].sum())
    (one,), (other,), (both,) = (run.observed.gradients for run in (first, second, chunked))
    assert_same([(share * a + b) / 2 for a, b in zip(one, other, strict=True)], both)


def test_a_chunk_without_weight_may_have_no_loss(tmp_path: Path):
    whole, rest = batches([[1], []])
    whole[0][1][SLICES[1]] = 0.0
    plain = train(Picky, rest, tmp_path)
    technique = Microbatching(num_microbatches=NUM_CHUNKS, weight_fn=weight_of)
    chunked = train(Picky, whole, tmp_path, technique)  # and does not warn
    assert_same(plain.observed.gradients, chunked.observed.gradients)


def test_gradients_that_were_taken_up_cannot_be_weighed_again(tmp_path: Path):
    class Steps(Callback):
        steps_in_backward = True

    whole, _ = batches([[1]])
    technique = Microbatching(num_microbatches=NUM_CHUNKS)
    with pytest.raises(MisconfigurationException, match=r"`Steps` needs a loss .* but got `None` .* for 1\."):
        train(Picky, whole, tmp_path, technique, Steps())


def test_the_factor_makes_up_for_what_is_missing():
    chunks = [Chunk(None, weight) for weight in (0.5, 0.25, 0.25)]
    assert factor_of_the_rest(chunks, [False, False, False]) == 1.0
    assert factor_of_the_rest(chunks, [False, True, True]) == 2.0
    assert factor_of_the_rest(chunks, [True, True, False]) == 4.0
    assert factor_of_the_rest(chunks, [True, True, True]) == 1.0
