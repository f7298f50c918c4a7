"""Recomputing modules whose parameters are spread over two gloo processes equals not doing so, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from lightning_memtrain.checkpointing import Full, Nested, Recomputed, Sqrt, insert_checkpoints
from tests.helpers.recomputed import recomputations
from tests.helpers.two_ranks import TwoRanks

pytestmark = pytest.mark.slow

WIDTH = 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.up(self.norm(x)).relu()))


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Block() for _ in range(4)), nn.Linear(WIDTH, 1))


def _around_blocks(net: nn.Module, **options: Any) -> nn.Module:
    for block in net[1:5]:
        fully_shard(block, **options)
    return fully_shard(net, **options)


def _inside_blocks(net: nn.Module) -> nn.Module:
    for block in net[1:5]:
        fully_shard(block.up)
        fully_shard(block.down)
    return fully_shard(net)


def _around_all(net: nn.Module) -> nn.Module:
    return fully_shard(net)


def _both(net: nn.Module) -> nn.Module:
    for block in net[1:5]:
        fully_shard(block.up)
        fully_shard(block)
    return fully_shard(net)


def _kept_whole(net: nn.Module) -> nn.Module:
    return _around_blocks(net, reshard_after_forward=False)


def _in_bfloat16(net: nn.Module) -> nn.Module:
    return _around_blocks(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def _first_version(net: nn.Module) -> nn.Module:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        net, auto_wrap_policy=ModuleWrapPolicy({Block}), use_orig_params=True, device_id=cpu
    )


def _first_version_flat(net: nn.Module) -> nn.Module:
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(net, auto_wrap_policy=ModuleWrapPolicy({Block}), device_id=cpu)


def _parallel_tensors(net: nn.Module) -> nn.Module:
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in net[1:5]:
        parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
    return net


def _replicated(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def _alone(net: nn.Module) -> list[list[Recomputed]]:
    return Full().groups(net)


def _segments(net: nn.Module) -> list[list[Recomputed]]:
    return Sqrt().groups(net)


def _levels(net: nn.Module) -> list[list[Recomputed]]:
    return Nested().groups(net)


Prepare = Callable[[nn.Module], nn.Module]
Groups = Callable[[nn.Module], list[list[Recomputed]]]
CASES: dict[str, tuple[Prepare, Groups]] = {
    f"{prepare.__name__} {groups.__name__}": (prepare, groups)
    for prepare in (
        _around_blocks,
        _inside_blocks,
        _around_all,
        _both,
        _kept_whole,
        _in_bfloat16,
        _first_version,
        _first_version_flat,
        _parallel_tensors,
        _replicated,
    )
    for groups in (_alone, _segments, _levels)
}


def _whole(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim).to_local()
    return tensor.detach().clone()


@cache  # without groups it is asked for by several cases
def _train(prepare: Prepare, make_groups: Groups | None) -> tuple[list[Tensor], list[str]]:
    torch.manual_seed(0)
    net = prepare(_net())
    if make_groups is not None:
        insert_checkpoints(net, make_groups(net))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 if prepare is _parallel_tensors else dist.get_rank())
    seen = []
    with recomputations() as recomputed:
        for _ in range(3):
            optimizer.zero_grad()
            loss = net(torch.randn(6, WIDTH)).square().mean()
            loss.backward()
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            assert gradients
            seen += [_whole(tensor) for tensor in (loss, *gradients)]
            optimizer.step()
    return seen + [_whole(parameter) for parameter in net.parameters()], recomputed


def _check(name: str, folder: Path, rank: int) -> list[str]:
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=2)
    prepare, make_groups = CASES[name]
    plain, none = _train(prepare, None)
    with_checkpoints, recomputed = _train(prepare, make_groups)
    assert none == []
    for one, other in zip(plain, with_checkpoints, strict=True):
        assert torch.equal(one, other)
    return recomputed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRanks]:
    """What each rank found, by case."""
    with TwoRanks(_check, tmp_path_factory.mktemp("two_processes")) as ranks:
        yield ranks


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_train_as_without_recomputing(name: str, found: TwoRanks) -> None:
    for result in found(name):
        assert isinstance(result, list), result
        assert len(result) >= 3 * 4
        assert len(set(result)) == 4
