from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memtrain.microbatching.merging.batch_outcome import BatchOutcome, merge_outputs
from lightning_memtrain.microbatching.merging.chunk_logs import LogRecorder
from lightning_memtrain.microbatching.splitting.chunks import Chunk

CHUNKS = [Chunk(None, 0.75, 3), Chunk(None, 0.25, 1)]


class Scores(NamedTuple):
    low: torch.Tensor
    high: float


def merge(*values: Any) -> Any:
    return merge_outputs([{"x": value} for value in values], CHUNKS)["x"]


def test_tensors_with_one_row_per_sample_are_joined():
    merged = merge(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]]))
    assert torch.equal(merged, torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    assert torch.equal(merge(torch.tensor([1, 2, 3]), torch.tensor([4])), torch.tensor([1, 2, 3, 4]))


def test_graphs_end_with_their_chunk():
    assert not merge(torch.ones(3, requires_grad=True) * 2, torch.ones(1)).requires_grad
    assert not merge(torch.ones((), requires_grad=True) * 2, torch.ones(())).requires_grad


def test_means_are_averaged_with_the_weights_of_the_loss():
    assert torch.equal(merge(torch.tensor(4.0), torch.tensor(8.0)), torch.tensor(5.0))
    assert torch.equal(merge(torch.tensor([4.0, 0.0]), torch.tensor([8.0, 4.0])), torch.tensor([5.0, 1.0]))
    assert merge(4.0, 8.0) == 5.0


def test_beside_a_summed_loss_means_are_averaged_by_samples():
    summed = [Chunk(None, 1.0, 3), Chunk(None, 1.0, 1)]
    assert merge_outputs([{"x": 4.0}, {"x": 8.0}], summed) == {"x": 5.0}


def test_sequences_with_one_item_per_sample_are_joined():
    assert merge(["a", "b", "c"], ["d"]) == ["a", "b", "c", "d"]
    assert merge((1, 2, 3), (4,)) == (1, 2, 3, 4)


def test_groups_are_merged_item_by_item():
    merged = merge((torch.tensor([1, 2, 3]), 4.0), (torch.tensor([4]), 8.0))
    assert torch.equal(merged[0], torch.tensor([1, 2, 3, 4]))
    assert merged[1] == 5.0
    scores = merge(Scores(torch.zeros(3), 4.0), Scores(torch.ones(1), 8.0))
    assert isinstance(scores, Scores)
    assert torch.equal(scores.low, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert scores.high == 5.0


def test_mappings_are_merged_entry_by_entry():
    merged = merge({"n": 2, "deep": {"mean": 4.0}}, {"n": 2, "deep": {"mean": 8.0}})
    assert merged == {"n": 2, "deep": {"mean": 5.0}}


def test_what_is_the_same_in_all_chunks_stays():
    assert merge("tokens", "tokens") == "tokens"
    assert merge(None, None) is None
    assert torch.equal(merge(torch.tensor([5, 6]), torch.tensor([5, 6])), torch.tensor([5, 6]))


def test_one_chunk_returns_what_it_returned():
    graph = torch.ones((), requires_grad=True) * 2
    output = {"anything": object(), "graph": graph}
    assert merge_outputs([output], [Chunk(None, 1.0)]) == output


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((torch.tensor(1), torch.tensor(2)), "'x': a tensor of shape ()"),
        ((torch.zeros(2, 5), torch.zeros(2, 4)), "'x': a tensor of shape (2, 5)"),
        (("a", "b"), "'x': str"),
        ((1, 2), "'x': int"),
        ((1, True), "'x': int"),
        ((torch.zeros(()), 0.0), "'x': a tensor of shape ()"),
        (({"y": 1}, {"y": 2}), "'y': int"),
        (((1.0, "a"), (1.0, "b")), "'x'[1]: str"),
        ((["a"], ["b", "c"]), "'x': list"),
    ],
)
def test_what_cannot_be_merged_is_named(values: tuple[Any, Any], named: str):
    message = (
        "`training_step` must return what can be merged over microbatches (one item per sample, a "
        f"floating-point mean, or the same for all), but got {named} that differs between them. "
        "Return it per sample, log it with `self.log`, or leave it out."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        merge(*values)


def test_chunks_have_to_return_the_same_entries():
    message = (
        "`training_step` must return the same entries for every microbatch, but got ['a', 'b'] for one and "
        "['a'] for another. Return all of them always."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        merge_outputs([{"a": 1, "b": 1}, {"a": 1}], CHUNKS)


# ---------------------------------------------------------------------- outcome of a batch


def outcome_of(chunks: list[Chunk], losses: list[float | None]) -> BatchOutcome:
    outcome = BatchOutcome(sum_losses=False)
    for chunk, loss in zip(chunks, losses, strict=True):
        tensor = None if loss is None else torch.tensor(loss)
        outcome.add(chunk, tensor, 1, {"loss_again": loss}, LogRecorder())
    return outcome


def test_losses_add_up_by_weight():
    assert torch.equal(outcome_of(CHUNKS, [4.0, 8.0]).loss, torch.tensor(5.0))


def test_a_single_loss_is_the_loss_to_the_bit():
    assert torch.equal(outcome_of([Chunk(None, 1.0, 4)], [0.1]).loss, torch.tensor(0.1))


def test_what_does_not_count_may_be_undefined():
    chunks = [Chunk(None, 1.0, 2), Chunk(None, 0.0, 2)]
    assert torch.equal(outcome_of(chunks, [3.0, float("nan")]).loss, torch.tensor(3.0))


def test_steps_that_return_nothing_have_no_loss():
    assert outcome_of(CHUNKS, [None, None]).loss is None


def test_samples_are_counted_if_all_chunks_know_theirs():
    assert outcome_of(CHUNKS, [1.0, 2.0]).num_samples == 4
    assert outcome_of([CHUNKS[0], Chunk(None, 0.25)], [1.0, 2.0]).num_samples is None


def test_logged_losses_are_not_divided_by_the_batches_of_a_window():
    outcome = BatchOutcome(sum_losses=False)
    for chunk, loss in zip(CHUNKS, (4.0, 8.0), strict=True):
        recorder = LogRecorder()
        recorder.log("training_step", "loss", torch.tensor(2 * loss), reduce_fx="max")
        outcome.add(chunk, torch.tensor(loss), 2, {}, recorder)
    logged: list[float] = []

    class Results:
        def log(self, fx: str, name: str, value: torch.Tensor, **options: Any) -> None:
            logged.append(value.item())

    outcome.logs.replay(Results(), 4)
    assert logged == [10.0]  # recognised as the loss, so weighed and not the largest
