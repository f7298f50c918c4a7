"""Stochastic rounding: unbiased, exact where it can be, and safe at the edges of a format."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memtrain.precision.optimizers.stochastic_rounding import (
    RoundingNoise,
    stochastic_round,
    stochastic_round_,
)

HALVES = [torch.bfloat16, torch.float16]
NUM_DRAWS = 1_000_000


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ulp(value: float, dtype: torch.dtype) -> float:
    return 2.0 ** math.floor(math.log2(abs(value))) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
@settings(max_examples=8, deadline=None)
@given(
    mantissa=st.floats(1.0, 1.984375),
    exponent=st.integers(-13, 14),
    negative=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_mean_of_a_million_draws_of_spread_values_is_unbiased(
    dtype: torch.dtype, mantissa: float, exponent: int, negative: bool, seed: int
) -> None:
    # Values spread evenly over one ulp: the mean of their errors has a standard deviation of 0.0004 ulp.
    unit = ulp(mantissa * 2.0**exponent, dtype)
    spread = torch.linspace(0, unit, NUM_DRAWS, dtype=torch.float64)
    values = ((mantissa * 2.0**exponent + spread) * (-1 if negative else 1)).float()
    error = (stochastic_round(values, dtype, noise(seed)).double() - values.double()).mean().item()
    assert abs(error) < 0.002 * unit


@pytest.mark.parametrize("dtype", HALVES)
def test_the_mean_error_is_below_a_thousandth_of_an_ulp(dtype: torch.dtype) -> None:
    values = torch.linspace(1, 1.99, NUM_DRAWS)
    error = stochastic_round(values, dtype, noise(1)).double() - values.double()
    assert abs(error.mean().item()) < 0.001 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALVES)
def test_results_are_the_two_neighbours(dtype: torch.dtype) -> None:
    values = torch.randn(100_000, generator=noise(2))
    values = values[values.abs() > torch.finfo(dtype).tiny]
    rounded = stochastic_round(values, dtype, noise(3)).double()
    units = 2.0 ** values.double().abs().log2().floor() * torch.finfo(dtype).eps
    assert ((rounded - values.double()).abs() < units).all()
    assert (rounded.float() != values.to(dtype).float()).float().mean() > 0.2


@pytest.mark.parametrize("dtype", HALVES)
def test_every_number_of_the_format_stays_what_it_is(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = stochastic_round(every.float(), dtype, noise())
    numbers = ~every.isnan()
    assert torch.equal(rounded[numbers].view(torch.int16), every[numbers].view(torch.int16))
    assert rounded[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_not_finite_stays_so_whatever_its_bits(dtype: torch.dtype) -> None:
    patterns = torch.tensor([0x7F800000, -0x00800000, 0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
    values = patterns.to(torch.int32).view(torch.float32).repeat(1000)
    rounded = stochastic_round(values, dtype, noise())
    assert torch.equal(rounded.isnan(), values.isnan())
    assert torch.equal(rounded.isinf(), values.isinf())


@pytest.mark.parametrize("dtype", HALVES)
def test_finite_numbers_become_infinite_only_where_nearest_rounding_makes_them_so(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    just_below = torch.tensor(largest).nextafter(torch.tensor(0.0)).repeat(10_000)
    assert stochastic_round(just_below, dtype, noise()).isfinite().all()
    beyond = torch.tensor([largest, -largest]) * (1 + torch.finfo(dtype).eps / 8)
    assert stochastic_round(beyond.repeat(1000), dtype, noise()).isfinite().all()


def test_float16_subnormals_are_rounded_to_nearest() -> None:
    values = torch.linspace(-(2.0**-14), 2.0**-14, 10_001)[1:-1]
    assert torch.equal(stochastic_round(values, torch.float16, noise()), values.half())


def test_bfloat16_subnormals_are_rounded_without_bias() -> None:
    values = torch.full((NUM_DRAWS,), 2.0**-130 + 2.0**-135)
    mean = stochastic_round(values, torch.bfloat16, noise()).double().mean().item()
    assert mean == pytest.approx(2.0**-130 + 2.0**-135, rel=0.002)


def test_in_place_leaves_no_copy_and_keeps_strides() -> None:
    values = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    address = values.data_ptr()
    rounded = stochastic_round_(values, torch.bfloat16, noise())
    assert rounded.data_ptr() == address
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert rounded.is_contiguous(memory_format=torch.channels_last)


def test_five_thousand_updates_that_nearest_rounding_drops() -> None:
    weights, nearest, generator = torch.ones(500).bfloat16(), torch.ones(500).bfloat16(), noise()
    for _ in range(5000):
        weights = stochastic_round(weights.float() + 1e-4, torch.bfloat16, generator)
        nearest = (nearest.float() + 1e-4).bfloat16()
    assert nearest.unique().tolist() == [1.0]
    assert weights.float().mean().item() == pytest.approx(1.5, abs=0.01)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    generators = RoundingNoise(seed=0)
    stochastic_round(
        torch.randn(10, generator=noise()), torch.bfloat16, generators.generator(torch.device("cpu"))
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_differs_between_steps_and_seeds() -> None:
    cpu = torch.device("cpu")
    drawn = []
    for seed in range(3):
        generators = RoundingNoise(seed)
        for _ in range(3):
            drawn.append(tuple(torch.rand(4, generator=generators.generator(cpu)).tolist()))
            generators.next_step()
    assert len(set(drawn)) == 9


def test_other_formats_are_refused() -> None:
    with pytest.raises(
        TypeError, match=r"must be torch.bfloat16 or torch.float16, but got dtype=torch.float64.*values.to"
    ):
        stochastic_round(torch.ones(2), torch.float64, noise())
    with pytest.raises(TypeError, match=r"must be float32, but got torch.float64. Use `values.float\(\)`"):
        stochastic_round(torch.ones(2, dtype=torch.float64), torch.bfloat16, noise())


def test_noise_begins_anew_with_its_own_seed() -> None:
    cpu = torch.device("cpu")
    noise = RoundingNoise(3)
    noise.next_step()
    first = torch.rand(4, generator=noise.generator(cpu))
    noise.load_state_dict({"seed": 7, "step": 5})
    noise.restart()
    assert noise.state_dict() == {"seed": 3, "step": 0}
    noise.next_step()
    assert torch.equal(torch.rand(4, generator=noise.generator(cpu)), first)


@pytest.mark.parametrize("large", [torch.finfo(torch.bfloat16).max, float("inf"), float("nan")])
def test_one_large_number_changes_nothing_about_the_others(large: float) -> None:
    """Where all are far from the largest number of bfloat16, there is a shorter way."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    values[-1] = large
    with_large = stochastic_round(values, torch.bfloat16, torch.Generator().manual_seed(2))
    values[-1] = 1.0
    without = stochastic_round(values, torch.bfloat16, torch.Generator().manual_seed(2))
    assert torch.equal(with_large[:-1], without[:-1])
    torch.testing.assert_close(with_large[-1].item(), large, equal_nan=True)
