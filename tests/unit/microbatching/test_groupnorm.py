from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.microbatching.batchnorm.groupnorm import batchnorm_to_groupnorm


@pytest.mark.parametrize(
    ("layer", "num_groups", "expected"),
    [
        (nn.BatchNorm2d(64), 32, 32),
        (nn.BatchNorm2d(48), 32, 24),
        (nn.BatchNorm2d(31), 32, 31),
        (nn.BatchNorm2d(37), 32, 1),
        (nn.BatchNorm3d(16), 6, 4),
        (nn.BatchNorm2d(16), 1, 1),
        (nn.SyncBatchNorm(40), 32, 20),
        (nn.BatchNorm1d(64), 32, 32),
        (nn.BatchNorm1d(32), 32, 16),
        (nn.BatchNorm1d(1), 32, 1),
    ],
)
def test_groups_are_the_largest_divisor_in_bounds(layer, num_groups, expected):
    converted = batchnorm_to_groupnorm(nn.Sequential(layer), num_groups)
    assert isinstance(converted[0], nn.GroupNorm)
    assert (converted[0].num_groups, converted[0].num_channels) == (expected, layer.num_features)


def test_a_layer_keeps_its_parameters_and_settings():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-3).double())})
    layer = model["body"][1]
    layer.weight.requires_grad_(False)
    layer.eval()
    names = [name for name, _ in model.named_parameters()]
    assert batchnorm_to_groupnorm(model) is model
    converted = model["body"][1]
    assert converted.weight is layer.weight
    assert converted.bias is layer.bias
    assert converted.eps == 1e-3
    assert not converted.training
    assert model["body"].training
    assert [name for name, _ in model.named_parameters()] == names
    assert not list(model.buffers())


def test_a_layer_without_affine_parameters_stays_without():
    converted = batchnorm_to_groupnorm(nn.BatchNorm2d(8, affine=False))
    assert not list(converted.parameters())
    assert not converted.affine


def test_a_shared_layer_stays_shared():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(shared, shared), nn.BatchNorm2d(4))
    batchnorm_to_groupnorm(model)
    assert model[0] is model[1][0]
    assert model[0] is model[1][1]
    assert model[2] is not model[0]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_model_that_is_a_layer_is_returned_replaced():
    layer = nn.BatchNorm1d(6)
    converted = batchnorm_to_groupnorm(layer, num_groups=3)
    assert isinstance(converted, nn.GroupNorm)
    assert converted.weight is layer.weight


def test_the_gradient_does_not_depend_on_the_split():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))
    batchnorm_to_groupnorm(model.double())
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    model(images).sum().backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for chunk in images.split([3, 2, 1]):
        model(chunk).sum().backward()
    for parameter, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-12)


def test_rows_of_features_keep_their_signal():
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    converted = batchnorm_to_groupnorm(nn.BatchNorm1d(16))
    assert converted(rows).square().mean().item() == pytest.approx(1, abs=0.01)


def test_a_model_without_batch_norm_warns():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.warns(
        NoEffectWarning, match="expects a model with batch norm layers, but Sequential has none"
    ):
        assert batchnorm_to_groupnorm(model) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batchnorm_to_groupnorm(nn.Sequential(nn.BatchNorm1d(2)))


@pytest.mark.parametrize("num_groups", [0, -1])
def test_fewer_than_one_group_is_refused(num_groups):
    message = (
        "`batchnorm_to_groupnorm(num_groups)` must be a whole number of at least 1, but got "
        f"num_groups={num_groups}. Use 32"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        batchnorm_to_groupnorm(nn.BatchNorm2d(4), num_groups)


def test_a_lazy_layer_is_refused_and_nothing_is_changed():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match="must know the channels of every layer, but got the lazy layer '1'"):
        batchnorm_to_groupnorm(model)
    assert isinstance(model[0], nn.BatchNorm2d)
    model(torch.randn(2, 4, 3, 3))  # now it is a BatchNorm2d
    batchnorm_to_groupnorm(model)
    assert isinstance(model[1], nn.GroupNorm)
