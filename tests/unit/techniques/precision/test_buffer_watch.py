"""Buffers in half precision that training changes though the text of the model does not tell."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.techniques.precision import LowPrecision
from lightning_memtrain.techniques.precision.buffer_watch import BufferWatch
from lightning_memtrain.techniques.precision.conversion import convert_module_


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for buffer in list(self.buffers())[:1]:
            buffer.add_(1)
        return self.layer(x)


def watch(model: nn.Module, keep_fp32: tuple[str, ...] = ("norm",)) -> BufferWatch:
    plugin = LowPrecision(keep_fp32=keep_fp32)
    return BufferWatch(convert_module_(model, torch.bfloat16, keep_fp32).unclear, plugin._settings)


def test_a_buffer_that_changes_is_named_once() -> None:
    model = nn.Sequential(Hidden(), Hidden())
    watching = watch(model)
    model[0](torch.ones(1, 3).bfloat16())
    with pytest.warns(
        UserWarning,
        match=r"keeps the buffers '0.seen' in half precision, and training changes them.*"
        r"keep their layers in float32 by `LowPrecision\(keep_fp32=\(\"norm\", \"0\"\)\)`",
    ):
        watching.after_step()
    model[0](torch.ones(1, 3).bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        watching.after_step()
    model[1](torch.ones(1, 3).bfloat16())
    with pytest.warns(UserWarning, match=r"keeps the buffers '1.seen'"):
        watching.after_step()


def test_a_buffer_of_the_model_itself() -> None:
    model = Hidden()
    watching = watch(model)
    model(torch.ones(1, 3).bfloat16())
    with pytest.warns(UserWarning, match=r"buffers 'seen'.*put them into a layer of their own, and name it"):
        watching.after_step()


@pytest.mark.filterwarnings("error")
def test_a_buffer_that_is_written_with_the_same_numbers_or_long_after_is_not_named() -> None:
    model = Hidden()
    watching = watch(model)
    for _ in range(8):
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())
        watching.after_step()
    model(torch.ones(1, 3).bfloat16())
    watching.after_step()
