"""Microbatched backward in loops of two gloo processes without a Trainer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lightning_memtrain.microbatching import microbatched_backward
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

CASES: dict[str, dict[str, Any]] = {
    "counted": {"num_microbatches": 3},
    # 10 samples on rank 0 and 13 on rank 1: 3 and 4 chunks.
    "different counts": {"microbatch_size": 4},
    "pooled": {"num_microbatches": 3, "batchnorm": "pooled"},
    "synchronized": {"num_microbatches": 3, "batchnorm": "synchronized", "num_batchnorm_sweeps": 2},
}


def _net(with_batchnorm: bool) -> nn.Module:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(6) if with_batchnorm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 1)).double()


def _check(name: str, folder: Path, rank: int) -> dict[str, Any]:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    arguments = CASES[name]
    rows = torch.randn(10 + 3 * rank, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    whole, split = (DistributedDataParallel(_net("batchnorm" in arguments)) for _ in range(2))
    num_reduced = [0, 0]

    def counts(place: int) -> Any:
        def hook(state, bucket):  # DDP looks at annotations
            num_reduced[place] += 1
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return work.then(lambda future: future.value()[0] / 2)

        return hook

    whole.register_comm_hook(None, counts(0))
    split.register_comm_hook(None, counts(1))

    def loss_fn(batch: Tensor) -> Tensor:
        return split(batch).square().mean()

    for _ in range(2):
        expected = whole(rows).square().mean()
        expected.backward()
        loss = microbatched_backward(split, loss_fn, rows, **arguments)
        if name != "pooled":
            torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
            pairs = zip(whole.parameters(), split.parameters(), strict=True)
            for one, other in pairs:
                torch.testing.assert_close(other.grad, one.grad, rtol=1e-10, atol=1e-13)
        for one, other in zip(whole.buffers(), split.buffers(), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-12, atol=0)
    return {"reduced": num_reduced, "gradients": [p.grad.flatten().tolist() for p in split.parameters()]}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_ranks_average_once_per_batch_what_they_would_without_splitting(name: str, found: TwoRanks) -> None:
    first, second = found(name)
    for result in (first, second):
        assert isinstance(result, dict), result
        num_whole, num_split = result["reduced"]
        assert num_whole == num_split == 2
    assert first["gradients"] == second["gradients"]
