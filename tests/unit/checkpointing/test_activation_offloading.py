"""Activations in host memory: exact on the CPU. Not tried on a GPU, where copies run on another stream."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.checkpointing.experimental import OffloadActivations
from lightning_memtrain.checkpointing.experimental.activation_offloading import (
    _HostCopy,
    offloaded_activations,
)
from lightning_memtrain.core import NoEffectWarning
from tests.helpers.boring_models import BoringModel
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 4, 3),
        nn.Flatten(),
        nn.Dropout(0.3),
    )


def gradients(model: nn.Module, batch: torch.Tensor, min_bytes: int | str | None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if min_bytes is None:
        model(batch).square().sum().backward()
    else:
        with offloaded_activations(min_bytes):
            loss = model(batch).square().sum()
        loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("min_bytes", [1, 4096])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_without(min_bytes: int, memory_format: torch.memory_format) -> None:
    batch = torch.randn(4, 3, 10, 10).contiguous(memory_format=memory_format)
    plain = gradients(small_net(), batch, None)
    offloaded = gradients(small_net(), batch, min_bytes)
    assert len(plain) == 6
    assert all(torch.equal(one, other) for one, other in zip(plain, offloaded, strict=True))


def test_a_tensor_that_is_saved_twice_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    original = _HostCopy.__init__

    def counted(self: _HostCopy, tensor: torch.Tensor, *args: object) -> None:
        sizes.append(tuple(tensor.shape))
        original(self, tensor, *args)

    monkeypatch.setattr(_HostCopy, "__init__", counted)
    x = torch.randn(16, 16, requires_grad=True) * 1
    with offloaded_activations(1):
        loss = (x * x).sum() + x.relu().square().sum()
    # `x` for the product, twice, and the result of `relu`, for itself and for the square.
    assert sizes == [(16, 16), (16, 16)]
    loss.backward()


def test_what_is_written_over_later_is_kept_as_it_was_saved() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    x = torch.ones(2)
    with offloaded_activations(1):
        loss = (weight * x).sum()
        x.add_(1)
        loss = loss + (weight * x).sum()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0, 3.0]


def test_small_tensors_and_parameters_stay_where_they_are() -> None:
    weight = nn.Parameter(torch.ones(64, 64))
    x = torch.ones(64, 64, requires_grad=True)
    with offloaded_activations(min_bytes=64 * 64 * 4 + 1):
        out = x.exp()
    assert out.grad_fn is not None
    saved = out.grad_fn._saved_result
    assert saved.data_ptr() == out.data_ptr()
    with offloaded_activations(1):
        product = x @ weight
    assert product.grad_fn is not None
    assert product.grad_fn._saved_mat2.data_ptr() == weight.data_ptr()
    assert product.grad_fn._saved_self.data_ptr() != x.data_ptr()


def test_the_weight_of_a_linear_layer_stays_where_it_is() -> None:
    layer = nn.Linear(64, 64)
    with offloaded_activations(1):
        out = layer(torch.ones(64, 64, requires_grad=True))
    assert out.grad_fn is not None
    assert out.grad_fn._saved_mat2.data_ptr() == layer.weight.data_ptr()
    assert out.grad_fn._saved_mat2.shape == (64, 64)
    out.sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((64, 64), 64.0))  # type: ignore[arg-type]


def test_copies_go_with_the_graph_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        hooks = offloaded_activations(1)
        x = torch.randn(8, 8, requires_grad=True)
        with hooks:
            loss = x.exp().sum()
        copies = [reference for reference in hooks._copies if reference() is not None]
        assert len(copies) == 1
        loss.backward()
        del loss
        assert all(reference() is None for reference in copies)
    finally:
        gc.enable()


@pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)
def test_on_the_cpu_it_says_that_it_does_nothing(tmp_path: Path) -> None:
    model = BoringModel()
    with pytest.warns(NoEffectWarning, match="`OffloadActivations` has no effect on the CPU"):
        quiet_trainer(tmp_path, OffloadActivations(), max_steps=1).fit(model)
    assert "training_step" not in model.__dict__


@pytest.mark.parametrize("min_bytes", ["a lot", 0, "4 gigs"])
def test_a_size_that_is_none_is_refused(min_bytes: object) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"`OffloadActivations\(min_bytes\)` must be a number of bytes"
    ):
        OffloadActivations(min_bytes)  # type: ignore[arg-type]


def test_its_record() -> None:
    callback = OffloadActivations("2MiB")
    assert callback.exact
    assert str(callback.technique_record()) == "OffloadActivations(min_bytes=2097152)"


def test_the_size_of_the_context_is_written_as_everywhere() -> None:
    batch = torch.randn(4, 3, 10, 10)
    pairs = zip(gradients(small_net(), batch, None), gradients(small_net(), batch, "1 KiB"), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with pytest.raises(ValueError, match=r"`offloaded_activations\(min_bytes\)` must be a number of bytes"):
        offloaded_activations(True)
