"""The largest of many are those that a stable sort would put in front."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_memtrain as mt
from lightning_memtrain.sparsity.methods.rules.layer_updates import UpdateTime
from lightning_memtrain.sparsity.pattern_updater import PatternUpdater
from lightning_memtrain.sparsity.radix_select import Level, are_largest, keys_of, level_of_largest

NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, float("inf"), float("nan")])
)


def by_sorting(keys: Tensor, count: int, *, first: bool) -> list[bool]:
    """Which ``count`` keys are the largest; of equal ones the first, or the last."""
    places = sorted(range(len(keys)), key=lambda place: (keys[place].item(), -place if first else place))
    chosen = places[len(keys) - count :]
    return [place in chosen for place in range(len(keys))]


@given(numbers=st.lists(NUMBERS, min_size=1, max_size=40), data=st.data())
def test_they_are_those_of_a_stable_sort(numbers: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(numbers)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    keys = keys_of(torch.tensor(numbers, dtype=dtype))
    assert are_largest(keys, count).tolist() == by_sorting(keys, count, first=False)
    assert are_largest(keys, count, first=True).tolist() == by_sorting(keys, count, first=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_keys_are_in_the_order_of_magnitudes(dtype: torch.dtype) -> None:
    numbers = torch.tensor([0.0, 2**-14, 0.5, 1.0, 3.0, 60_000.0, float("inf"), float("nan")], dtype=dtype)
    keys = keys_of(numbers)
    assert bool((keys.diff() > 0).all())
    assert torch.equal(keys, keys_of(-numbers))
    assert keys.dtype == (torch.int64 if dtype == torch.float64 else torch.int32)


class Operators(TorchDispatchMode):
    """Notes the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_with_an_update_of_rigl_sorts_nothing() -> None:
    """So that its time grows as the number of weights does."""
    torch.manual_seed(0)
    layer, now = nn.Linear(100, 100), UpdateTime(step=1, elapsed=1, total=10)
    updater = PatternUpdater(
        mt.sparsify_(layer, {"weight": torch.arange(0, 10_000, 10)}), mt.sparsity.RigL(0.9)
    )
    optimizer = torch.optim.AdamW(layer.parameters())
    with Operators() as operators:
        updater.watch(now)
        layer(torch.randn(8, 100)).square().sum().backward()
        updater.record_gradients()
        optimizer.step()
        assert updater.update(now, [optimizer]).num_grown > 200
    assert {"bincount", "searchsorted"} <= operators.names
    assert not operators.names & {"sort", "argsort", "topk", "kthvalue", "unique", "_unique2", "unique_dim"}


def test_pieces_count_together_and_may_be_overwritten() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(10_000)
    numbers[:3_000] = 0
    keys = keys_of(numbers)

    def pieces() -> Iterator[Tensor]:
        for piece in keys.split(999):
            yield piece.clone()

    ordered = keys.sort(descending=True).values
    for count in (1, 10, 6_999, 7_000):
        level = level_of_largest(pieces, count)
        assert level == Level(int(ordered[count - 1]), 1, 1)
    assert level_of_largest(pieces, 7_001) == Level(0, 1, 3_000)
    # The first thousand zeros stand for nothing.
    assert level_of_largest(pieces, 7_001, num_void=1_000) == Level(0, 1, 2_000)
    rough = level_of_largest(pieces, 3_000, most_tied=2_000)
    assert 1 < rough.num_equal <= rough.num_tied <= 2_000
    assert int((keys >= rough.key).sum()) == 3_000 - rough.num_equal + rough.num_tied
    assert int(ordered[2_999]) >= rough.key
