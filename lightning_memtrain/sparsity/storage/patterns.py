r"""Which entries of a weight are stored, in as few bytes as it takes.

Of a weight of :math:`N` entries, :math:`n` are stored. Three forms say which, and all keep them in ascending
order of their flat position, so that the same entries always make the same bytes:

=========  ======  ============================================  ===================================
storage    dtype   holds                                         bytes
=========  ======  ============================================  ===================================
bitmask    uint8   one bit per entry of the weight               :math:`\lceil N / 8 \rceil`
block16    int16   positions within blocks of 65536 entries      :math:`2 n + 4 (N / 65536 - 1)`
int32      int32   positions                                     :math:`4 n`
=========  ======  ============================================  ===================================

The dtype tells them apart, so a pattern is one plain tensor, wherever it goes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_memtrain.core import ArgumentError

Storage = Literal["auto", "bitmask", "int32", "block16"]

_BLOCK_NUMEL = 1 << 16
_DTYPES = {"int32": torch.int32, "block16": torch.int16, "bitmask": torch.uint8}
_STORAGES: dict[torch.dtype, Storage] = {
    torch.int32: "int32",
    torch.int16: "block16",
    torch.uint8: "bitmask",
}


class Span(NamedTuple):
    """A run of a weight's flat positions, and the run of stored values that lie in it.

    Args:
        position_start: position that it begins with; a multiple of 8.
        position_stop: position behind its end.
        value_start: number of stored values before it.
        value_stop: number of stored values up to its end.
    """

    position_start: int
    position_stop: int
    value_start: int
    value_stop: int


def pattern_bytes(storage: Storage, numel: int, nnz: int) -> int:
    """How many bytes a pattern takes.

    Args:
        storage: which form; ``"auto"`` for the one with fewest bytes.
        numel: entries of the weight.
        nnz: entries that are stored.

    Returns:
        Exact bytes.

    Example:
        >>> [pattern_bytes(storage, 1_000_000, 50_000) for storage in ("bitmask", "int32", "block16")]
        [125000, 200000, 100060]
    """
    if storage == "auto":
        storage = resolve_storage(storage, numel, nnz)
    if storage == "bitmask":
        return -(-numel // 8)
    if storage == "int32":
        return 4 * nnz
    return 2 * nnz + 4 * _num_inner_starts(numel)


def resolve_storage(storage: Storage, numel: int, nnz: int) -> Storage:
    """Choose the form of a pattern, where ``"auto"`` leaves it open.

    Args:
        storage: a form, or ``"auto"`` for the one with fewest bytes; of two as small, the faster one.
        numel: entries of the weight.
        nnz: entries that are stored.

    Returns:
        A form other than ``"auto"``.

    Raises:
        ArgumentError: if there is no such form.
    """
    if storage not in get_args(Storage):
        raise ArgumentError(
            f"`storage` must be one of {', '.join(map(repr, get_args(Storage)))}, but got "
            f"storage={storage!r}. "
            'Use "auto" for the fewest bytes.'
        )
    if storage != "auto":
        return storage
    return min(_STORAGES.values(), key=lambda form: pattern_bytes(form, numel, nnz))


def storage_of(pattern: Tensor) -> Storage:
    """The form that a pattern has.

    Args:
        pattern: of :func:`encode`.

    Returns:
        A form other than ``"auto"``.
    """
    return _STORAGES[pattern.dtype]


def encode(positions: Tensor, numel: int, storage: Storage) -> Tensor:
    """Write positions in one of the three forms.

    Args:
        positions: int64 ``(nnz,)``, ascending, without repetition, from 0 to ``numel - 1``.
        numel: entries of the weight, fewer than 2**31.
        storage: which form; ``"auto"`` for the one with fewest bytes.

    Returns:
        One tensor of one axis, uint8, int16 or int32 by its form, on the device of ``positions``.

    Example:
        >>> encode(torch.tensor([0, 3, 9]), 12, "bitmask")
        tensor([9, 2], dtype=torch.uint8)
    """
    storage = resolve_storage(storage, numel, positions.numel())
    if storage == "int32":
        return positions.int()
    if storage == "bitmask":
        # Each bit is added at most once, so that the sum is the union.
        bits = torch.ones_like(positions).bitwise_left_shift_(positions & 7).to(torch.uint8)
        return bits.new_zeros(-(-numel // 8)).index_add_(0, positions >> 3, bits)
    offsets = (positions & (_BLOCK_NUMEL - 1)).int()
    offsets = torch.where(offsets < _BLOCK_NUMEL // 2, offsets, offsets - _BLOCK_NUMEL).to(torch.int16)
    if not _num_inner_starts(numel):
        return offsets
    borders = torch.arange(1, _num_inner_starts(numel) + 1, device=positions.device) * _BLOCK_NUMEL
    starts = torch.searchsorted(positions, borders).int()
    return torch.cat([starts.view(torch.int16), offsets])


def decode(pattern: Tensor, numel: int, span: Span) -> Tensor:
    """The positions of a pattern, without a tensor of the size of the weight and without a synchronisation.

    Args:
        pattern: of :func:`encode`.
        numel: entries of the weight.
        span: the part that is asked for.

    Returns:
        Int32 of one axis, ascending, counted from the first position of ``span``.

    Example:
        >>> pattern = encode(torch.tensor([0, 3, 9]), 12, "bitmask")
        >>> decode(pattern, 12, Span(0, 12, 0, 3)).tolist()
        [0, 3, 9]
        >>> decode(pattern, 12, Span(8, 12, 2, 3)).tolist()
        [1]
    """
    nnz = span.value_stop - span.value_start
    if pattern.dtype == torch.uint8:
        return _bits_set(
            pattern[span.position_start // 8 : -(-span.position_stop // 8)],
            span.value_stop - span.value_start,
        )
    if pattern.dtype == torch.int32:
        positions = pattern[span.value_start : span.value_stop]
        return positions - span.position_start if span.position_start else positions
    header = 2 * _num_inner_starts(numel)
    offsets = (
        pattern[header + span.value_start : header + span.value_stop].int().bitwise_and_(_BLOCK_NUMEL - 1)
    )
    if not header:
        return offsets.sub_(span.position_start)
    # Of the values in the span, those of each block: between where it starts and where the next one does.
    starts = pattern[:header].view(torch.int32).clamp(span.value_start, span.value_stop)
    borders = torch.cat(
        [starts.new_full((1,), span.value_start), starts, starts.new_full((1,), span.value_stop)]
    )
    blocks = torch.arange(len(borders) - 1, dtype=torch.int32, device=pattern.device)
    bases = blocks.mul_(_BLOCK_NUMEL).sub_(span.position_start)
    return offsets.add_(bases.repeat_interleave(borders.diff(), output_size=nnz))


def pattern_fault(pattern: Tensor, values: Tensor, shape: Sequence[int]) -> str | None:
    """Why a saved pattern cannot be that of a weight.

    Args:
        pattern: of any dtype and shape, which was read from somewhere.
        values: that were saved with it.
        shape: of the dense weight.

    Returns:
        What is wrong with it, to go behind its name, or ``None``.
    """
    numel, nnz = math.prod(shape), values.numel()
    if pattern.dtype not in _STORAGES or values.dim() != 1:
        return f"must be uint8, int16 or int32 with values of one axis, but got {pattern.dtype}."
    if pattern.nbytes != pattern_bytes(storage_of(pattern), numel, nnz) or nnz > numel:
        return (
            f"has {pattern.nbytes} bytes, which is no {storage_of(pattern)} pattern of {nnz} of the "
            f"{numel} entries of a weight of shape {tuple(shape)}. Was it saved from another model?"
        )
    if pattern.is_meta:
        return None
    if pattern.dtype == torch.uint8:
        set_bits = sum((pattern >> bit & 1).sum(dtype=torch.int64) for bit in range(8))
        if set_bits != nnz:
            return f"has {set_bits} positions for {nnz} values: it is damaged."
    positions = decode(pattern, numel, Span(0, numel, 0, nnz))
    if nnz and (positions[0] < 0 or positions[-1] >= numel or not (positions.diff() > 0).all()):
        return f"has positions that do not ascend from 0 to {numel - 1}: it is damaged."
    return None


def _num_inner_starts(numel: int) -> int:
    """How many blocks begin behind the first one, whose start needs no number."""
    return max(0, -(-numel // _BLOCK_NUMEL) - 1)


def _bits_set(mask: Tensor, count: int) -> Tensor:
    """Numbers of the bits that are set, ``count`` of them.

    ``nonzero`` takes one branch per bit, which no processor can guess; here there is none, and no tensor has
    more entries than there are bytes or bits that are set.
    """
    counts, ends_in_table, bits = _tables(mask)
    codes = mask.int()
    ends = counts.index_select(0, codes).cumsum(0, dtype=torch.int32)
    # A byte's bits stand in `bits` in a row, and those of the mask come in a row, too: from the number of the
    # one to the number of the other it is the same way for all bits of a byte.
    shifts = ends_in_table.index_select(0, codes).sub_(ends)
    # The byte of each bit is the number of bytes that end before it.
    ended = ends.new_zeros(count + 1).index_add_(0, ends, ends.new_ones(1).expand(len(ends)))
    byte = ended.cumsum(0, dtype=torch.int32)[:count]
    number = torch.arange(count, dtype=torch.int32, device=mask.device).add_(shifts.index_select(0, byte))
    return bits.index_select(0, number).add_(byte, alpha=8)


_BYTES_BITS = [[bit for bit in range(8) if byte >> bit & 1] for byte in range(256)]
_cached_tables: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}


def _tables(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the 256 bytes: how many bits are set, where their bits end in the third table, and these bits."""
    if mask.device in _cached_tables and type(mask) is Tensor:
        return _cached_tables[mask.device]
    counts = torch.tensor([len(bits) for bits in _BYTES_BITS], dtype=torch.uint8, device=mask.device)
    flat = torch.tensor([bit for bits in _BYTES_BITS for bit in bits], dtype=torch.int32, device=mask.device)
    tables = counts, counts.cumsum(0, dtype=torch.int32), flat
    if type(counts) is Tensor:  # a fake tensor must not outlive its mode
        _cached_tables[mask.device] = tables
    return tables
