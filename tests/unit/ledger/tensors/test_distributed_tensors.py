"""Tensors that are spread over processes hold the bytes of their local part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lightning_memtrain.ledger.tensors.storages import storages_of


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_a_sharded_tensor_has_the_storage_of_its_shard(mesh: DeviceMesh) -> None:
    tensor = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    (storage,) = storages_of(tensor)
    assert storage.nbytes() == 4 * 3 * 4
