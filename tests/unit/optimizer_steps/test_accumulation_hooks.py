"""One hook on the accumulation of many gradients, which leaves those of others alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.optimizer_steps.accumulation_hooks import AccumulationHooks


def accumulate(*parameters: nn.Parameter) -> None:
    torch.stack([parameter.sum() for parameter in parameters]).sum().backward()


def test_it_is_called_until_it_is_taken_off_as_often_as_one_likes() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    seen: list[Tensor] = []
    hooks = AccumulationHooks(seen.append)
    accumulate(first, second)
    for number in (1, 2):
        hooks.register([first, second])
        accumulate(first, second)
        hooks.remove()
        accumulate(first, second)
        assert len(seen) == 2 * number
    assert {id(one) for one in seen} == {id(first), id(second)}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0]], ids=str)
def test_two_of_them_and_others_can_be_taken_off_in_any_order(order: list[int]) -> None:
    parameter = nn.Parameter(torch.ones(2))
    calls: list[int] = []
    first = AccumulationHooks(lambda _: calls.append(0))
    second = AccumulationHooks(lambda _: calls.append(1))
    first.register([parameter])
    handle = parameter.register_post_accumulate_grad_hook(lambda _: calls.append(2))
    second.register([parameter])
    undo = [first.remove, second.remove, handle.remove]
    left = [0, 2, 1]  # in the order of putting them on
    for which in order:
        calls.clear()
        accumulate(parameter)
        assert calls == left
        undo[which]()
        left.remove(which)
    calls.clear()
    accumulate(parameter)
    assert calls == []
