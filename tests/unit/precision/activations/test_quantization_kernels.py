"""Whole tensors in pieces: shapes, strides and dtypes come back, and compiled codes are the eager ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_memtrain as mt
from lightning_memtrain.precision.activations import quantization_kernels
from lightning_memtrain.precision.activations.memory_order import (
    MemoryOrder,
    empty_like_layout,
    memory_order,
    row_pieces,
)
from lightning_memtrain.precision.activations.quantization_kernels import QuantizationKernels, has_compiler

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "with gaps": lambda x: x[:, 1:3],
    "with gaps within rows": lambda x: x[..., 1:],
    "every second": lambda x: x[..., ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "one axis": lambda x: x[0, 0, 0],
    "scalar": lambda x: x[0, 0, 0, 0],
}


def round_trip(tensor: Tensor, kernels: QuantizationKernels) -> Tensor:
    order = memory_order(tensor)
    assert order is not None
    groups = kernels.quantize(tensor, order, None)
    back = empty_like_layout(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
    kernels.dequantize(groups, back, order._replace(offset=0))
    return back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", LAYOUTS)
def test_shape_strides_and_numbers_come_back(
    name: str, bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization_kernels, "PIECE_CPU", 100)  # many pieces, also of small tensors
    numbers = torch.randint(0, 2**bits, (6, 4, 7, 9), generator=torch.Generator().manual_seed(0))
    numbers.view(-1)[::4], numbers.view(-1)[1::4] = 0, 2**bits - 1
    tensor = LAYOUTS[name](numbers.to(dtype))
    back = round_trip(tensor, QuantizationKernels(bits, 8, compiled=False))
    assert (back.shape, back.stride(), back.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
    assert float((back - tensor).abs().max()) <= 0.51
    if name in ("contiguous", "transposed"):  # every group has its 0 and its largest code
        assert torch.equal(back, tensor)


def test_overlapping_elements_have_no_memory_order() -> None:
    assert memory_order(torch.zeros(10).unfold(0, 4, 1)) is None


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_memory_order_covers_each_element_once(shape: list[int], random: Any) -> None:
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    axes = list(range(len(shape)))
    random.shuffle(axes)
    tensor = tensor.permute(axes)[: max(1, shape[axes[0]] - 1)]
    order = memory_order(tensor)
    assert order is not None
    assert sorted(order.view(tensor).reshape(-1).tolist()) == sorted(tensor.reshape(-1).tolist())


@given(st.integers(1, 50), st.integers(1, 20), st.sampled_from([8, 16]), st.integers(1, 300))
def test_pieces_are_whole_groups_and_cover_all(rows: int, per_row: int, group: int, most: int) -> None:
    pieces = list(row_pieces((rows, per_row), group, most))
    assert [start for start, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == rows
    assert all((end - start) * per_row % group == 0 for start, end in pieces[:-1])


def test_views_of_the_same_elements_have_the_same_order() -> None:
    x = torch.zeros(4, 6, 8)
    assert memory_order(x) == memory_order(x.view(24, 8)) == memory_order(x.transpose(0, 2))
    assert memory_order(x[1:]) == MemoryOrder(48, (144,), (1,))


@pytest.mark.parametrize("num_elements", [1 << 20, (1 << 20) + 5])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_needed_beside_tensor_and_codes_is_a_small_part_of_it(bits: int, num_elements: int) -> None:
    tensor = torch.randn(num_elements, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(1, 1)
    kernels = QuantizationKernels(bits, 64, compiled=False)
    order = memory_order(tensor)
    assert order is not None
    with mt.MemoryLedger(model, inputs=tensor) as ledger:
        groups = kernels.quantize(tensor, order, None)
        stored = sum(part.nbytes for part in groups)
    assert ledger.breakdown().ledger_peak_bytes - 8 - tensor.nbytes - stored < tensor.nbytes / 8
    back = torch.empty_like(tensor)
    with mt.MemoryLedger(model, inputs=(back, groups)) as ledger:
        kernels.dequantize(groups, back, order)
    assert ledger.breakdown().ledger_peak_bytes - 8 - tensor.nbytes - stored < tensor.nbytes / 8


needs_compiler = pytest.mark.skipif(not has_compiler(torch.device("cpu")), reason="needs a C++ compiler")


@functools.cache
def compiled_kernels(bits: int) -> QuantizationKernels:
    """One for all dtypes, as in a run; each of them is compiled in a test of its own."""
    return QuantizationKernels(bits, 64, compiled=True)


@needs_compiler
@pytest.mark.slow
# torch's compiler says so on a CPU with AVX2 alone, and compiles all the same.
@pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_compiled_codes_are_the_eager_ones(bits: int, dtype: torch.dtype) -> None:
    compiled, eager = compiled_kernels(bits), QuantizationKernels(bits, 64, compiled=False)
    generator = torch.Generator().manual_seed(0)
    for size in (64 * 100, 64 * 321 + 7):
        tensor = torch.randn(size, generator=generator)
        tensor[:3000].relu_()
        tensor[5000], tensor[6000], tensor[6001] = torch.inf, torch.nan, -torch.inf
        tensor = tensor.to(dtype)
        order = memory_order(tensor)
        assert order is not None
        for seed in (None, 3):
            noise = [None if seed is None else torch.Generator().manual_seed(seed) for _ in range(2)]
            one, other = (
                compiled.quantize(tensor, order, noise[0]),
                eager.quantize(tensor, order, noise[1]),
            )
            for part, other_part in zip(one, other, strict=True):
                assert torch.equal(part, other_part)
        assert compiled._functions is not None
        if size % 64 == 0:  # on the CPU only eager operations dequantize
            backs = [torch.empty_like(tensor) for _ in range(2)]
            with torch.no_grad():
                compiled._functions[1](one, backs[0].view(-1, 64))
            eager.dequantize(one, backs[1], order)
            torch.testing.assert_close(*backs, rtol=0, atol=0, equal_nan=True)
    assert compiled._compiled is True  # nothing made it give up


def test_a_compiler_that_fails_is_given_up_with_one_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []

    def fail(*_: Any) -> None:
        raise ValueError("no such header\nand much more")

    monkeypatch.setattr(quantization_kernels, "rank_zero_info", notices.append)
    monkeypatch.setattr(quantization_kernels, "has_compiler", lambda device: True)
    monkeypatch.setattr(quantization_kernels, "_compile", lambda bits: (fail, fail))
    kernels = QuantizationKernels(8, 8, compiled=True)
    tensor = torch.arange(256.0)
    torch.testing.assert_close(round_trip(tensor, kernels), tensor, rtol=0, atol=0.02)
    round_trip(tensor, kernels)
    assert notices == [
        "ActivationCodec: the quantizer could not be compiled (ValueError: no such header); eager operations "
        "with the same result, several times slower, are used."
    ]


def test_without_a_compiler_eager_operations_are_used_with_one_notice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notices: list[str] = []
    monkeypatch.setattr(quantization_kernels, "rank_zero_info", notices.append)
    monkeypatch.setattr(quantization_kernels, "has_compiler", lambda device: False)
    monkeypatch.setattr(quantization_kernels, "WORTH_COMPILING", 300)
    kernels = QuantizationKernels(8, 8, compiled=None)
    for _ in range(4):
        round_trip(torch.arange(256.0), kernels)
    assert notices == ["ActivationCodec: quantizing by eager operations, since there is no compiler for cpu."]


def test_nothing_is_compiled_before_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_kernels, "_compile", lambda bits: pytest.fail("compiled"))
    round_trip(torch.arange(256.0), QuantizationKernels(8, 8, compiled=None))
