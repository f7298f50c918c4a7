"""Candidates: the largest dense gradients, without a dense gradient that is kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memtrain import MemoryLedger, sparsify_
from lightning_memtrain.sparsity import watch_candidates
from lightning_memtrain.sparsity.storage import candidate_search as candidates


def dense_gradient(layer: nn.Module, inputs: list[Tensor]) -> Tensor:
    """Of the dense weight, summed over the inputs."""
    dense = layer.weight.detach().clone().requires_grad_()
    for x in inputs:
        if isinstance(layer, nn.Linear):
            output = nn.functional.linear(x, dense, layer.bias)
        else:
            output = nn.functional.conv2d(x, dense, layer.bias, layer.stride, layer.padding)
        output.pow(2).sum().backward()
    return dense.grad.view(-1)


def best(gradient: Tensor, active: Tensor, count: int) -> Tensor:
    return gradient.abs().index_fill(0, active, -1).topk(count).indices.sort().values


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, Any]]] = {
    "linear": (nn.Linear(30, 40), (6, 30), {}),
    "linear in chunks": (nn.Linear(30, 40), (6, 30), {"chunk_bytes": 1}),
    "conv2d": (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 6), {}),
}


@pytest.mark.parametrize("piece_numel", [1 << 18, 100])
@pytest.mark.parametrize("name", LAYERS)
def test_the_largest_gradients_that_are_not_stored(
    name: str, piece_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_PIECE_NUMEL", piece_numel)
    layer, shape, options = LAYERS[name]
    layer = copy.deepcopy(layer)
    torch.manual_seed(0)
    active = torch.randperm(layer.weight.numel())[:200]
    weights = sparsify_(layer, {"weight": active}, **options)
    x = torch.randn(shape)
    with watch_candidates(weights, {"weight": 50}) as watch:
        layer(x).pow(2).sum().backward()
    found = watch.candidates("weight")
    gradient = dense_gradient(layer, [x])
    assert torch.equal(found.positions, best(gradient, active, 50))
    assert found.positions.dtype == torch.int64
    assert found.gradients.dtype == torch.float32
    torch.testing.assert_close(found.gradients, gradient[found.positions])
    torch.testing.assert_close(layer.values.grad, gradient[active.sort().values])


@pytest.mark.parametrize("name", LAYERS)
def test_the_first_pass_picks_and_the_others_add_up(name: str) -> None:
    layer, shape, options = LAYERS[name]
    layer = copy.deepcopy(layer)
    torch.manual_seed(0)
    active = torch.randperm(layer.weight.numel())[:200]
    weights = sparsify_(layer, {"weight": active}, **options)
    inputs = [torch.randn(shape) for _ in range(3)]
    with watch_candidates(weights, {"weight": 50}) as watch:
        for x in inputs:
            layer(x).pow(2).sum().backward()
    found = watch.candidates("weight")
    assert torch.equal(found.positions, best(dense_gradient(layer, inputs[:1]), active, 50))
    torch.testing.assert_close(found.gradients, dense_gradient(layer, inputs)[found.positions])


def test_fewer_places_than_asked_for_and_none() -> None:
    for active, count in ((torch.arange(9), 3), (torch.arange(12), 0)):
        layer = nn.Linear(4, 3)
        weights = sparsify_(layer, {"weight": active})
        with watch_candidates(weights, {"weight": 50}) as watch:
            layer(torch.randn(2, 4)).sum().backward()
        assert watch.candidates("weight").positions.tolist() == list(range(12 - count, 12))


def test_a_recomputed_layer_is_seen_once() -> None:
    layer = nn.Linear(4, 3)
    weights = sparsify_(layer, {"weight": torch.arange(3)})
    x = torch.randn(2, 4, requires_grad=True)
    with watch_candidates(weights, {"weight": 9}) as watch:
        checkpoint(lambda t: layer(t).pow(2).sum(), x, use_reentrant=False).backward()
    found = watch.candidates("weight")
    torch.testing.assert_close(found.gradients, dense_gradient(layer, [x.detach()])[3:])


def test_gradients_that_are_not_finite_can_be_seen() -> None:
    layer = nn.Linear(4, 3)
    weights = sparsify_(layer, {"weight": torch.arange(3)})
    x = torch.ones(1, 4)
    x[0, 3] = torch.nan
    with watch_candidates(weights, {"weight": 3}) as watch:
        layer(x).sum().backward()
    assert not watch.candidates("weight").gradients.isfinite().any()


def test_under_autocast_gradients_are_float32() -> None:
    layer = nn.Linear(4, 3)
    weights = sparsify_(layer, {"weight": torch.arange(3)})
    with watch_candidates(weights, {"weight": 3}) as watch, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.ones(1, 4)).sum().backward()
    assert watch.candidates("weight").gradients.dtype == torch.float32


def test_the_watch_ends() -> None:
    layer = nn.Linear(4, 3)
    weights = sparsify_(layer, {"weight": torch.arange(3)})
    watch = watch_candidates(weights, {"weight": 2})
    layer(torch.ones(1, 4)).sum().backward()
    first = watch.candidates("weight").gradients.clone()
    watch.close()
    watch.close()
    layer(torch.ones(1, 4)).sum().backward()
    assert torch.equal(watch.candidates("weight").gradients, first)
    assert layer.search is None
    with watch_candidates(weights, {"weight": 1}) as another:
        layer(torch.ones(1, 4)).sum().backward()
    assert len(another.candidates("weight").positions) == 1


def test_a_copy_is_not_watched() -> None:
    layer = nn.Linear(4, 3)
    weights = sparsify_(layer, {"weight": torch.arange(3)})
    with watch_candidates(weights, {"weight": 2}):
        assert copy.deepcopy(layer).search is None


def test_no_backward_no_candidates() -> None:
    layer = nn.Linear(4, 3)
    weights = sparsify_(layer, {"weight": torch.arange(3)})
    with (
        watch_candidates(weights, {"weight": 2}) as watch,
        pytest.raises(RuntimeError, match="No candidates for 'weight': no backward came"),
    ):
        watch.candidates("weight")


@pytest.mark.parametrize(
    ("num_candidates", "message"),
    [
        ({"head": 1}, "must name sparse weights, but got 'head'. There are 'weight'"),
        ({"weight": 0}, "must be at least 1, but got 0 for 'weight'"),
    ],
)
def test_wrong_arguments_are_refused(num_candidates: dict[str, int], message: str) -> None:
    weights = sparsify_(nn.Linear(4, 3), {"weight": torch.arange(3)})
    with pytest.raises(ValueError, match=message):
        watch_candidates(weights, num_candidates)


def test_two_watches_of_one_weight_are_refused() -> None:
    weights = sparsify_(nn.Linear(4, 3), {"weight": torch.arange(3)})
    with (
        watch_candidates(weights, {"weight": 1}),
        pytest.raises(ValueError, match="'weight' is watched already"),
    ):
        watch_candidates(weights, {"weight": 1})


def test_nothing_of_the_size_of_the_weight_is_kept() -> None:
    layer = nn.Linear(1024, 1024, bias=False)
    weights = sparsify_(layer, {"weight": torch.arange(0, 1 << 20, 20)})
    x = torch.randn(2, 1024)
    peaks, held = [], []
    for count in (None, 100):
        layer.zero_grad()
        with MemoryLedger(layer, inputs=x) as ledger:
            watch = watch_candidates(weights, {"weight": count}) if count else None
            layer(x).sum().backward()
            held.append(ledger.current_bytes)
        peaks.append(ledger.breakdown().peak_bytes)
        if watch is not None:
            watch.close()
    assert held[1] - held[0] == 100 * (8 + 4)
    # Beside the dense gradient: the keys of a piece of it, which of them count, and the active ones there.
    assert peaks[1] - peaks[0] < 1.6 * 4 * candidates._PIECE_NUMEL


@pytest.mark.parametrize("piece_numel", [1 << 18, 100])
@pytest.mark.parametrize("num_nonzero", [0, 1, 30, 49, 50, 51, 400])
def test_of_many_equal_gradients_the_first_are_taken(
    num_nonzero: int, piece_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that next to nothing comes through has zeros, more than are asked for."""
    monkeypatch.setattr(candidates, "_PIECE_NUMEL", piece_numel)
    torch.manual_seed(0)
    gradient = torch.zeros(1_000)
    gradient[torch.randperm(1_000)[:num_nonzero]] = torch.randn(num_nonzero)
    active = torch.randperm(1_000)[:200].sort().values
    free = gradient.abs().index_fill(0, active, -1)
    expected = free.sort(descending=True, stable=True).indices[:50].sort().values
    search = candidates.CandidateSearch("weight", 50)
    search.observe(gradient, active.int(), 0)
    search.end_pass()
    assert torch.equal(search.result().positions, expected)
    assert torch.equal(search.result().gradients, gradient[expected])


def test_in_many_chunks_no_more_than_a_few_times_as_many_are_held_as_are_asked_for() -> None:
    torch.manual_seed(0)
    gradient, active = torch.randn(10_000), torch.arange(0, 10_000, 7, dtype=torch.int32)
    search = candidates.CandidateSearch("weight", 40)
    for first in range(0, 10_000, 100):
        here = active[(active >= first) & (active < first + 100)] - first
        search.observe(gradient[first : first + 100], here, first)
        assert sum(len(one.positions) for one in search._best) <= 2 * 40
    search.end_pass()
    assert torch.equal(search.result().positions, best(gradient, active.long(), 40))


def test_what_is_no_number_ranks_before_infinity() -> None:
    gradient = torch.tensor([1.0, float("-inf"), float("nan"), 3.0])
    search = candidates.CandidateSearch("weight", 1)
    search.observe(gradient, torch.empty(0, dtype=torch.int32), 8)
    search.end_pass()
    assert search.result().positions.tolist() == [10]
