"""Patterns: exact bytes, and every position comes back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_memtrain.sparsity.storage.patterns import (
    Span,
    Storage,
    decode,
    encode,
    pattern_bytes,
    resolve_storage,
    storage_of,
)

STORAGES: tuple[Storage, ...] = ("bitmask", "int32", "block16")


def whole(numel: int, nnz: int) -> Span:
    return Span(0, numel, 0, nnz)


def random_positions(numel: int, nnz: int, seed: int = 0) -> torch.Tensor:
    return torch.randperm(numel, generator=torch.Generator().manual_seed(seed))[:nnz].sort().values


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("numel", "nnz"),
    [(1, 0), (1, 1), (7, 3), (8, 8), (9, 1), (300, 30), (65536, 500), (65537, 6000), (200_000, 20_000)],
)
def test_positions_come_back_from_exactly_so_many_bytes(storage: Storage, numel: int, nnz: int) -> None:
    positions = random_positions(numel, nnz)
    pattern = encode(positions, numel, storage)
    assert storage_of(pattern) == storage
    assert pattern.nbytes == pattern_bytes(storage, numel, nnz)
    decoded = decode(pattern, numel, whole(numel, nnz))
    assert decoded.dtype == torch.int32
    assert torch.equal(decoded.long(), positions)


def test_bytes() -> None:
    assert pattern_bytes("bitmask", 589_824, 1) == 73_728
    assert pattern_bytes("int32", 589_824, 58_982) == 235_928
    assert pattern_bytes("block16", 589_824, 58_982) == 117_964 + 8 * 4
    assert pattern_bytes("block16", 65_536, 100) == 200  # one block needs no start


@pytest.mark.parametrize(
    ("numel", "nnz", "storage"),
    [
        (65_536, 0, "int32"),
        (65_536, 4095, "block16"),
        (65_536, 4097, "bitmask"),
        (1 << 20, 30, "int32"),  # the starts of 15 blocks take 60 bytes
        (1 << 20, 31, "block16"),
        (1 << 20, 65_505, "block16"),
        (1 << 20, 65_507, "bitmask"),
    ],
)
def test_auto_takes_the_fewest_bytes(numel: int, nnz: int, storage: Storage) -> None:
    chosen = resolve_storage("auto", numel, nnz)
    assert chosen == storage
    assert pattern_bytes(chosen, numel, nnz) == min(pattern_bytes(form, numel, nnz) for form in STORAGES)
    assert encode(random_positions(numel, nnz), numel, "auto").nbytes == pattern_bytes("auto", numel, nnz)


def test_an_unknown_storage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'bitmask', 'int32', 'block16', but got storage='csr'"):
        resolve_storage("csr", 10, 1)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(
    data=st.data(),
    storage=st.sampled_from(STORAGES),
    numel=st.one_of(st.integers(1, 300), st.integers(65_000, 140_000)),
)
def test_any_positions_come_back_whole_and_in_spans(
    data: st.DataObject, storage: Storage, numel: int
) -> None:
    chosen = data.draw(st.sets(st.integers(0, numel - 1), max_size=60))
    positions = torch.tensor(sorted(chosen), dtype=torch.int64)
    pattern = encode(positions, numel, storage)
    assert torch.equal(decode(pattern, numel, whole(numel, len(positions))).long(), positions)
    border = 8 * data.draw(st.integers(0, numel // 8))
    middle = int((positions < border).sum())
    parts = [Span(0, border, 0, middle), Span(border, numel, middle, len(positions))]
    found = torch.cat([decode(pattern, numel, part).long() + part.position_start for part in parts])
    assert torch.equal(found, positions)


@pytest.mark.parametrize("storage", STORAGES)
def test_without_data_a_pattern_has_the_same_form(storage: Storage) -> None:
    numel, nnz = 200_000, 20_000
    positions = random_positions(numel, nnz)
    fake = FakeTensorMode()
    for mode, without_data in ((nullcontext(), positions.to("meta")), (fake, fake.from_tensor(positions))):
        with mode:
            pattern = encode(without_data, numel, storage)
            decoded = decode(pattern, numel, whole(numel, nnz))
        assert pattern.nbytes == pattern_bytes(storage, numel, nnz)
        assert (decoded.shape, decoded.dtype) == ((nnz,), torch.int32)
    assert torch.equal(
        decode(encode(positions, numel, storage), numel, whole(numel, nnz)).long(), positions
    )  # and a fake tensor has left nothing behind
