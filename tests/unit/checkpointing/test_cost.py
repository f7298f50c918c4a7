"""What recomputation costs and what it saves, to the FLOP and to the byte."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.models import Step, wide_resnet_step
from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing import (
    Every,
    Full,
    Modules,
    Nested,
    SelectiveOps,
    Sqrt,
    insert_checkpoints,
)
from lightning_memtrain.core import MIB, Category, MemoryBreakdown
from lightning_memtrain.recipes.cifar10_wrn28_2.model import PreactivationBlock
from tests.helpers.recomputed import recomputations

BATCH = 100


def _flops(step: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def _breakdown(step: Step) -> MemoryBreakdown:
    with MemoryLedger(step.model, step.optimizer, step.inputs) as ledger:
        step()
    return ledger.breakdown()


def _inserted(step: Step, policy: Any) -> Step:
    insert_checkpoints(step.model, policy.groups(step.model), policy.contexts)
    return step


def _conv_flops(conv: nn.Conv2d, size: int) -> int:
    """Of a square image with `size` pixels per side after the convolution."""
    return 2 * BATCH * size**2 * conv.weight.numel()


# ---------------------------------------------------------------------- a wide residual network


def test_recomputation_ends_with_the_last_tensor_that_backward_needs() -> None:
    plain = _flops(wide_resnet_step("meta", BATCH))
    step = _inserted(wide_resnet_step("meta", BATCH), Modules(["PreactivationBlock"]))
    again = 0
    for name, block in step.model.named_modules():
        if isinstance(block, PreactivationBlock):
            size = 32 >> (int(name.removeprefix("groups.group")[0]) - 1)
            again += _conv_flops(block.conv1, size)
            # The last convolution's input is all that is needed of it: here the shortcut's, which comes last.
            again += _conv_flops(block.conv2, size) if block.shortcut is not None else 0
    assert _flops(step) == plain + again
    assert round(100 * again / plain, 1) == 19.8


def test_peak_and_recomputed_bytes_are_those_of_torch() -> None:
    ours = _inserted(wide_resnet_step("meta", BATCH), Modules(["PreactivationBlock"]))
    torchs = wide_resnet_step("meta", BATCH, checkpointed=True)
    peaks = []
    for _ in range(2):  # the first step has no state of the optimizer yet
        mine, theirs = _breakdown(ours), _breakdown(torchs)
        assert mine.at_peak == theirs.at_peak
        assert mine.recomputed_max_bytes == theirs.recomputed_max_bytes == 39_322_112
        assert mine.recomputed_at_peak_bytes == theirs.recomputed_at_peak_bytes
        peaks.append(round(mine.peak_bytes / MIB, 2))
    assert peaks == [130.90, 136.50]
    assert _flops(ours) == _flops(torchs)


@pytest.mark.parametrize(
    ("policy", "peak_mib"),
    [(Full(), 130.90), (Every(2), 241.17), (Sqrt(), 237.15), (Nested(), 106.04), (SelectiveOps(), 310.48)],
)
def test_each_policy_lowers_the_peak(policy: Any, peak_mib: float) -> None:
    plain, less = (wide_resnet_step("meta", BATCH) for _ in range(2))
    assert round(_breakdown(plain).peak_bytes / MIB, 2) == 375.55
    assert round(_breakdown(_inserted(less, policy)).peak_bytes / MIB, 2) == peak_mib


def test_costly_operators_are_not_run_again() -> None:
    step = _inserted(wide_resnet_step("meta", BATCH), SelectiveOps())
    assert _flops(step) == _flops(wide_resnet_step("meta", BATCH))


# ---------------------------------------------------------------------- a deep chain

WIDTH, ROWS = 64, 256
UNIT_BYTES = 4 * WIDTH * ROWS
LINEAR_FLOPS = 2 * ROWS * WIDTH * WIDTH


def _chain(num_layers: int) -> Step:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(num_layers)))
        batch = torch.randn(ROWS, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Step(model, optimizer, (batch,), lambda model, batch: model(batch).square().mean())


# Forward, gradient of the weight, and of the input but in the first block.
PLAIN = {n: 3 * n - 1 for n in (16, 64, 256)}


@pytest.mark.parametrize("num_layers", PLAIN)
def test_one_block_at_a_time_keeps_an_input_per_block(num_layers: int) -> None:
    step = _inserted(_chain(num_layers), Full())
    breakdown = _breakdown(step)
    # All but the batch itself, and what is recomputed last.
    assert breakdown.maxima[Category.ACTIVATIONS] == num_layers * UNIT_BYTES
    assert breakdown.recomputed_max_bytes == UNIT_BYTES
    assert _flops(step) == (PLAIN[num_layers] + num_layers) * LINEAR_FLOPS


@pytest.mark.parametrize("num_layers", PLAIN)
def test_segments_keep_twice_the_square_root(num_layers: int) -> None:
    step = _inserted(_chain(num_layers), Sqrt())
    root = math.isqrt(num_layers)
    breakdown = _breakdown(step)
    # An input per segment but the first, and one segment.
    assert breakdown.maxima[Category.ACTIVATIONS] == (2 * root - 1) * UNIT_BYTES
    assert breakdown.recomputed_max_bytes == root * UNIT_BYTES
    assert _flops(step) == (PLAIN[num_layers] + num_layers) * LINEAR_FLOPS


@pytest.mark.parametrize("num_layers", PLAIN)
def test_levels_keep_the_logarithm(num_layers: int) -> None:
    step = _inserted(_chain(num_layers), Nested())
    depth = round(math.log2(num_layers))
    with recomputations() as names:
        breakdown = _breakdown(step)
    # An input per level and one block.
    assert (
        breakdown.maxima[Category.ACTIVATIONS] == breakdown.recomputed_max_bytes == (depth + 1) * UNIT_BYTES
    )
    # A block runs once more for each level in which it lies in the first half, and once for itself.
    runs = Counter(names)
    assert [runs[str(i)] for i in range(num_layers)] == [1 + depth - i.bit_count() for i in range(num_layers)]
    assert _flops(step) == (PLAIN[num_layers] + num_layers + depth * num_layers // 2) * LINEAR_FLOPS


@pytest.mark.parametrize(("num_parts", "most_kept", "num_runs"), [(4, 10, 208), (8, 15, 176), (64, 64, 127)])
def test_wider_levels_keep_more_and_run_less(num_parts: int, most_kept: int, num_runs: int) -> None:
    step = _inserted(_chain(64), Nested(num_parts))
    with recomputations() as names:
        breakdown = _breakdown(step)
    assert breakdown.maxima[Category.ACTIVATIONS] == most_kept * UNIT_BYTES
    assert len(names) == num_runs
    assert _flops(step) == (PLAIN[64] + num_runs) * LINEAR_FLOPS


@pytest.mark.parametrize("num_layers", [7, 12, 50])
def test_chains_of_any_length_have_even_segments(num_layers: int) -> None:
    model = _chain(num_layers).model
    lengths = [len(group) for group in Sqrt().groups(model)]
    assert sum(lengths) == num_layers
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == round(math.sqrt(num_layers))
    (levels,) = Nested().groups(model)
    assert len({one.path for one in levels}) == num_layers
    assert {len(one.path) for one in levels} <= {
        math.ceil(math.log2(num_layers)),
        math.floor(math.log2(num_layers)),
    }


def test_what_needs_no_gradient_costs_nothing() -> None:
    def frozen() -> Step:
        step = _chain(16)
        for block in step.model[:8]:
            block.requires_grad_(False)
        step.optimizer = torch.optim.SGD([p for p in step.model.parameters() if p.requires_grad])
        return step

    step = _inserted(frozen(), Full())
    with recomputations() as names:
        assert _flops(step) == _flops(frozen()) + 8 * LINEAR_FLOPS
    assert sorted(map(int, names)) == [*range(8, 16)]
