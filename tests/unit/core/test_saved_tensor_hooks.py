"""The innermost hook for saved tensors is known while it is in force."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from lightning_memtrain.core.saved_tensor_hooks import innermost_pack_hook


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"), reason="torch before 2.8"
)
def test_the_innermost_hook_is_told() -> None:
    assert innermost_pack_hook() is None
    with saved_tensors_hooks(same, same):
        assert innermost_pack_hook() is same
        with saved_tensors_hooks(other, same):
            assert innermost_pack_hook() is other
        assert innermost_pack_hook() is same
        with save_on_cpu():
            assert innermost_pack_hook() not in (None, same)
    assert innermost_pack_hook() is None
