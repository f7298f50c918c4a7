"""Batches, their order, and the parts of a sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.batches import (
    EpochBatches,
    max_tokens_batches,
    num_target_tokens,
    sorted_by_length,
    split_sample,
)
from tests.helpers.translation import WITHOUT_DROPOUT, needs_fairseq, sentences


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


# What fairseq's compiled `batch_by_size_vec` returns, without the last batch where fairseq drops it.
@pytest.mark.parametrize(
    ("lengths", "max_tokens", "multiple", "expected"),
    [
        ([2, 2, 3, 3, 3, 6], 9, 1, [[0, 1, 2], [3, 4], [5]]),
        ([4, 4, 4, 4, 4, 4, 4, 4, 4], 20, 4, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ([1] * 13, 100, 8, [list(range(8))]),
        ([1] * 9 + [5] * 5, 30, 4, [list(range(8)), [8, 9, 10, 11]]),
        ([1] * 16, 100, 8, [list(range(16))]),
        ([5, 1, 1, 1, 7, 1], 7, 1, [[0], [1, 2, 3], [4], [5]]),
        ([2, 2, 2, 9, 9, 9], 18, 4, [[0, 1, 2], [3, 4]]),
        ([3], 3, 8, []),
        ([3], 3, 1, [[0]]),
    ],
)
def test_batches_are_fairseqs(
    lengths: list[int], max_tokens: int, multiple: int, expected: list[list[int]]
) -> None:
    found = max_tokens_batches(np.arange(len(lengths)), np.array(lengths), max_tokens, multiple)
    assert as_lists(found) == expected


def test_no_batch_is_larger_than_allowed_and_no_sentence_is_lost_but_in_the_last() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    order = sorted_by_length(lengths, lengths, seed=1)
    batches = max_tokens_batches(order, lengths, 100, multiple=8)
    assert all(len(batch) * lengths[batch].max() <= 100 for batch in batches)
    assert all(len(batch) < 8 or len(batch) % 8 == 0 for batch in batches)
    joined = np.concatenate(batches)
    assert np.array_equal(joined, order[: len(joined)])


def test_iwslt14_has_as_many_batches_as_in_fairseq(true_text: Path) -> None:
    lengths = np.load(true_text / "iwslt14" / "train_lengths.npz")
    german, english = (lengths[language].astype(np.int64) for language in ("de", "en"))
    order = sorted_by_length(german, english, seed=1)
    batches = max_tokens_batches(order, np.maximum(german, english), 4_000, multiple=8)
    assert len(batches) == 1_131
    assert (min(map(len, batches)), max(map(len, batches))) == (8, 800)


def test_sentences_of_one_length_are_in_random_order() -> None:
    source, target = np.array([3, 1, 3, 2, 3]), np.array([1, 9, 2, 2, 1])
    assert sorted_by_length(source, target, seed=None).tolist() == [1, 3, 0, 4, 2]
    orders = {tuple(sorted_by_length(source, target, seed=seed)) for seed in range(9)}
    assert orders == {(1, 3, 0, 4, 2), (1, 3, 4, 0, 2)}


def test_epochs_have_orders_of_their_own_which_processes_share_out() -> None:
    batches = [np.array([i]) for i in range(7)]
    mine, other = (EpochBatches(batches, seed=3, num_replicas=2, rank=rank) for rank in (0, 1))
    first = list(mine), list(other)
    assert len(mine) == len(first[0]) == len(first[1]) == 3
    assert not {*map(tuple, first[0])} & {*map(tuple, first[1])}
    assert list(mine) == first[0]
    mine.set_epoch(1)
    assert list(mine) != first[0]
    mine.skip_once = 2
    assert list(mine) == list(EpochBatches(batches, seed=4, num_replicas=2, rank=0))[2:]
    assert list(EpochBatches(batches, seed=None)) == [[i] for i in range(7)]


@pytest.fixture(scope="module")
def dictionaries() -> tuple[bridge.Dictionary, bridge.Dictionary]:
    return tuple(  # type: ignore[return-value]
        bridge.new_dictionary(f"{word}{i}" for i in range(40)) for word in ("wort", "word")
    )


@pytest.fixture(scope="module")
def sample(dictionaries: tuple[bridge.Dictionary, bridge.Dictionary]) -> bridge.Sample:
    sides = [
        [bridge.encode(line, dictionary) for line in lines]
        for lines, dictionary in zip(sentences(22, seed=5), dictionaries, strict=True)
    ]
    dataset = bridge.pair_dataset(*sides, *dictionaries)
    return dataset.collater([dataset[i] for i in range(22)])  # type: ignore[no-any-return]


@needs_fairseq
@pytest.mark.parametrize("num_chunks", [1, 3, 22, 50])
def test_chunks_are_the_sentences_in_order_without_needless_padding(
    sample: bridge.Sample, num_chunks: int
) -> None:
    chunks = split_sample(sample, num_chunks)
    assert len(chunks) == min(num_chunks, 22)
    sizes = [chunk["nsentences"] for chunk in chunks]
    assert max(sizes) - min(sizes) <= 1
    assert torch.equal(torch.cat([chunk["id"] for chunk in chunks]), sample["id"])
    assert sum(map(num_target_tokens, chunks)) == sample["ntokens"]
    for name in ("src_tokens", "prev_output_tokens"):
        rows = [row[row != 1] for chunk in chunks for row in chunk["net_input"][name]]
        expected = [row[row != 1] for row in sample["net_input"][name]]
        assert all(torch.equal(row, other) for row, other in zip(rows, expected, strict=True))
    for chunk in chunks:
        assert (chunk["net_input"]["src_tokens"][:, 0] != 1).any()
        assert (chunk["target"][:, -1] != 1).any()
        assert chunk["target"].is_contiguous()
        assert chunk["net_input"]["prev_output_tokens"].shape == chunk["target"].shape
        assert torch.equal(chunk["net_input"]["src_lengths"], chunk["net_input"]["src_tokens"].ne(1).sum(1))


@needs_fairseq
@pytest.mark.usefixtures("softmax_in_double")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float, 5e-7), (torch.double, 1e-14)])
def test_weighted_by_tokens_gradients_add_up_to_those_of_the_batch(
    sample: bridge.Sample,
    dictionaries: tuple[bridge.Dictionary, bridge.Dictionary],
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    torch.manual_seed(0)
    model = bridge.build_model("lightconv_iwslt_de_en", WITHOUT_DROPOUT, *dictionaries).to(dtype)

    def gradient(chunks: list[bridge.Sample], weights: list[float]) -> torch.Tensor:
        model.zero_grad()
        for chunk, weight in zip(chunks, weights, strict=True):
            loss, _ = bridge.smoothed_loss(model(**chunk["net_input"])[0], chunk["target"], 0.1, padding=1)
            (weight * loss / chunk["ntokens"]).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    def distance(found: torch.Tensor) -> float:
        return float((found - whole).norm() / whole.norm())

    whole = gradient([sample], [1.0])
    chunks = split_sample(sample, 5)
    by_tokens = [num_target_tokens(chunk) / sample["ntokens"] for chunk in chunks]
    assert distance(gradient(chunks, by_tokens)) <= tolerance
    assert distance(gradient(chunks, [1 / 5] * 5)) > 0.01, "the mean of means is not told apart"
