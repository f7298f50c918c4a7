"""Codes of 8, 4 and 2 bits: what is kept exactly, and how far off the rest may be."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_memtrain.precision.activations.group_quantization import (
    dequantize,
    dequantize_any,
    pack_bits,
    quantize,
    quantize_any,
    unpack_bits,
)

BITS = [8, 4, 2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
bits = st.sampled_from(BITS)
dtypes = st.sampled_from(DTYPES)
numbers = st.floats(-1e4, 1e4, width=16)
groups_of_numbers = st.lists(st.lists(numbers, min_size=8, max_size=8), min_size=1, max_size=4)


def decoded(values: Tensor, num_bits: int, noise: Tensor | None = None) -> Tensor:
    return dequantize(quantize(values, num_bits, noise), num_bits, values.dtype)


def largest_step(values: Tensor, num_bits: int) -> Tensor:
    """Per group, at most: rounding up to bfloat16, and the smallest step."""
    x = values.double()
    exact = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / (2**num_bits - 1)
    return (exact * (1 + 2**-7)).clamp_min(2**-23 if values.dtype == torch.float16 else 2**-125)


def rounding(values: Tensor) -> Tensor:
    """Of the result to its dtype, and of float32 arithmetic on numbers as large as the group's."""
    dtype_error = 0.0 if values.dtype == torch.float32 else torch.finfo(values.dtype).eps
    return values.double().abs().amax(1, keepdim=True) * (dtype_error + 2**-21)


@given(groups_of_numbers, bits, dtypes)
@settings(deadline=None)
def test_every_number_comes_back_within_half_a_step(
    rows: list[list[float]], num_bits: int, dtype: torch.dtype
) -> None:
    values = torch.tensor(rows).to(dtype)
    error = (decoded(values, num_bits).double() - values.double()).abs()
    begins_at_zero = values.amin(1, keepdim=True) == 0
    allowed = largest_step(values, num_bits) * torch.where(begins_at_zero, 1.0, 0.5)
    assert bool((error <= allowed * 1.001 + rounding(values)).all())


@given(groups_of_numbers, bits, dtypes, st.integers(0, 2**31))
@settings(deadline=None)
def test_what_relu_returns_is_zero_where_it_was_zero_and_only_there(
    rows: list[list[float]], num_bits: int, dtype: torch.dtype, seed: int
) -> None:
    values = torch.tensor(rows).to(dtype).relu()
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed))
    for back in (decoded(values, num_bits), decoded(values, num_bits, noise)):
        assert torch.equal(back == 0, values == 0)
        assert bool((back >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_the_smallest_numbers_of_a_dtype_do_not_become_zero(num_bits: int, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    values = torch.tensor([[0.0, smallest, 3 * smallest, 0.0, 0.0, 0.0, 0.0, 0.0]]).to(dtype)
    assert (values > 0).sum() == 2
    assert torch.equal(decoded(values, num_bits) > 0, values > 0)


@given(st.floats(-6e4, 6e4, width=16), bits, dtypes)
@settings(deadline=None)
def test_constant_groups_are_exact(number: float, num_bits: int, dtype: torch.dtype) -> None:
    values = torch.full((2, 16), number).to(dtype)
    assert torch.equal(decoded(values, num_bits), values)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), bits)
@settings(deadline=None)
def test_bits_come_back_as_they_were_packed(codes: list[int], num_bits: int) -> None:
    given_codes = torch.tensor([codes, codes[::-1]], dtype=torch.uint8)
    packed = pack_bits(given_codes, num_bits)
    assert packed.shape == (2, num_bits)
    assert torch.equal(unpack_bits(packed, num_bits), given_codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_bits", BITS)
def test_infinities_and_nan_are_kept(num_bits: int, dtype: torch.dtype) -> None:
    values = torch.linspace(-1, 1, 16).to(dtype).repeat(3, 1)
    values[1, 3], values[1, 4], values[1, 5] = torch.inf, -torch.inf, torch.nan
    values[2] = -torch.inf
    back = decoded(values, num_bits)
    torch.testing.assert_close(back[1, 3:6], values[1, 3:6], equal_nan=True, rtol=0, atol=0)
    assert torch.equal(back[2], values[2])
    assert torch.equal(back[0], decoded(values[:1], num_bits)[0])
    rest = [0, 1, 2, *range(6, 16)]
    step = 2 / max(2**num_bits - 4, 1) * 1.02
    assert float((back[1, rest].float() - values[1, rest].float()).abs().max()) <= step


def test_an_attention_mask_is_exact_even_in_two_bits() -> None:
    mask = torch.zeros(4, 64).masked_fill(
        torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) < 0.5, -torch.inf
    )
    assert torch.equal(decoded(mask, 2), mask)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_number_of_a_dtype_does_not_become_infinite(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    values = torch.tensor([[-largest, largest, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0]]).to(dtype)
    for num_bits in BITS:
        assert bool(decoded(values, num_bits).isfinite().all())


@given(groups_of_numbers, bits, dtypes, st.booleans())
@settings(deadline=None)
def test_both_forms_give_the_same_codes(
    rows: list[list[float]], num_bits: int, dtype: torch.dtype, has_noise: bool
) -> None:
    values = torch.tensor(rows).to(dtype)
    noise = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) if has_noise else None
    one, other = quantize(values, num_bits, noise), quantize_any(values, num_bits, noise)
    for part, other_part in zip(one, other, strict=True):
        assert torch.equal(part, other_part)
    assert torch.equal(dequantize(one, num_bits, dtype), dequantize_any(one, num_bits, dtype))


@pytest.mark.parametrize("num_bits", BITS)
def test_noise_makes_the_mean_exact(num_bits: int) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 64, generator=generator)
    many = values.repeat(4000, 1)
    noise = torch.rand(many.shape, generator=generator)
    back = decoded(many, num_bits, noise)
    step = float(largest_step(values, num_bits))
    assert float((back - values).abs().max()) <= step
    # The standard deviation of a mean of 4000 draws is below step / 2 / sqrt(4000).
    assert float((back.mean(0) - values[0]).abs().max()) < 4 * step / 2 / 4000**0.5
