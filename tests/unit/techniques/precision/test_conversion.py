"""Models in half precision, in place, with layers kept in float32."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._pytree import tree_flatten
from torchmetrics.classification import MulticlassAccuracy

from lightning_memtrain import NoEffectWarning
from lightning_memtrain.techniques.precision.conversion import convert_module_
from lightning_memtrain.techniques.precision.inputs import cast_batch

HALVES = [torch.bfloat16, torch.float16]


class ForeignRMSNorm(nn.Module):
    """As in many libraries: computes in float32 and would answer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()


def test_the_same_parameters_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    parameters = list(model.parameters())
    convert_module_(model, torch.bfloat16)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert model[2].weight is model[0].weight
    assert model[0].weight.dtype == model[2].bias.dtype == torch.bfloat16
    norm = model[1]
    assert {x.dtype for x in (norm.weight, norm.bias, norm.running_mean, norm.running_var)} == {torch.float32}
    assert norm.num_batches_tracked.dtype == torch.int64


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(6), (5, 6)),
        (nn.BatchNorm2d(6), (5, 6, 2, 2)),
        (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (5, 6, 2, 2)),
        (nn.LayerNorm(6), (5, 6)),
        (nn.GroupNorm(2, 6), (5, 6, 2, 2)),
        (nn.RMSNorm(6), (5, 6)),
        (ForeignRMSNorm(), (5, 6)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_norms_take_and_give_half_precision_and_learn_in_float32(
    norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    converted = copy.deepcopy(norm)
    convert_module_(converted, dtype)
    copied = copy.deepcopy(converted)
    inputs = torch.randn(shape)
    outputs = converted(inputs.to(dtype).requires_grad_())
    assert outputs.dtype == dtype
    torch.testing.assert_close(outputs.float(), norm(inputs.to(dtype).float()), rtol=0.02, atol=0.02)
    outputs.float().square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in converted.parameters())
    # A copy of the model computes with its own weights.
    with torch.no_grad():
        copied.weight.fill_(0.0)
        assert copied(inputs.to(dtype)).abs().max() == 0
        assert converted(inputs.to(dtype)).abs().max() > 0


def test_activations_of_a_kept_layer_norm_stay_in_half_precision() -> None:
    norm = nn.LayerNorm(6)
    convert_module_(norm, torch.bfloat16)
    saved: list[torch.Tensor] = []
    inputs = torch.randn(500, 6).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        norm(inputs)
    assert {x.dtype for x in saved if x.numel() == inputs.numel()} == {torch.bfloat16}


def test_layers_kept_by_name_compute_in_float32_and_answer_in_half() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    convert_module_(model, torch.float16, keep_fp32=("norm", "he*"))
    assert model["body"].weight.dtype == torch.float16
    assert model["head"][0].weight.dtype == torch.float32
    large = torch.full((1, 4), 60000.0).half()
    assert model["head"](large).isfinite().all()
    assert model["head"](large).dtype == torch.float16
    assert model["head"](torch.ones(1, 4)).dtype == torch.float32


def test_nothing_is_kept_if_nothing_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    convert_module_(model, torch.bfloat16, keep_fp32=())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.ones(1, 4).bfloat16()).dtype == torch.bfloat16


def test_a_name_that_matches_nothing() -> None:
    with pytest.warns(
        NoEffectWarning, match=r"names 'haed', but the model has no layer of that name.*Use names"
    ):
        convert_module_(nn.Linear(4, 4), torch.bfloat16, keep_fp32=("haed",))


def test_converting_twice_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), ForeignRMSNorm())
    convert_module_(model, torch.bfloat16)
    forward, state = model[1].forward, copy.deepcopy(model.state_dict())
    convert_module_(model, torch.bfloat16)
    assert model[1].forward is forward
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_converted_model_can_be_pickled_and_computes_with_its_own_weights() -> None:
    norms = nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), ForeignRMSNorm()
    model = nn.Sequential(*norms, nn.Linear(6, 6))
    convert_module_(model, torch.bfloat16, keep_fp32=("norm", "4"))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    inputs = torch.randn(5, 6).bfloat16()
    for loaded in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert loaded(inputs).dtype == torch.bfloat16
        assert torch.equal(loaded(inputs), model(inputs))
        for layer, original in zip(loaded, model, strict=True):
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.zero_()
            assert layer(inputs).abs().max() == 0
            assert original(inputs).abs().max() > 0


def test_modules_know_their_dtype_and_metrics_are_left_alone() -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.metric = MulticlassAccuracy(3)
            self.metric.register_buffer("thresholds", torch.tensor([0.1, 0.2]))
            self.register_buffer("table", torch.ones(2))
            self.register_buffer("phases", torch.ones(2, dtype=torch.complex64))

    model = Model()
    convert_module_(model, torch.bfloat16)
    assert model.dtype == model.table.dtype == torch.bfloat16
    assert model.metric.thresholds.dtype == torch.float32
    assert model.phases.dtype == torch.complex64


def test_targets_are_left_alone_unless_asked_for() -> None:
    x, y, index = torch.ones(2), torch.tensor([70000.0]), torch.tensor([1])
    half = torch.float16
    assert cast_batch(x, half).dtype == half
    assert cast_batch([x], half)[0].dtype == half
    assert [t.dtype for t in cast_batch((x, x, y), half)] == [half, half, torch.float32]
    assert cast_batch((x, y), half, cast_targets=True)[1].isinf().all()
    names = ["x", "y", "target", "labels", "soft_targets", "only", "labelled"]
    dtypes = {name: value.dtype for name, value in cast_batch(dict.fromkeys(names, y), half).items()}
    assert [name for name in names if dtypes[name] == half] == ["x", "only", "labelled"]
    assert cast_batch({"x": index}, half)["x"] is index
    batch = {"x": x, "y": y}
    cast_batch(batch, half)
    assert batch["x"] is x


class Pair(NamedTuple):
    x: Any
    y: Any


X, Y = torch.ones(2), torch.tensor([70000.0])  # what is to be cast, and what is not


@pytest.mark.parametrize(
    "batch",
    [
        {"a": (X, Y), "b": [X, Y]},
        {"a": {"x": X, "y": Y}, "b": {"x": X, "soft_label": Y}},
        {"a": Pair(X, Y)},
        OrderedDict(a=(X, Y)),
        defaultdict(list, a=(X, Y)),
        [(X, Y)],
        ((X, Y), 3),
        ((X, Y), 3, 0),
        ((X, Y), ["one.png", "two.png"], None),
        ({"x": X, "y": Y}, 3),
        ((X, X), Y),
        ((X, (X, X)), (Y, Y)),
        ({"image": (X, X)}, {"boxes": Y, "scores": Y}),
        (X, [{"boxes": Y}, {"boxes": Y}]),
        {"inputs": (X, X), "labels": Y},
        {"inputs": {"x": (X, X), "y": Y}, "labels": (Y, Y)},
        (X, X, 3),
        Pair((X, X), Y),
    ],
    ids=str,
)
def test_targets_of_nested_batches(batch: Any) -> None:
    converted = cast_batch(batch, torch.float16)
    flat, structure = tree_flatten(converted)
    before, structure_before = tree_flatten(batch)
    assert structure == structure_before
    assert len(flat) == len(before)
    for value, original in zip(flat, before, strict=True):
        if original is X:
            assert value.dtype == torch.float16
        else:
            assert value is original
