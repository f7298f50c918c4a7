"""A rank that is alone hears itself from all others."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.planning.prediction.ranks.lone_process_group import BACKEND, register


def of_eight(function: Any) -> Any:
    """What a function returns in a process that takes itself for the first of eight."""

    def run() -> Any:
        register()
        dist.init_process_group(BACKEND, rank=0, world_size=8, store=dist.HashStore())  # type: ignore[attr-defined]
        return function()

    return call_in_copy(run)


def test_sums_are_multiples_and_extremes_are_what_was_there() -> None:
    def reduce() -> Any:
        found = []
        for operation in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.MAX, ReduceOp.PRODUCT):
            tensor = torch.tensor([1.0, 2.0])
            dist.all_reduce(tensor, operation)
            found.append(tensor.tolist())
        return found

    assert of_eight(reduce) == [[8, 16], [1, 2], [1, 2], [1, 256]]


def test_what_is_gathered_are_copies() -> None:
    def gather() -> Any:
        tensor = torch.tensor([1, 2])
        copies = [torch.zeros(2, dtype=torch.long) for _ in range(8)]
        dist.all_gather(copies, tensor)
        flat = torch.zeros(16, dtype=torch.long)
        getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(flat, tensor)
        objects: list[Any] = [None] * 8
        dist.all_gather_object(objects, {"rank": dist.get_rank()})
        return [copy.tolist() for copy in copies], flat.tolist(), objects

    assert of_eight(gather) == ([[1, 2]] * 8, [1, 2] * 8, [{"rank": 0}] * 8)


def test_a_rank_gets_its_part_of_a_sum() -> None:
    def scatter() -> Any:
        flat, part = torch.arange(16.0), torch.zeros(2)
        getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)(part, flat)
        listed = torch.zeros(2)
        dist.reduce_scatter(listed, list(flat.chunk(8)), ReduceOp.AVG)
        return part.tolist(), listed.tolist()

    assert of_eight(scatter) == ([0, 8], [0, 1])


def test_everybody_has_what_one_says_and_nobody_is_waited_for() -> None:
    def broadcast() -> Any:
        objects = ["said"]
        dist.broadcast_object_list(objects)
        dist.barrier()
        tensor = torch.ones(2)
        work = dist.broadcast(tensor, 0, async_op=True)
        assert work is not None
        work.wait()
        (result,) = work.get_future().value()
        half = dist.new_group([0, 1, 2, 3])
        dist.all_reduce(tensor, group=half)
        return objects, result is not None, dist.get_world_size(), dist.get_world_size(half), tensor.tolist()

    assert of_eight(broadcast) == (["said"], True, 8, 4, [4, 4])
