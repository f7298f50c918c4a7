"""Models in half precision, in place, with layers kept in float32."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, defaultdict
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils._pytree import tree_flatten
from torchmetrics.classification import MulticlassAccuracy

from lightning_memtrain.precision.batch_casting import cast_batch
from lightning_memtrain.precision.weights.model_conversion import convert_to_low_precision_, restore_float32_

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
    convert_to_low_precision_(model, torch.bfloat16)
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
    convert_to_low_precision_(converted, dtype)
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
    convert_to_low_precision_(norm, torch.bfloat16)
    saved: list[torch.Tensor] = []
    inputs = torch.randn(500, 6).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        norm(inputs)
    assert {x.dtype for x in saved if x.numel() == inputs.numel()} == {torch.bfloat16}


def test_layers_kept_by_name_compute_in_float32_and_answer_in_half() -> None:
    model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))})
    convert_to_low_precision_(model, torch.float16, keep_in_fp32=("norm", "he*"))
    assert model["body"].weight.dtype == torch.float16
    assert model["head"][0].weight.dtype == torch.float32
    large = torch.full((1, 4), 60000.0).half()
    assert model["head"](large).isfinite().all()
    assert model["head"](large).dtype == torch.float16
    assert model["head"](torch.ones(1, 4)).dtype == torch.float32


def test_nothing_is_kept_if_nothing_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.ones(1, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [("haed", r"'haed', which matches none. Did you mean 'head'\?"), ("Linera", r"Did you mean 'Linear'\?")],
)
def test_a_name_that_matches_nothing(wanted: str, hint: str) -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4)})
    with pytest.raises(
        MisconfigurationException, match=rf"keep_in_fp32\)` must name modules of the model.*{hint}"
    ):
        convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=(wanted,))
    with pytest.raises(
        MisconfigurationException, match=r"got 'Conv2d', which matches none. There are 'head', 'Linear', "
    ):
        convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=(nn.Conv2d,))
    assert model["head"].weight.dtype == torch.float32


@pytest.mark.parametrize("wanted", ["1", "1*", "Embedding", nn.Embedding, "*edding*"])
def test_layers_are_chosen_by_name_by_class_and_by_the_name_of_the_class(wanted: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Embedding(4, 4), nn.Linear(4, 4))
    convert_to_low_precision_(model, torch.float16, keep_in_fp32=(wanted,))
    assert [layer.weight.dtype for layer in model] == [torch.float16, torch.float32, torch.float16]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"dtype": torch.float64},
            r"`convert_to_low_precision_\(dtype\)` must be.*got dtype=torch.float64. Use",
        ),
        ({"keep_in_fp32": "norm"}, r"must be a list of paths .*, but got keep_in_fp32='norm'. Write"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        convert_to_low_precision_(nn.Linear(4, 4), **arguments)


def test_converting_twice_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), ForeignRMSNorm())
    convert_to_low_precision_(model, torch.bfloat16)
    forward, state = model[1].forward, copy.deepcopy(model.state_dict())
    convert_to_low_precision_(model, torch.bfloat16)
    assert model[1].forward is forward
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_converted_model_can_be_pickled_and_computes_with_its_own_weights() -> None:
    norms = nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6), ForeignRMSNorm()
    model = nn.Sequential(*norms, nn.Linear(6, 6))
    convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=("norm", "4"))
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


def test_a_kept_embedding_answers_in_half_precision() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=("norm", "0"))
    assert [layer.weight.dtype for layer in model] == [torch.float32, torch.bfloat16]
    assert model[0](torch.tensor([1])).dtype == torch.bfloat16
    model(torch.tensor([1])).sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    convert_to_low_precision_(model, torch.float16, keep_in_fp32=("norm", "0"))
    assert model[0](torch.tensor([1])).dtype == torch.float16


def test_a_layer_with_the_weights_of_a_kept_one_is_kept_too() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(10, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 10)}
    )
    model["head"].weight = model["embedding"].weight
    convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=("embedding",))
    dtypes = {name: p.dtype for name, p in model.named_parameters(remove_duplicate=False)}
    assert {name for name, dtype in dtypes.items() if dtype == torch.bfloat16} == {"body.weight", "body.bias"}
    assert model["head"].weight is model["embedding"].weight
    outputs = model["head"](model["body"](model["embedding"](torch.tensor([1]))))
    assert outputs.dtype == torch.bfloat16
    outputs.sum().backward()
    assert model["embedding"].weight.grad.dtype == torch.float32


class Statistics(nn.Module):
    """No parameters, as a codebook that is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        self.mean.lerp_(x.mean(0), 0.001)  # wants one dtype
        return x * self.table


class Normed(Statistics):
    """The same, with a weight for each statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * super().forward(x) - self.mean


class Large(nn.Module):
    """Many weights and few statistics, as a whole network has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 4))
        self.register_buffer("n", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("strict", torch.zeros(4))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        self.mean.mul_(0.999).add_(x.mean(0), alpha=0.001)
        self.strict.lerp_(x.mean(0), 0.001)
        return self.layer(x) * self.table - self.mean


@pytest.mark.parametrize("dtype", HALVES)
def test_buffers_that_count_or_average_stay_in_float32(dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"whole": Statistics(), "norm": Normed(), "large": Large(), "named": Large()})
    reference = copy.deepcopy(model)
    buffers = convert_to_low_precision_(model, dtype, keep_in_fp32=("named",))
    assert [found.full_name for found in buffers.kept] == ["large.mean"]
    assert [found.full_name for found in buffers.unclear] == ["large.strict", "large.table"]
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    in_half = {name for name, found in dtypes.items() if found == dtype}
    assert {name for name in in_half if ".layer." not in name} == {"large.strict", "large.table"}
    assert {name for name in dtypes if name.startswith("large.layer.")} < in_half
    torch.manual_seed(0)
    for _ in range(3000 if dtype is torch.float16 else 300):
        x = torch.randn(8, 4).to(dtype)
        for name, layer in model.items():
            assert layer(x).dtype == dtype
            reference[name](x.float())
    for name, buffer in model.named_buffers():
        expected = reference.get_buffer(name)
        if name == "large.mean":  # whose inputs are in half precision
            torch.testing.assert_close(buffer, expected, rtol=0, atol=1e-3)
        elif name not in in_half:
            assert torch.equal(buffer, expected)


class MeanTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)
        self.reference = nn.Linear(4, 4).requires_grad_(False)

    @torch.no_grad()
    def update(self) -> None:
        for mean, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mean.data.mul_(0.999).add_(new.data, alpha=0.001)
        for _, fixed in self.reference.named_parameters():
            assert not fixed.requires_grad
        for weight in self.student.parameters():
            weight.data.clamp_(-9, 9)


def test_weights_that_the_code_of_the_model_averages_are_named(recwarn: pytest.WarningsRecorder) -> None:
    model = MeanTeacher()
    with pytest.warns(
        UserWarning,
        match=r"casts 'teacher' to half precision, where most of what .* is lost. Keep them in "
        r"float32 by `LowPrecision\(keep_in_fp32=\(\"norm\", \"teacher\"\)\)`",
    ):
        convert_to_low_precision_(model, torch.bfloat16)
    recwarn.clear()
    model = MeanTeacher()
    convert_to_low_precision_(model, torch.bfloat16, ("norm", "teacher"))
    assert len(recwarn) == 0
    before = model.teacher.weight.clone()
    for _ in range(20):
        model.update()
    expected = 0.999**20 * before + (1 - 0.999**20) * model.student.weight.float()
    torch.testing.assert_close(model.teacher.weight, expected)


def test_whole_numbers_that_half_precision_lacks_stay_in_float32() -> None:
    layer = nn.Linear(4, 4)
    layer.register_buffer("positions", torch.arange(300.0))
    layer.register_buffer("small", torch.arange(200.0))
    buffers = convert_to_low_precision_(nn.Sequential(layer), torch.bfloat16)
    assert torch.equal(layer.positions, torch.arange(300.0))
    assert layer.small.dtype == torch.bfloat16
    assert [found.full_name for found in buffers.kept] == ["0.positions"]


def test_layers_that_are_no_longer_kept_compute_by_their_own_forward() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=("norm", "0"))
    assert "forward" in vars(model[0])
    convert_to_low_precision_(model, torch.bfloat16)
    assert "forward" not in vars(model[0])
    assert model[0].weight.dtype == torch.bfloat16


def test_a_forward_that_somebody_else_has_given_a_layer_stays() -> None:
    model = nn.Sequential(nn.LayerNorm(4))
    model[0].forward = lambda x: x
    convert_to_low_precision_(model, torch.bfloat16)
    assert model(torch.ones(1, 4))[0, 0] == 1
    restore_float32_(model)
    assert "forward" in vars(model[0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is ")
def test_torchscript_is_cast_and_cannot_be_named() -> None:
    def model() -> nn.ModuleDict:
        script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
        return nn.ModuleDict({"script": script, "mine": nn.Sequential(torch.jit.script(nn.Linear(4, 4)))})

    half = torch.ones(2, 4).bfloat16()
    converted = model()
    buffers = convert_to_low_precision_(converted, torch.bfloat16, ("mine",))
    assert converted["script"](half).dtype == converted["mine"](half).dtype == torch.bfloat16
    assert next(converted["script"].parameters()).dtype == torch.bfloat16
    assert next(converted["mine"].parameters()).dtype == torch.float32
    assert [found.full_name for found in buffers.unclear] == ["script.1.running_mean", "script.1.running_var"]
    restore_float32_(converted)
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    with pytest.raises(
        MisconfigurationException,
        match=r"got 'scr\*', which is the TorchScript module 'script'. Put it into a module of your own",
    ):
        convert_to_low_precision_(model(), torch.bfloat16, ("scr*",))


def test_a_restored_model_is_one_in_float32_with_the_same_numbers() -> None:
    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), ForeignRMSNorm())
            self.part = Normed()
            self.metric = MulticlassAccuracy(3)

    model = Model()
    parameters = list(model.parameters())
    convert_to_low_precision_(model, torch.bfloat16)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    restore_float32_(model)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    for name, value in model.state_dict().items():
        assert value.dtype == (torch.float32 if value.is_floating_point() else torch.int64)
        assert torch.equal(value, state[name].to(value.dtype))
    assert model.dtype == torch.float32
    assert not any("forward" in vars(layer) for layer in model.modules())
    # And back again, without another rounding.
    convert_to_low_precision_(model, torch.bfloat16)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


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
    convert_to_low_precision_(model, torch.bfloat16)
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
