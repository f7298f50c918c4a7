from __future__ import annotations

import re
import sys
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import default_collate
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_memtrain.microbatching.splitting.batches import batch_size_of, split_batch
from lightning_memtrain.microbatching.splitting.chunks import FixedSplit, Splitter

CURE = (
    "\nPass `split_fn`, a function from (batch, number of chunks) to a list of chunks, "
    "to say how such a batch is split."
)
X = torch.arange(10).view(5, 2)
Pair = namedtuple("Pair", ["images", "labels"])


@dataclass
class Sample:
    images: torch.Tensor
    name: str = "a"
    mask: torch.Tensor = field(init=False)

    @cached_property
    def total(self) -> int:
        return int(self.images.sum())


@dataclass(frozen=True)
class Frozen:
    images: torch.Tensor


@dataclass(frozen=True, slots=True)
class Slotted:
    images: torch.Tensor


class Opaque:
    """No container, and nothing in it is of the samples."""

    def __init__(self) -> None:
        self.options = {"depth": [1, 2]}


def refusal(batch: object) -> str:
    with pytest.raises(MisconfigurationException) as caught:
        batch_size_of(batch)
    with pytest.raises(MisconfigurationException, match=re.escape(str(caught.value))):
        split_batch(batch, 2)
    return str(caught.value)


# Sizes.


@pytest.mark.parametrize(
    ("num_samples", "num_microbatches", "sizes"),
    [(8, 2, [4, 4]), (7, 3, [3, 2, 2]), (10, 4, [3, 3, 2, 2]), (3, 8, [1, 1, 1]), (1, 2, [1]), (0, 2, [0])],
)
def test_sizes_are_those_of_tensor_split(num_samples: int, num_microbatches: int, sizes: list[int]) -> None:
    chunks = split_batch(torch.arange(num_samples), num_microbatches)
    assert [len(chunk) for chunk in chunks] == sizes
    expected = torch.arange(num_samples).tensor_split(min(num_microbatches, max(num_samples, 1)))
    assert all(torch.equal(*pair) for pair in zip(chunks, expected, strict=True))


@pytest.mark.parametrize(
    ("num_samples", "microbatch_size", "sizes"),
    [(8, 4, [4, 4]), (9, 8, [5, 4]), (10, 4, [4, 3, 3]), (3, 8, [3]), (3, 1, [1, 1, 1]), (0, 2, [0])],
)
def test_no_chunk_exceeds_the_size(num_samples: int, microbatch_size: int, sizes: list[int]) -> None:
    batch, splitter = {"x": torch.arange(num_samples)}, Splitter()
    count = FixedSplit(microbatch_size=microbatch_size).num_chunks(batch, splitter)
    assert [chunk.num_samples for chunk in splitter.split(batch, count)] == sizes


@pytest.mark.parametrize("num_samples", [0, 1])
def test_a_batch_that_is_not_divided_is_the_chunk(num_samples: int) -> None:
    batch = {"x": torch.zeros(num_samples, 2)}
    (chunk,) = split_batch(batch, 4)
    assert chunk is batch


def test_one_chunk_is_the_batch_even_if_it_could_not_be_divided() -> None:
    batch = Opaque()
    (chunk,) = split_batch(batch, 1)
    assert chunk is batch


def test_counts_below_one_are_refused() -> None:
    cure = r"Use 1 or more; what there is to save grows with the number of chunks\."
    with pytest.raises(
        ValueError,
        match=r"^`split_batch\(num_microbatches\)` must be at least 1, but got num_microbatches=0\. " + cure,
    ):
        split_batch(X, 0)


# Structures.


def test_tensors_and_arrays_are_not_copied() -> None:
    array = np.arange(5)
    chunks = split_batch((X, [array]), 2)
    for tensor, (part,) in chunks:
        assert tensor.untyped_storage().data_ptr() == X.untyped_storage().data_ptr()
        assert part.base is array
    assert [part.tolist() for _, (part,) in chunks] == [[0, 1, 2], [3, 4]]
    assert chunks[1][0].storage_offset() == 6


@pytest.mark.parametrize(
    "batch",
    [
        (X, X + 1),
        [X, X + 1],
        Pair(X, [X + 1]),
        torch.return_types.max((X, X + 1)),
        {"a": X, 3: (X + 1,)},
        OrderedDict(b=X, a=X + 1),
        UserDict({"a": X}),
        MappingProxyType({"a": X}),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_chunks_have_the_type_of_the_batch(batch: object) -> None:
    chunks = split_batch(batch, 2)
    assert [type(chunk) for chunk in chunks] == [type(batch)] * 2
    assert [batch_size_of(chunk) for chunk in chunks] == [3, 2]
    assert torch.equal(torch.cat([leaf_of(chunk) for chunk in chunks]), X)
    assert leaf_of(batch) is X


def leaf_of(batch: object) -> torch.Tensor:
    """The first tensor."""
    first = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    assert isinstance(first, torch.Tensor)
    return first


def test_a_mapping_keeps_the_order_of_its_keys_and_its_default_factory() -> None:
    first, _ = split_batch(defaultdict(list, {"b": 1, "a": X}), 2)
    assert list(first) == ["b", "a"]
    assert first["absent"] == []


def test_a_subclass_of_list_keeps_its_attributes() -> None:
    class Tagged(list):
        tag = ""

    for items in ([X], list("abcde")):
        tagged = Tagged(items)
        tagged.tag = "t"
        (_, chunk), _ = split_batch((X, tagged), 2)
        assert type(chunk) is Tagged
        assert chunk.tag == "t"
        assert len(tagged) == len(items)


def test_dataclasses_are_copied_without_their_constructor() -> None:
    sample = Sample(X, "b")
    sample.mask = X > 3
    assert sample.total == 45
    first, second = split_batch(sample, 2)
    assert type(first) is Sample
    assert torch.equal(second.images, X[3:])
    assert torch.equal(second.mask, torch.ones(2, 2, dtype=torch.bool))
    assert (first.name, second.name) == ("b", "b")
    assert (first.total, second.total, sample.total) == (15, 30, 45)
    assert sample.images is X


def test_a_field_that_was_never_set_stays_unset() -> None:
    first, _ = split_batch(Sample(X), 2)
    assert not hasattr(first, "mask")


@pytest.mark.parametrize("kind", [Frozen, Slotted])
def test_frozen_dataclasses(kind: type) -> None:
    batch = kind(X)
    first, second = split_batch([batch], 2)
    assert type(first[0]) is kind
    assert torch.equal(first[0].images, X[:3])
    assert torch.equal(second[0].images, X[3:])
    assert batch.images is X


def test_batch_encoding_keeps_the_records_of_its_samples() -> None:
    records = [Opaque() for _ in range(5)]
    batch = BatchEncoding({"input_ids": X}, n_sequences=1)
    batch._encodings = records
    first, second = split_batch(batch, 2)
    assert type(second) is BatchEncoding
    assert torch.equal(second.input_ids, X[3:])
    assert first.encodings == records[:3]
    assert second.encodings == records[3:]
    assert second.n_sequences == 1
    assert batch.encodings is records
    assert split_batch(BatchEncoding({"input_ids": X}), 2)[0].encodings is None


def test_model_output() -> None:
    loss = torch.tensor(1.0)
    batch = SequenceClassifierOutput(loss=loss, logits=X, hidden_states=(X, X + 1))
    _, second = split_batch(batch, 2)
    assert type(second) is SequenceClassifierOutput
    assert list(second) == ["loss", "logits", "hidden_states"]
    assert second.loss is loss
    assert torch.equal(second.logits, X[3:])
    assert torch.equal(second["logits"], X[3:])
    assert torch.equal(second.hidden_states[1], X[3:] + 1)
    assert second.attentions is None
    assert batch.logits is X


# What is per sample, and what is passed through.


@pytest.mark.parametrize(
    "items",
    [list("abcde"), tuple("abcde"), [b"", b"1", None, 4, Path("e")], [Opaque() for _ in range(5)]],
    ids=["strings", "tuple", "mixed", "objects"],
)
def test_as_many_plain_items_as_samples_are_sliced(items: list[object] | tuple[object, ...]) -> None:
    (_, first), (_, second) = split_batch((X, items), 2)
    assert type(first) is type(items)
    assert first == items[:3]
    assert second == items[3:]


def test_strings_of_default_collate_are_sliced() -> None:
    samples = [{"x": torch.tensor(i), "name": f"n{i}", "pair": (f"a{i}", f"b{i}")} for i in range(3)]
    _, second = split_batch(default_collate(samples), 2)
    assert second["x"].tolist() == [2]
    assert second["name"] == ["n2"]
    assert [list(names) for names in second["pair"]] == [["a2"], ["b2"]]


@pytest.mark.parametrize(
    "item",
    [
        torch.tensor(1.0),
        np.array(1.0),
        np.float32(1.0),
        7,
        None,
        "abcde",
        b"abcde",
        ["a", "b"],
        [],
        {},
        {"k": ["a", 1]},
        torch.Size([1, 2, 3, 4, 5]),
        sys.version_info,
        Pair("a", "b"),
        range(5),
        {1, 2, 3, 4, 5},
        Opaque(),
        Sample,
    ],
    ids=lambda value: type(value).__name__,
)
def test_everything_else_is_the_same_object_in_every_chunk(item: object) -> None:
    for chunk in split_batch((X, {"item": item}), 3):
        assert chunk[1]["item"] is item


def test_named_tuples_are_no_lists_of_samples() -> None:
    pair = Pair("a", "b")
    assert all(chunk[1] is pair for chunk in split_batch((X[:2], pair), 2))


# Refusals.


@pytest.mark.parametrize(
    ("batch", "name"),
    [
        ("abc", "str"),
        (Opaque(), "Opaque"),
        (torch.tensor(1.0), "Tensor"),
        ({"ids": [[1, 2], [3, 4]]}, "dict"),
        ([], "list"),
    ],
)
def test_a_batch_without_axis_is_refused(batch: object, name: str) -> None:
    assert refusal(batch) == (
        "The batch must hold a tensor with at least one axis, to be split along the first, "
        f"but got a batch of type `{name}` in which there is none to be seen.{CURE}"
    )


def test_tensors_that_disagree_are_listed() -> None:
    batch = {
        "images": X,
        "labels": [torch.zeros(4), torch.tensor(1)],
        3: Frozen(torch.zeros(5, 1)),
        "pair": Pair(np.zeros((2, 2)), None),
    }
    assert refusal(batch) == (
        "All tensors of the batch must have the same length along their first axis, the samples, but got"
        "\n  batch['images']: (5, 2)"
        "\n  batch['labels'][0]: (4,)"
        "\n  batch[3].images: (5, 1)"
        f"\n  batch['pair'].images: (2, 2){CURE}"
    )


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=layout)
    assert refusal({"ids": nested, "x": torch.zeros(2)}) == (
        "Every item of the batch must allow to be sliced by its first axis, the samples, "
        f"but got batch['ids'], a nested tensor, whose samples differ in shape.{CURE}"
    )


def test_sparse_tensors_are_refused() -> None:
    assert refusal(Frozen(torch.eye(2).to_sparse())) == (
        "Every item of the batch must allow to be sliced by its first axis, the samples, "
        f"but got batch.images, a tensor of layout torch.sparse_coo.{CURE}"
    )


def test_packed_sequences_are_refused() -> None:
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    assert refusal((torch.zeros(5), [packed])) == (
        "Every item of the batch must allow to be sliced by its first axis, the samples, "
        "but got batch[1][0], a PackedSequence, whose first axis runs over time steps and samples together."
        + CURE
    )
