"""Samples of at most so many tokens, in fairseq's batches and order, and the parts of a sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_memtrain.recipes.resumable import EpochSampler

from .fairseq_bridge import Sample

Indices = NDArray[np.int64]


def sorted_by_length(source_lengths: Indices, target_lengths: Indices, *, seed: int | None) -> Indices:
    """Sentences by source length, those of one length by target length, and else in random order.

    Args:
        source_lengths: tokens of each source sentence.
        target_lengths: tokens of each target sentence.
        seed: of the random order, as fairseq draws it; ``None`` to keep the order of the corpus.

    Returns:
        The indices of all sentences.
    """
    size = len(source_lengths)
    order = np.arange(size) if seed is None else np.random.RandomState(seed).permutation(size)
    for lengths in (target_lengths, source_lengths):
        order = order[np.argsort(lengths[order], kind="stable")]
    return order.astype(np.int64)


def max_tokens_batches(order: Indices, lengths: Indices, max_tokens: int, multiple: int = 1) -> list[Indices]:
    """Cut sentences into batches of at most ``max_tokens`` tokens with padding; fairseq's batches exactly.

    A batch of :math:`n` sentences whose longest has :math:`m` tokens counts as :math:`nm`. The sentences of a
    batch are those that come one after the other in ``order``, and as many as fit in a number below
    ``multiple`` or divisible by it. If the last batch is not, it is left out, as fairseq does.

    Args:
        order: indices of sentences, best sorted by length.
        lengths: tokens of each sentence (the longer one of a pair), by index; none above ``max_tokens``.
        max_tokens: see above, at least 1.
        multiple: see above, at least 1.

    Returns:
        The batches.

    Example:
        >>> lengths = np.array([2, 2, 3, 3, 3, 6])
        >>> [batch.tolist() for batch in max_tokens_batches(np.arange(6), lengths, max_tokens=9)]
        [[0, 1, 2], [3, 4], [5]]
    """
    ends: list[int] = []
    start = end = 0  # of the batch that is being made; from `end` on are sentences that make no valid number
    longest = longest_behind = 0
    for position, length in enumerate(lengths[order].tolist()):
        longest_behind = max(longest_behind, length)
        size = position + 1 - start
        both = max(longest, longest_behind)
        too_many = size * both > max_tokens
        if too_many:
            if end > start:
                ends.append(end)
            if longest_behind * (position + 1 - end) > max_tokens:
                # What is behind fills a batch by itself, whatever its number.
                if position > end:
                    ends.append(position)
                end, longest_behind = position, length
            start, both = end, longest_behind
        if too_many or size < multiple or size % multiple == 0:
            end, longest, longest_behind = position + 1, both, 0
    ends += sorted({end, len(order)} - {0})
    batches = np.split(order, ends[:-1]) if ends else []
    if multiple > 1 and batches and len(batches[-1]) % multiple:
        batches.pop()
    return batches


class EpochBatches(EpochSampler):
    """Batches in a new order every epoch, the share of one process.

    Lightning tells the epoch to ``batch_sampler.sampler``, which is therefore this object itself.

    Args:
        batches: indices of the sentences of each.
        seed: of the order; ``None`` for the order in which they are given, in every epoch.
        num_replicas: number of processes; batches that not every one can get are left out.
        rank: this process, in ``[0, num_replicas)``.
    """

    def __init__(
        self, batches: Sequence[Indices], *, seed: int | None, num_replicas: int = 1, rank: int = 0
    ) -> None:
        super().__init__(batches, num_replicas=num_replicas, rank=rank, seed=seed or 0)
        self._batches = batches
        self._shuffled = seed is not None
        self.sampler = self

    def order(self) -> list[list[int]]:
        """The batches of the epoch ``self.epoch``."""
        batches = [batch.tolist() for batch in self._batches]
        if self._shuffled:
            # fairseq counts epochs from 1.
            np.random.RandomState(self.seed + self.epoch + 1).shuffle(batches)
        return batches


PADDING = 1  # the place of <pad> in every dictionary of fairseq


def split_sample(sample: Sample, num_chunks: int) -> list[Sample]:
    """Split a sample of fairseq into chunks of sentences: the ``split_fn`` of ``Microbatching``.

    Padding that no sentence of a chunk needs is cut off, on the left of sources and on the right of targets:
    it changes no gradient (convolutions see zeros there, and the decoder looks at no later position). The
    counts that a sample carries are made again.

    Args:
        sample: what the collater of fairseq's ``LanguagePairDataset`` returns.
        num_chunks: most chunks to make, at least 1.

    Returns:
        The chunks, whose numbers of sentences differ by at most one.
    """
    num_sentences = len(sample["id"])
    parts: list[Sample] = []
    for ids in sample["id"].tensor_split(min(num_chunks, num_sentences)):
        start = sum(part["nsentences"] for part in parts)
        rows = slice(start, start + len(ids))
        source = _trimmed(sample["net_input"]["src_tokens"][rows], left=True)
        target = _trimmed(sample["target"][rows], left=False)
        inputs = {
            "src_tokens": source,
            "src_lengths": sample["net_input"]["src_lengths"][rows],
            "prev_output_tokens": sample["net_input"]["prev_output_tokens"][rows, : target.size(1)],
        }
        parts.append(
            {
                "id": ids,
                "nsentences": len(ids),
                "ntokens": int(target.ne(PADDING).sum()),
                "net_input": inputs,
                # fairseq's criterion makes a view of it.
                "target": target.contiguous(),
            }
        )
    return parts


def num_target_tokens(sample: Sample) -> int:
    """Over how many tokens the mean loss of a sample is taken: the ``weight_fn`` of ``Microbatching``."""
    return int(sample["ntokens"])


def _trimmed(tokens: Tensor, *, left: bool) -> Tensor:
    longest = int(tokens.ne(PADDING).sum(1).max())
    return tokens[:, tokens.size(1) - longest :] if left else tokens[:, :longest]
