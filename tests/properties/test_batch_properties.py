"""However a batch is nested, its chunks put together again are the batch."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.microbatching.splitting.batches import batch_size_of, split_batch
from lightning_memtrain.microbatching.splitting.chunks import FixedSplit, Splitter

Pair = namedtuple("Pair", ["a", "b"])


@dataclass(frozen=True)
class Record:
    a: object
    b: object


class Shared:
    """What every chunk is to hold as it is; the only leaf without samples that a test can tell for sure."""


class PerSample:
    """An item of a list with one item per sample."""


@st.composite
def batches(draw):
    num_samples = draw(st.integers(0, 12))

    def tensor(*trailing):
        return torch.arange(num_samples * (trailing[0] if trailing else 1)).reshape(num_samples, *trailing)

    def per_sample(kind):
        return kind(PerSample() for _ in range(num_samples))

    shared = st.builds(Shared) | st.builds(torch.tensor, st.integers(0, 9))
    leaves = (
        st.builds(tensor)
        | st.builds(tensor, st.integers(1, 3))
        | st.builds(lambda: tensor(2).numpy())
        | st.builds(
            lambda kind: kind(PerSample() for _ in range(num_samples)), st.sampled_from([list, tuple])
        )
        | shared
        | st.builds(lambda item: [item] * (num_samples + 1), shared)
    )
    # A list or tuple holds a tensor too, so that it is not taken for items per sample.
    nested = st.recursive(
        leaves,
        lambda inner: (
            st.builds(lambda items: [tensor(), *items], st.lists(inner, max_size=3))
            | st.builds(lambda items: (*items, tensor()), st.lists(inner, max_size=3))
            | st.dictionaries(st.text(max_size=2), inner, max_size=3)
            | st.builds(OrderedDict, st.dictionaries(st.integers(), inner, max_size=3))
            | st.builds(Pair, inner, inner)
            | st.builds(Record, inner, inner)
        ),
        max_leaves=8,
    )
    return num_samples, {"x": tensor(), "more": draw(nested)}


def assert_rebuilt(batch, parts):
    """Walk the batch and its chunks in step, by other means than those that are tested."""
    assert {type(part) for part in parts} == {type(batch)}
    if isinstance(batch, torch.Tensor) and batch.ndim:
        assert torch.equal(torch.cat(parts), batch)
        assert all(part.untyped_storage().data_ptr() == batch.untyped_storage().data_ptr() for part in parts)
    elif isinstance(batch, np.ndarray):
        assert np.array_equal(np.concatenate(parts), batch)
    elif isinstance(batch, dict):
        assert all(list(part) == list(batch) for part in parts)
        for key in batch:
            assert_rebuilt(batch[key], [part[key] for part in parts])
    elif isinstance(batch, (Pair, Record)):
        assert_rebuilt(batch.a, [part.a for part in parts])
        assert_rebuilt(batch.b, [part.b for part in parts])
    elif isinstance(batch, (list, tuple)) and all(isinstance(item, PerSample) for item in batch):
        assert [item for part in parts for item in part] == list(batch)
    elif isinstance(batch, (list, tuple)):
        assert {len(part) for part in parts} == {len(batch)}
        for i, item in enumerate(batch):
            assert_rebuilt(item, [part[i] for part in parts])
    else:
        assert all(part is batch for part in parts)


@settings(deadline=None)
@given(batches(), st.integers(1, 14))
def test_chunks_rebuild_the_batch(sized, num_microbatches):
    num_samples, batch = sized
    chunks = split_batch(batch, num_microbatches)
    sizes = [batch_size_of(chunk) for chunk in chunks]
    assert len(chunks) == max(1, min(num_microbatches, num_samples))
    assert sum(sizes) == batch_size_of(batch) == num_samples
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1
    assert_rebuilt(batch, chunks)


@settings(deadline=None)
@given(batches(), st.integers(1, 14))
def test_chunks_by_size_are_as_few_as_fit(sized, microbatch_size):
    num_samples, batch = sized
    splitter = Splitter()
    count = FixedSplit(microbatch_size=microbatch_size).num_chunks(batch, splitter)
    chunks = [chunk.batch for chunk in splitter.split(batch, count)]
    sizes = [batch_size_of(chunk) for chunk in chunks]
    assert sizes[0] <= microbatch_size
    assert (len(sizes) - 1) * microbatch_size < max(num_samples, 1)
    assert sizes[0] - sizes[-1] <= 1
    assert_rebuilt(batch, chunks)
