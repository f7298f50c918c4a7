from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memtrain.microbatching.splitting.chunks import Chunk, Splitter, mean_weights

BATCH = {"x": torch.arange(14).view(7, 2), "valid": torch.tensor([4, 1, 0, 0, 0, 2, 3])}


def count_valid(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["valid"].sum()


def weights(chunks: list[Chunk]) -> list[float]:
    return [chunk.weight for chunk in chunks]


def test_a_mean_is_weighted_by_samples():
    chunks = Splitter().split(BATCH, 3)
    assert [chunk.num_samples for chunk in chunks] == [3, 2, 2]
    assert weights(chunks) == [3 / 7, 2 / 7, 2 / 7]
    assert torch.equal(torch.cat([chunk.batch["x"] for chunk in chunks]), BATCH["x"])
    assert not any(chunk.repeated for chunk in chunks)


def test_a_sum_is_not_weighted():
    assert weights(Splitter("sum").split(BATCH, 3)) == [1.0, 1.0, 1.0]


def test_weight_fn_says_over_what_a_chunk_is_a_mean():
    assert weights(Splitter(weight_fn=count_valid).split(BATCH, 3)) == [5 / 10, 0.0, 5 / 10]
    assert weights(Splitter(weight_fn=lambda chunk: 2).split(BATCH, 2)) == [0.5, 0.5]


def test_chunks_that_all_weigh_nothing_count_the_same():
    assert weights(Splitter(weight_fn=lambda chunk: 0).split(BATCH, 4)) == [0.25] * 4


@pytest.mark.parametrize("splitter", [Splitter(), Splitter("sum"), Splitter(weight_fn=count_valid)])
def test_one_chunk_is_the_batch_itself_at_weight_1(splitter: Splitter):
    assert splitter.split(BATCH, 1) == [Chunk(BATCH, 1.0, 7)]
    assert splitter.split(BATCH, 1)[0].batch is BATCH
    single = {name: value[:1] for name, value in BATCH.items()}
    assert weights(splitter.split(single, 5)) == [1.0]


def test_what_cannot_be_split_is_still_one_chunk():
    batch = object()
    assert Splitter(weight_fn=count_valid).split(batch, 1) == [Chunk(batch, 1.0, None)]


@pytest.mark.parametrize(("size", "expected"), [(1, 7), (2, 4), (3, 3), (6, 2), (7, 1), (100, 1)])
def test_a_size_makes_as_few_chunks_as_it_can(size: int, expected: int):
    assert Splitter().num_microbatches(BATCH, size) == expected


def test_an_empty_batch_is_one_chunk():
    assert Splitter().num_microbatches(torch.zeros(0, 2), 3) == 1
    assert weights(Splitter().split(torch.zeros(0, 2), 3)) == [1.0]


# ---------------------------------------------------------------------- split_fn


def along_second_axis(batch: torch.Tensor, num_microbatches: int) -> list[torch.Tensor]:
    return list(batch.tensor_split(num_microbatches, dim=1))


def along_first_axis(batch: torch.Tensor, num_microbatches: int) -> list[torch.Tensor]:
    return list(batch.split(3))


def test_split_fn_along_the_first_axis_is_weighted_by_samples():
    chunks = Splitter(split_fn=along_first_axis).split(BATCH["x"], 4)
    assert [chunk.num_samples for chunk in chunks] == [3, 3, 1]
    assert weights(chunks) == [3 / 7, 3 / 7, 1 / 7]


def test_one_chunk_does_not_ask_split_fn():
    assert Splitter(split_fn=lambda batch, count: []).split(BATCH, 1) == [Chunk(BATCH, 1.0, 7)]


def test_split_fn_along_another_axis_takes_its_weights_from_weight_fn():
    splitter = Splitter(split_fn=along_second_axis, weight_fn=lambda chunk: chunk.size(1))
    chunks = splitter.split(torch.zeros(4, 5), 2)
    assert weights(chunks) == [3 / 5, 2 / 5]
    # Their first axis is as long as that of the whole batch, so it is not the samples.
    assert [chunk.num_samples for chunk in chunks] == [None, None]


@pytest.mark.parametrize("batch", [torch.zeros(4, 5), (torch.zeros(4, 5), torch.zeros(5))])
def test_split_fn_needs_weight_fn_where_samples_cannot_be_counted(batch: Any):
    def split(batch: Any, num_microbatches: int) -> list[Any]:
        if isinstance(batch, torch.Tensor):
            return along_second_axis(batch, num_microbatches)
        return list(zip(*(b.tensor_split(num_microbatches, dim=-1) for b in batch), strict=True))

    message = (
        "`Microbatching(split_fn)` must split along the first axis of all tensors for samples to be counted, "
        "but the chunks' first axes do not add up to that of the batch. Give `weight_fn`, which says over "
        "how many samples or tokens the loss of a chunk is a mean."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        Splitter(split_fn=split).split(batch, 2)
    assert weights(Splitter("sum", split_fn=split).split(batch, 2)) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("returned", "described"),
    [((1, 2, 3), "3 chunks"), ([], "0 chunks"), (iter([1, 2]), "list_iterator")],
)
def test_split_fn_has_to_return_a_list_of_as_many_chunks_at_most(returned: Any, described: str):
    message = (
        r"`Microbatching\(split_fn\)` must return a list of 1 to 2 chunks when it is called with "
        rf"num_microbatches=2, but got ({described})\. Return fewer chunks than asked for, never more\."
    )
    with pytest.raises(MisconfigurationException, match=f"^{message}$"):
        Splitter(split_fn=lambda batch, count: returned).split(BATCH, 2)


def test_a_batch_without_visible_samples_has_no_size():
    with pytest.raises(MisconfigurationException, match=r"^The batch must hold a tensor"):
        Splitter().batch_size(object())
    expected = (
        r"^`Microbatching\(microbatch_size\)` needs to count the samples of a batch, but got one that "
        r"does not show them: The batch must hold a tensor(?s:.*) With `split_fn`, use `num_microbatches` "
        r"instead\.$"
    )
    with pytest.raises(MisconfigurationException, match=expected):
        Splitter(split_fn=along_first_axis).num_microbatches(object(), 2)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, torch.tensor(-0.5)])
def test_weight_fn_has_to_return_a_weight(weight: Any):
    message = (
        "`Microbatching(weight_fn)` must return a finite number of at least 0, but got "
        f"{float(weight)}. Return over how many samples or tokens the chunk's loss is a mean."
    )
    with pytest.raises(MisconfigurationException, match=f"^{re.escape(message)}$"):
        Splitter(weight_fn=lambda chunk: weight).split(BATCH, 2)


# ---------------------------------------------------------------------- weights of a mean


def test_means_are_weighted_as_the_loss_is():
    assert mean_weights([Chunk(None, 0.25, 3), Chunk(None, 0.75, 3)]) == [0.25, 0.75]


def test_beside_a_sum_means_are_weighted_by_samples():
    assert mean_weights([Chunk(None, 1.0, 3), Chunk(None, 1.0, 1)]) == [0.75, 0.25]
    assert mean_weights([Chunk(None, 1.0), Chunk(None, 1.0)]) == [0.5, 0.5]
