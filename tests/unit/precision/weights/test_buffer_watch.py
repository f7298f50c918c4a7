"""Buffers in half precision that training changes though the text of the model does not tell."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.precision.weights.buffer_watch import BufferWatch
from lightning_memtrain.precision.weights.model_conversion import convert_to_low_precision_


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


def watch(model: nn.Module, keep_in_fp32: tuple[str, ...] = ("norm",)) -> BufferWatch:
    return BufferWatch(convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32).unclear, keep_in_fp32)


def step(watching: BufferWatch, *layers: nn.Module) -> None:
    with watching.watch_step():
        for layer in layers:
            layer(torch.ones(1, 3).bfloat16())


def test_a_buffer_that_changes_is_named_once() -> None:
    model = nn.Sequential(Hidden(), Hidden())
    watching = watch(model)
    with pytest.warns(
        UserWarning,
        match=r"keeps the buffers '0.seen' in half precision, and training changes them.*"
        r"keep their layers in float32 by `LowPrecision\(keep_in_fp32=\(\"norm\", \"0\"\)\)`",
    ):
        step(watching, model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(watching, model[0])
    with pytest.warns(UserWarning, match=r"keeps the buffers '1.seen'"):
        step(watching, model[1])


def test_a_buffer_of_the_model_itself() -> None:
    model = Hidden()
    with pytest.warns(UserWarning, match=r"buffers 'seen'.*put them into a layer of their own, and name it"):
        step(watch(model), model)


def test_a_buffer_that_is_another_one() -> None:
    model = nn.Sequential(Hidden())
    watching = watch(model)
    with pytest.warns(UserWarning, match=r"keeps the buffers '0.mask'"), watching.watch_step():
        setattr(model[0], "ma" + "sk", torch.zeros(3, 3).bfloat16())


@pytest.mark.filterwarnings("error")
def test_a_buffer_that_is_moved_written_with_the_same_numbers_or_late_is_not_named() -> None:
    model = Hidden()
    watching = watch(model)
    model.to(memory_format=torch.channels_last)._apply(torch.clone)  # as to a device, before the first step
    for _ in range(8):
        with watching.watch_step(), torch.no_grad():
            for buffer in model.buffers():
                buffer.copy_(buffer.clone())
    step(watching, model)
