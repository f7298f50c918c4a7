from __future__ import annotations

import re
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from lightning_memtrain.core import ArgumentError, NoEffectWarning
from lightning_memtrain.microbatching import GroupNorm, SampleNorm, replace_batchnorm


@pytest.mark.parametrize(
    ("layer", "norm", "expected"),
    [
        (nn.BatchNorm2d(64), GroupNorm(), 32),
        (nn.BatchNorm2d(64), GroupNorm(32), 32),
        (nn.BatchNorm2d(48), GroupNorm(32), 24),
        (nn.BatchNorm2d(31), GroupNorm(32), 31),
        (nn.BatchNorm2d(37), GroupNorm(32), 1),
        (nn.BatchNorm3d(16), GroupNorm(6), 4),
        (nn.BatchNorm2d(16), GroupNorm(1), 1),
        (nn.SyncBatchNorm(40), GroupNorm(32), 20),
        (nn.BatchNorm1d(64), GroupNorm(32), 32),
        (nn.BatchNorm1d(32), GroupNorm(32), 16),
        (nn.BatchNorm1d(1), GroupNorm(32), 1),
        (nn.BatchNorm2d(48), GroupNorm(channels_per_group=4), 12),
        (nn.BatchNorm2d(48), GroupNorm(channels_per_group=5), 8),
        (nn.BatchNorm2d(37), GroupNorm(channels_per_group=4), 1),
        (nn.BatchNorm2d(3), GroupNorm(channels_per_group=4), 1),
        (nn.BatchNorm2d(16), GroupNorm(channels_per_group=1), 16),
        (nn.BatchNorm1d(16), GroupNorm(channels_per_group=1), 8),
    ],
)
def test_groups_divide_the_channels_and_keep_the_bound(layer, norm, expected):
    converted = replace_batchnorm(nn.Sequential(layer), norm)
    assert type(converted[0]) is nn.GroupNorm
    assert (converted[0].num_groups, converted[0].num_channels) == (expected, layer.num_features)


def test_one_of_both_bounds():
    message = (
        "`GroupNorm(channels_per_group)` must be left out where `num_groups` is given, but got num_groups=2 "
        "and channels_per_group=4. Use e.g. num_groups=32, the paper's choice, or channels_per_group=4."
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        GroupNorm(num_groups=2, channels_per_group=4)


def test_a_layer_keeps_its_parameters_and_settings():
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-3).half())})
    layer = model["body"][1]
    layer.weight.requires_grad_(False)
    layer.eval()
    names = [name for name, _ in model.named_parameters()]
    assert replace_batchnorm(model, GroupNorm()) is model
    converted = model["body"][1]
    assert converted.weight is layer.weight
    assert converted.bias is layer.bias
    assert converted.weight.dtype == torch.float16
    assert converted.eps == 1e-3
    assert not converted.training
    assert model["body"].training
    assert [name for name, _ in model.named_parameters()] == names
    assert not list(model.buffers())


def test_a_layer_without_affine_parameters_stays_without():
    converted = replace_batchnorm(nn.BatchNorm2d(8, affine=False), GroupNorm())
    assert not list(converted.parameters())
    assert not converted.affine


def test_a_shared_layer_stays_shared():
    shared = nn.BatchNorm2d(4)
    model = nn.Sequential(shared, nn.Sequential(shared, shared), nn.BatchNorm2d(4))
    replace_batchnorm(model, GroupNorm())
    assert model[0] is model[1][0]
    assert model[0] is model[1][1]
    assert model[2] is not model[0]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_a_model_that_is_a_layer_is_returned_replaced():
    layer = nn.BatchNorm1d(6)
    converted = replace_batchnorm(layer, GroupNorm(num_groups=3))
    assert isinstance(converted, nn.GroupNorm)
    assert converted.weight is layer.weight


def test_a_norm_of_the_users_own():
    @dataclass(frozen=True)
    class LayerNorm(SampleNorm):
        eps: float

        def layer_for(self, batchnorm: nn.Module) -> nn.Module:
            return nn.LayerNorm(batchnorm.num_features, eps=self.eps)

    model = replace_batchnorm(nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6)), LayerNorm(1e-3))
    assert repr(model[1]) == repr(nn.LayerNorm(6, eps=1e-3))


def test_the_gradient_does_not_depend_on_the_split():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 1))
    replace_batchnorm(model.double(), GroupNorm())
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
    converted = replace_batchnorm(nn.BatchNorm1d(16), GroupNorm())
    assert converted(rows).square().mean().item() == pytest.approx(1, abs=0.01)


def test_a_model_without_batch_norm_warns():
    model = nn.Sequential(nn.Linear(2, 2), nn.InstanceNorm2d(4))
    with pytest.warns(
        NoEffectWarning, match="expects a model with batch norm layers, but Sequential has none"
    ):
        assert replace_batchnorm(model, GroupNorm()) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), GroupNorm())


class BatchNormAct(nn.BatchNorm2d):
    """As in timm: the activation is a part of the layer."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OwnBatchNorm(nn.BatchNorm2d):
    """No forward of its own."""


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def pruned() -> nn.Module:
    return prune.random_unstructured(nn.BatchNorm2d(4), "weight", 0.5)


def patched() -> nn.Module:
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            nn.LazyBatchNorm2d,
            "must know the channels of every layer, but got the lazy layer '1'. Run the model once before, "
            "or use a layer that is not lazy.",
        ),
        (
            lambda: BatchNormAct(4),
            "must have batch norm layers of torch, but got '1' of the class BatchNormAct, whose forward may "
            "do more than normalise. Build the model with torch's own layers.",
        ),
        (
            patched,
            "must have batch norm layers of torch, but got '1' of the class BatchNorm2d, whose forward may",
        ),
        (
            parametrized,
            "must have layers with a weight of their own, but that of '1' is computed from other "
            "parameters. Remove the parametrization or the pruning before.",
        ),
        (pruned, "must have layers with a weight of their own, but that of '1' is computed from other"),
    ],
)
def test_what_cannot_be_replaced_is_refused_and_nothing_is_changed(make, message):
    model = nn.Sequential(nn.BatchNorm2d(4), make())
    with pytest.raises(ArgumentError, match=re.escape(f"`replace_batchnorm(model)` {message}")):
        replace_batchnorm(model, GroupNorm())
    assert isinstance(model[0], nn.BatchNorm2d)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_a_scripted_layer_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4), torch.jit.script(nn.Sequential(nn.BatchNorm2d(4))))
    message = (
        "`replace_batchnorm(model)` must have layers that can be replaced, but got the scripted layer '1.0'. "
        "Replace before `torch.jit.script`."
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        replace_batchnorm(model, GroupNorm())
    assert isinstance(model[0], nn.BatchNorm2d)


def test_a_lazy_layer_that_has_run_is_replaced():
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 4, 3, 3))  # now it is a BatchNorm2d
    replace_batchnorm(model, GroupNorm())
    assert isinstance(model[0], nn.GroupNorm)


def test_a_subclass_without_a_forward_of_its_own_is_replaced():
    assert isinstance(replace_batchnorm(OwnBatchNorm(4), GroupNorm()), nn.GroupNorm)
