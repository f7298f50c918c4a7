"""Blocks of common layers train to the bit as without checkpoints: random numbers, running statistics."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase

from tests.helpers.recomputed import assert_exact, assert_identical, recompute, trained


def _images() -> list[Tensor]:
    return [torch.randn(7, 3, 6, 6) for _ in range(3)]


def _rows() -> list[Tensor]:
    return [torch.randn(7, 12) for _ in range(3)]


def _conv(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), norm, nn.ReLU(inplace=True))


def _linear(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(12, 12), *layers)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "dropout": (lambda: _linear(nn.Dropout(0.3)), _rows),
    "dropout in place": (lambda: _linear(nn.Dropout(0.3, inplace=True)), _rows),
    "feature dropout": (lambda: _conv(nn.Dropout2d(0.3)), _images),
    "alpha dropout": (lambda: _linear(nn.SELU(), nn.AlphaDropout(0.3)), _rows),
    "random leak": (lambda: _linear(nn.RReLU()), _rows),
    "batch norm 1d": (lambda: _linear(nn.BatchNorm1d(12)), _rows),
    "batch norm 2d": (lambda: _conv(nn.BatchNorm2d(3)), _images),
    "cumulative batch norm": (lambda: _conv(nn.BatchNorm2d(3, momentum=None)), _images),
    "batch norm without statistics": (lambda: _conv(nn.BatchNorm2d(3, track_running_stats=False)), _images),
    "batch norm without parameters": (lambda: _conv(nn.BatchNorm2d(3, affine=False)), _images),
    "instance norm": (lambda: _conv(nn.InstanceNorm2d(3, affine=True)), _images),
    "instance norm with statistics": (
        lambda: _conv(nn.InstanceNorm2d(3, track_running_stats=True)),
        _images,
    ),
    "cumulative instance norm": (
        lambda: _conv(nn.InstanceNorm2d(3, momentum=None, track_running_stats=True)),
        _images,
    ),
    "synchronized batch norm": (lambda: _conv(nn.SyncBatchNorm(3)), _images),
    "group norm": (lambda: _conv(nn.GroupNorm(3, 3)), _images),
    "layer norm": (lambda: _linear(nn.LayerNorm(12)), _rows),
    "local response": (lambda: _conv(nn.LocalResponseNorm(2)), _images),
    "in place": (lambda: _linear(nn.ELU(inplace=True), nn.Linear(12, 12), nn.ReLU(inplace=True)), _rows),
    "gated": (lambda: nn.Sequential(nn.Linear(12, 24), nn.GLU()), _rows),
    "weight norm": (lambda: _linear(nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))), _rows),
    "spectral norm": (lambda: _linear(nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12))), _rows),
    "orthogonal": (lambda: _linear(nn.utils.parametrizations.orthogonal(nn.Linear(12, 12))), _rows),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("together", [False, True])
def test_layers_train_as_without_checkpoints(name: str, together: bool) -> None:
    make_block, batches = LAYERS[name]
    names = ["1"] if together else ["1.0", "1.1"]

    def make() -> nn.Module:
        first = nn.Conv2d(3, 3, 1) if batches is _images else nn.Linear(12, 12)
        return nn.Sequential(first, nn.Sequential(make_block(), make_block()))

    assert_exact(make, names, batches)


_OLD_NORMS = pytest.mark.filterwarnings("ignore:`torch.nn.utils.(weight|spectral)_norm` is deprecated")


def _twice(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean() + model(x + 1).square().mean()


def _normed(reparametrize: Callable[[nn.Module], nn.Module]) -> nn.Module:
    normed = nn.Sequential(reparametrize(nn.Linear(12, 12)), nn.Tanh())
    return nn.Sequential(nn.Linear(12, 12), normed)


@_OLD_NORMS
@pytest.mark.parametrize(
    ("name", "reparametrize"),
    [("1", nn.utils.weight_norm), ("1.0", nn.utils.weight_norm), ("1", nn.utils.spectral_norm)],
)
def test_a_weight_that_hooks_compute_may_be_computed_twice_before_backward(
    name: str, reparametrize: Callable[[nn.Module], nn.Module]
) -> None:
    assert_exact(lambda: _normed(reparametrize), [name], _rows, _twice, num_recomputed=6)


@_OLD_NORMS
def test_a_hook_that_changes_a_buffer_in_place_is_refused() -> None:
    model = _normed(nn.utils.spectral_norm)
    recompute(model, "1.0")
    with pytest.raises(
        RuntimeError, match=r"cannot recompute '1.0': its buffer 'weight_u' was changed in place"
    ):
        _twice(model, _rows()[0]).backward()


def test_statistics_survive_infinite_activations() -> None:
    states = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.BatchNorm1d(12), nn.ReLU()))
        if checkpointed:
            recompute(model, "1")
        x = torch.randn(7, 12)
        x[0, 0] = float("inf")
        model(x).sum().backward()
        states.append(model.state_dict())
    assert torch.isinf(states[0]["1.0.running_mean"]).any()
    assert_identical(*states)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_norm_layers_keep_their_attributes(momentum: float | None) -> None:
    layers = [
        nn.BatchNorm1d(4, momentum=momentum),
        nn.SyncBatchNorm(4, momentum=momentum),
        nn.InstanceNorm1d(4, momentum=momentum, track_running_stats=True),
    ]
    block = nn.Sequential(*layers[:2], nn.Linear(4, 8), nn.Unflatten(1, (4, 2)), layers[2])
    model = nn.Sequential(nn.Linear(4, 4), block)
    recompute(model, "1")
    before = [(layer, dict(layer.__dict__), dict(layer._buffers)) for layer in layers]
    model(torch.randn(5, 4)).sum().backward()
    for layer, attributes, buffers in before:
        assert isinstance(layer, _NormBase)
        assert layer.__dict__ == attributes
        assert list(layer._buffers) == list(buffers)
        assert all(layer._buffers[name] is buffer for name, buffer in buffers.items())
    assert [layer.num_batches_tracked.item() for layer in layers] == [1, 1, 0]


def test_frozen_batch_norm_keeps_its_statistics() -> None:
    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(12, 12), _linear(nn.BatchNorm1d(12)))
        model[1][1].eval()
        return model

    assert_exact(make, ["1"], _rows)


class _OtherRandomNumbers(nn.Module):
    """Draws from Python's and NumPy's generators, as stochastic depth and augmentations do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * random.random() + x * float(numpy.random.rand())


def test_random_numbers_of_python_and_numpy_are_the_same_again() -> None:
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)
        model = nn.Sequential(nn.Linear(12, 12), _OtherRandomNumbers(), nn.Tanh())
        if checkpointed:
            recompute(model, "1")
        outcomes.append((trained(model, _rows()), random.random(), float(numpy.random.rand())))
    assert_identical(*outcomes)


def test_modes_are_those_of_the_forward() -> None:
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), _linear(nn.Dropout(0.5), nn.BatchNorm1d(12)))
        if checkpointed:
            recompute(model, "1")
        loss = model(torch.randn(7, 12)).square().sum()
        model.eval()
        loss.backward()
        assert not any(module.training for module in model.modules())
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_identical(*gradients)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.linear(x).view(1, 7, 3, 3, 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return attended.transpose(1, 2).reshape(7, 12) * torch.linspace(0, 1, 12)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "setting", [lambda: sdpa_kernel(SDPBackend.MATH), lambda: _default_dtype(torch.float64)]
)
def test_kernels_are_those_of_the_forward(setting: Callable[[], Any]) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with setting():
            return model(x).square().mean()

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(12, 12), _Attention(), nn.Linear(12, 12)).double()

    assert_exact(make, ["1"], lambda: [x.double() for x in _rows()], loss)
    assert torch.get_default_dtype() == torch.float32
    assert torch.backends.cuda.flash_sdp_enabled()


def test_lazy_layers_may_be_materialised_in_the_first_forward() -> None:
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 12), nn.Sequential(nn.LazyLinear(12), nn.LazyBatchNorm1d()))
        if checkpointed:
            recompute(model, "1")
        seen = []
        for x in _rows():
            model.zero_grad()
            model(x).square().mean().backward()
            seen.append([parameter.grad.clone() for parameter in model.parameters()])
        outcomes.append((seen, dict(model.state_dict())))
    assert_identical(*outcomes)
