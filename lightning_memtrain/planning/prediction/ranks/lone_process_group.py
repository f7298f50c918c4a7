"""A process group of many ranks of which there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_memtrain.compat.torch_private import work_of_future, world_of_process_groups
from lightning_memtrain.tracing.cuda_twin import DEVICE_TYPE

#: What ``init_process_group`` knows it by.
BACKEND = "lone"


# Torch's overloads are those of callers; to be called by torch itself, less is needed.
_ProcessGroup: Any = dist.ProcessGroup


class LoneProcessGroup(_ProcessGroup):  # type: ignore[misc]
    """Sends nothing: every other rank is taken to say what this one says.

    So what is gathered are copies, sums are multiples, and averages and extremes are what was there. Nothing
    is allocated but the flat copy of a list of tensors that NCCL's would allocate, too.

    Args:
        rank: of this process in the group.
        num_ranks: how many there are said to be.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        super().__init__(rank, num_ranks)
        self._num_ranks = num_ranks

    def size(self) -> int:
        """How many ranks there are said to be."""
        return self._num_ranks

    @property
    def group_name(self) -> Any:
        """What torch has registered it as."""
        return world_of_process_groups().pg_names[self]

    def getBackendName(self) -> str:
        """Whose it is."""
        return BACKEND

    # ------------------------------------------------------------------ sums and copies

    def allreduce(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Sum up, or what else is asked for, in place."""
        for tensor in tensors:
            self._reduce(tensor, opts)
        return _done(tensors)

    allreduce_coalesced = reduce = allreduce

    def broadcast(self, tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """Everybody has the same already."""
        return _done(tensors)

    def barrier(self, opts: Any = None) -> Any:
        """Nobody else has to come."""
        return _done([])

    def send(self, tensors: Sequence[Tensor], *where: Any) -> Any:
        """Nothing is sent."""
        return _done(tensors)

    recv = recv_anysource = send

    # ------------------------------------------------------------------ from all to all

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """As many copies as there are ranks, one after the other in one tensor."""
        with torch.no_grad():
            output.view(self._num_ranks, -1).copy_(tensor.reshape(1, -1))
        return _done([output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """The same of several tensors."""
        for output, tensor in zip(outputs, tensors, strict=True):
            self.all_gather_single(output, tensor)
        return _done(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather(
        self, outputs: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """A copy into each of several tensors."""
        for copies, tensor in zip(outputs, tensors, strict=True):
            flat = tensor.detach().new_empty((self._num_ranks, tensor.numel()))
            self._fill(copies, tensor)
            del flat
        return _done([copy for copies in outputs for copy in copies])

    gather = allgather

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """This rank's part of the sum of one tensor."""
        with torch.no_grad():
            output.view(-1).copy_(tensor.reshape(self._num_ranks, -1)[self.rank()])
        self._reduce(output, opts)
        return _done([output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter_single_coalesced(
        self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any = None
    ) -> Any:
        """The same of several tensors."""
        for output, tensor in zip(outputs, tensors, strict=True):
            self.reduce_scatter_single(output, tensor, opts)
        return _done(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def reduce_scatter(
        self, outputs: Sequence[Tensor], tensors: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Any:
        """This rank's part of the sum of a list of tensors."""
        for output, parts in zip(outputs, tensors, strict=True):
            flat = output.detach().new_empty((self._num_ranks, output.numel()))
            self._fill([output], parts[self.rank()])
            self._reduce(output, opts)
            del flat
        return _done(outputs)

    def scatter(
        self, outputs: Sequence[Tensor], tensors: Sequence[Sequence[Tensor]], opts: Any = None
    ) -> Any:
        """This rank's part of what one rank has."""
        for output, parts in zip(outputs, tensors, strict=False):
            self._fill([output], parts[self.rank()])
        return _done(outputs)

    def all_to_all_single(self, output: Tensor, tensor: Tensor, *sizes: Any) -> Any:
        """From each rank its part for this one: of as many bytes, and of unknown values."""
        return _done([output])

    alltoall_base = all_to_all_single

    def alltoall(self, outputs: Sequence[Tensor], tensors: Sequence[Tensor], opts: Any = None) -> Any:
        """From each rank the tensor for this one."""
        self._fill([one for one in outputs if one.shape == tensors[self.rank()].shape], tensors[self.rank()])
        return _done(outputs)

    def _reduce(self, tensor: Tensor, opts: Any) -> None:
        operation = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
        with torch.no_grad():
            if operation == dist.ReduceOp.SUM:
                tensor.mul_(self._num_ranks)
            elif operation == dist.ReduceOp.PRODUCT:
                tensor.pow_(self._num_ranks)

    def _fill(self, copies: Iterable[Tensor], tensor: Tensor) -> None:
        with torch.no_grad():
            for copy in copies:
                copy.copy_(tensor)


def _done(tensors: Sequence[Tensor]) -> Any:
    """Work that is over."""
    future: Any = torch.futures.Future()
    future.set_result(list(tensors))
    return work_of_future(future)


def register() -> None:
    """Let ``init_process_group`` know the backend, for the rest of this process."""

    def make(store: Any, rank: int, size: int, timeout: Any) -> LoneProcessGroup:
        return LoneProcessGroup(rank, size)

    def gather_object(gathered: list[Any], mine: Any, group: Any = None) -> None:
        gathered[:] = [mine] * len(gathered)  # which may hold tensors without data, that cannot be pickled

    anything: Any = dist
    anything.all_gather_object = gather_object
    dist.Backend.register_backend(BACKEND, make, devices=["cpu", DEVICE_TYPE])
