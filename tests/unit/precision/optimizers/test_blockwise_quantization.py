"""Blockwise codes in 8 bits: bounded error, exact zeros, nothing hidden."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.precision.optimizers.blockwise_quantization import (
    BLOCK_SIZE,
    dequantize_blockwise,
    num_blocks,
    quantize_blockwise,
)


@settings(max_examples=50, deadline=None)
@given(
    numel=st.integers(1, 1000),
    exponent=st.integers(-20, 30),
    seed=st.integers(0, 2**31),
)
def test_the_error_is_at_most_half_a_scale(numel: int, exponent: int, seed: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scales = quantize_blockwise(values)
    assert (codes.shape, codes.dtype) == (values.shape, torch.int8)
    assert (scales.shape, scales.dtype) == ((num_blocks(numel),), torch.float32)
    bound = scales.repeat_interleave(BLOCK_SIZE)[:numel] * 0.5001
    assert ((dequantize_blockwise(codes, scales) - values).abs() <= bound).all()


def test_zeros_and_the_largest_number_of_a_block_are_exact() -> None:
    values = torch.zeros(2 * BLOCK_SIZE)
    values[7], values[8] = -1.27, 1.27
    codes, scales = quantize_blockwise(values)
    assert (codes[7], codes[8]) == (-127, 127)
    assert torch.equal(dequantize_blockwise(codes, scales)[9:], torch.zeros(2 * BLOCK_SIZE - 9))
    assert scales[1] == 0


def test_numbers_too_small_to_be_divided_by() -> None:
    codes, scales = quantize_blockwise(torch.tensor([1e-45, -1e-45, 0.0]))
    assert dequantize_blockwise(codes, scales).isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_block_that_is_not_finite_stays_undefined_and_others_are_not_touched(value: float) -> None:
    values = torch.ones(2 * BLOCK_SIZE)
    values[3] = value
    decoded = dequantize_blockwise(*quantize_blockwise(values))
    assert decoded[:BLOCK_SIZE].isnan().all()
    assert torch.allclose(decoded[BLOCK_SIZE:], torch.ones(BLOCK_SIZE))
