"""Filters keep a mean of zero; of SGD that is the training of weights that are centred within forward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.core import ArgumentError, NoEffectWarning
from lightning_memtrain.microbatching import CenteredWeights, center_weights_
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)


def scaled(row: Tensor, length: float | None) -> Tensor:
    return row if length is None else row * length / row.square().sum().sqrt()


@pytest.mark.parametrize("length", [None, 1.0, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_each_filter_loses_its_mean_and_gets_a_length(
    kind: type[nn.Module], groups: int, length: float | None
) -> None:
    layer = kind(8, 6, 3, groups=groups).double()
    before = layer.weight.detach().clone()
    assert center_weights_(nn.Sequential(layer), length=length) == ["0"]
    expected = torch.stack([scaled(row - row.mean(), length) for row in before])
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("length", [None, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.ConvTranspose2d])
def test_a_filter_of_a_transposed_layer_is_one_of_its_outputs(
    kind: type[nn.Module], groups: int, length: float | None
) -> None:
    layer = kind(8, 6, 3, groups=groups).double()
    expected = layer.weight.detach().clone()
    center_weights_(layer, length=length)
    for inputs in expected.split(8 // groups):
        for output in range(expected.shape[1]):
            inputs[:, output] = scaled(inputs[:, output] - inputs[:, output].mean(), length)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("storage", ["bitmask", "int32", "block16"])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 6, 3, groups=2), nn.ConvTranspose2d(8, 6, 3, groups=2)], ids=["conv", "transposed"]
)
@pytest.mark.parametrize("length", [None, 1.0])
def test_of_sparse_layers_what_is_stored_is_centred(
    layer: nn.Module, storage: Any, length: float | None
) -> None:
    layer = type(layer)(8, 6, 3, groups=2).double()
    generator = torch.Generator().manual_seed(0)
    numel = layer.weight.numel()
    positions = torch.randperm(numel, generator=generator)[: numel // 3].sort().values
    positions = positions[positions >= 40]  # the first filter of the one has nothing left
    model = nn.Sequential(layer)
    mt.sparsify_(model, {"0.weight": positions}, storage=storage)
    dense, mask = layer.dense(), torch.zeros(numel, dtype=torch.bool)
    mask[positions] = True
    mask = mask.view(dense.shape)
    if isinstance(layer, nn.ConvTranspose2d):
        filters = [(slice(4 * group, 4 * group + 4), output) for group in range(2) for output in range(3)]
    else:
        filters = [(output,) for output in range(6)]
    for place in filters:
        row, kept = dense[place].clone(), mask[place]
        if kept.any():
            row[kept] = scaled(row[kept] - row[kept].mean(), length)
        dense[place] = row
    assert center_weights_(model, length=length) == ["0"]
    torch.testing.assert_close(layer.dense(), dense, rtol=0, atol=1e-14)


def test_half_precision_is_summed_in_float32() -> None:
    layer = nn.Conv2d(512, 4, 3).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:, ::2] = 3.0
    center_weights_(layer)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.unique().tolist() == [-1.0, 1.0]
    center_weights_(layer, length=48)  # the length of 4608 ones is 67.9
    assert layer.weight.unique().tolist() == [-0.70703125, 0.70703125]
    with torch.no_grad():
        layer.weight.zero_()
    center_weights_(layer, length=1)
    assert not layer.weight.any()


def test_which_layers_are_meant() -> None:
    shared, frozen = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1).requires_grad_(False)
    model = nn.ModuleDict(
        {
            "image": nn.Conv2d(3, 8, 3),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "body": nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8), shared),
            "again": shared,
            "frozen": frozen,
        }
    )
    before = frozen.weight.clone()
    assert center_weights_(model) == ["body.0", "body.2"]
    assert torch.equal(frozen.weight, before)
    assert center_weights_(model, ["image", "body.*"]) == ["image", "body.0", "body.2"]


def weight_norm() -> nn.Module:
    return torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))


def spectral_norm() -> nn.Module:
    return torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 1))


def parametrized() -> nn.Module:
    layer = nn.Conv2d(8, 8, 1)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def flattened() -> nn.Module:
    """As FSDP's first version leaves weights that lie on other ranks."""
    layer = nn.Conv2d(8, 8, 1)
    layer.weight = nn.Parameter(torch.empty(0))
    return layer


COMPUTED = (
    "must be convolutions with a weight of their own, but that of '1' is computed from other parameters (a "
    "parametrization, weight norm, pruning). Name the others in `layers`, or remove it."
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (weight_norm, COMPUTED),
        (spectral_norm, COMPUTED),
        (parametrized, COMPUTED),
        (lambda: prune.random_unstructured(nn.Conv2d(8, 8, 1), "weight", 0.5), COMPUTED),
        (
            lambda: nn.LazyConv2d(8, 1),
            "must be convolutions whose weights exist, but '1' is lazy. Run the model once before, or use a "
            "layer that is not lazy.",
        ),
        (
            flattened,
            "must be convolutions whose weights are whole on every rank, but that of '1' is divided among "
            "ranks. Train under DDP or on one device.",
        ),
    ],
)
def test_weights_that_cannot_be_centred_are_refused_and_nothing_is_changed(make: Any, message: str) -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), make())
    before = model[0].weight.detach().clone()
    with pytest.raises(ArgumentError, match=re.escape(f"`center_weights_(layers)` {message}")):
        center_weights_(model)
    assert torch.equal(model[0].weight, before)
    assert center_weights_(model, ["0"]) == ["0"]


def test_a_frozen_layer_that_is_named_is_refused() -> None:
    message = (
        "`center_weights_(layers)` must be convolutions that are trained, but '0' is frozen. Leave it out."
    )
    with pytest.raises(ArgumentError, match=re.escape(message)):
        center_weights_(nn.Sequential(nn.Conv2d(8, 8, 1)).requires_grad_(False), ["0"])


def test_a_selector_that_means_no_convolution_is_refused() -> None:
    with pytest.raises(ArgumentError, match=re.escape("`center_weights_(layers)`")):
        center_weights_(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Linear(8, 8)), ["Linear"])


class Centered(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean((1, 2, 3), keepdim=True)


class Net(LightningModule):
    def __init__(self, parametrizes: bool = False, optimizer: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.optimizer = optimizer
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.Flatten(),
            nn.Linear(16, 1),
        ).double()
        if parametrizes:
            parametrize.register_parametrization(self.layers[3], "weight", Centered())

    @property
    def filters(self) -> Tensor:
        weight: Tensor = self.layers[3].weight
        return weight.detach()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.layers(batch).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader[Tensor]:
        images = torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return DataLoader(images, batch_size=4)

    def configure_optimizers(self) -> Any:
        if self.optimizer is not None:
            return self.optimizer(self.parameters())
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=0.01)


def test_with_sgd_it_is_the_training_of_weights_that_are_centred_in_forward(tmp_path: Path) -> None:
    projected, in_forward = Net(), Net(parametrizes=True)
    quiet_trainer(tmp_path, CenteredWeights(), max_epochs=4).fit(projected)
    quiet_trainer(tmp_path, max_epochs=4).fit(in_forward)
    torch.testing.assert_close(projected.filters, in_forward.filters, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        projected.layers[0].weight, in_forward.layers[0].weight, rtol=1e-11, atol=1e-13
    )
    plain = Net()
    quiet_trainer(tmp_path, max_epochs=4).fit(plain)
    assert (plain.filters - projected.filters).abs().max() > 0.01


class Watched(Net):
    """Sees the weights as training does: at each forward, and after each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sums: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.sums.append(self.filters.sum((1, 2, 3)).abs().max().item())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("techniques", ["none", "in backward", "accumulated", "microbatches"])
def test_every_step_is_followed_by_centring(techniques: str, optimizer: Any, tmp_path: Path) -> None:
    model = Watched(optimizer=lambda parameters: optimizer(parameters, lr=0.05))
    callbacks: list[Any] = [CenteredWeights()]
    if techniques == "in backward":
        callbacks.append(mt.OptimizerInBackward())
    if techniques == "microbatches":
        callbacks.append(mt.Microbatching(microbatch_size=1))
    options = {"accumulate_grad_batches": 2} if techniques == "accumulated" else {}
    quiet_trainer(tmp_path, *callbacks, max_epochs=2, **options).fit(model)
    assert len(model.sums) == 10 * (4 if techniques == "microbatches" else 1)
    assert max(model.sums) < 1e-12
    assert model.filters.sum((1, 2, 3)).abs().max() < 1e-12


def test_the_length_of_filters_is_kept(tmp_path: Path) -> None:
    model = Net()
    quiet_trainer(tmp_path, CenteredWeights(length=0.5), max_epochs=2).fit(model)
    lengths = model.filters.square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, 0.5), rtol=1e-14, atol=0)


class Manual(Watched):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_under_manual_optimization(tmp_path: Path) -> None:
    model = Manual()
    quiet_trainer(tmp_path, CenteredWeights(), max_epochs=1).fit(model)
    assert len(model.sums) == 5
    assert max(model.sums) < 1e-12


def test_a_run_that_is_resumed_equals_the_uninterrupted_one_to_the_bit(tmp_path: Path) -> None:
    whole, resumed = Net(), Net()
    quiet_trainer(tmp_path, CenteredWeights(), max_epochs=2).fit(whole)
    first = quiet_trainer(tmp_path, CenteredWeights(), max_epochs=1)
    first.fit(Net())
    first.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(tmp_path, CenteredWeights(), max_epochs=2).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert all(map(torch.equal, whole.parameters(), resumed.parameters()))


def test_a_callback_can_be_used_for_another_model(tmp_path: Path) -> None:
    callback = CenteredWeights()
    for _ in range(2):
        model = Watched()
        quiet_trainer(tmp_path, callback, max_epochs=1).fit(model)
        assert max(model.sums) < 1e-12


def test_a_model_without_such_layers_warns(tmp_path: Path) -> None:
    model = Net()
    model.layers[3].requires_grad_(False)
    message = "expects a model with convolutions of more than 4 channels that are trained, but Net has none"
    with pytest.warns(NoEffectWarning, match=message):
        quiet_trainer(tmp_path, CenteredWeights(), max_epochs=1).fit(model)
