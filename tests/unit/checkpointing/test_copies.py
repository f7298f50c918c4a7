"""A model with checkpoints is copied, saved and loaded like one without, and given back as it was."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Full, Nested, Recomputed, Sqrt, insert_checkpoints
from tests.helpers.recomputed import assert_identical, recomputations, recompute, trained


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return x + self.drop(self.norm(self.linear(x)).tanh()) / self.num_calls


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(_Layer() for _ in range(4)))


def _batches(seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(5, 6) for _ in range(2)]


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("policy", [Full(), Sqrt(), Nested()])
@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled, _saved])
def test_a_copy_trains_on_by_itself(policy: Any, copied: Callable[[nn.Module], nn.Module]) -> None:
    expected = _model()
    trained(expected, _batches(1))
    first, second = copy.deepcopy(expected), copy.deepcopy(expected)

    model = _model()
    remove = insert_checkpoints(model, policy.groups(model), policy.contexts)
    trained(model, _batches(1))
    loss = model(_batches(2)[0]).sum()  # a step is under way
    model[0].norm.reset_running_stats()
    model.load_state_dict(expected.state_dict())
    for layer, plain in zip(model, expected, strict=True):
        layer.num_calls = plain.num_calls
    twin = copied(model)
    del loss

    outcome = trained(first, _batches(3))
    with recomputations() as recomputed:
        assert_identical(trained(model, _batches(3)), outcome)
    assert set(recomputed) == {"0", "1", "2", "3"}
    remove()
    with recomputations() as recomputed:
        assert_identical(trained(twin, _batches(3)), trained(second, _batches(3)))
    assert set(recomputed) == {"0", "1", "2", "3"}  # the copy has checkpoints of its own
    assert not set(twin.parameters()) & set(model.parameters())


def test_nothing_can_be_told_from_a_model_without_checkpoints() -> None:
    plain, model = _model(), _model()
    recompute(model, *"0123")
    trained(plain, _batches(1))
    trained(model, _batches(1))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in plain.named_buffers()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert repr(model) == repr(plain)
    plain.load_state_dict(model.state_dict())
    model.load_state_dict(plain.state_dict())


def _with_own_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


@pytest.mark.parametrize("prepare", [lambda layer: None, _with_own_forward])
def test_remove_leaves_every_module_as_it_was(prepare: Callable[[nn.Module], Any]) -> None:
    plain, model = _model(), _model()
    for layer in (*plain, *model):
        prepare(layer)
    before = [dict(module.__dict__) for module in model.modules()]
    remove = insert_checkpoints(model, Nested().groups(model))
    assert [dict(module.__dict__) for module in model.modules()] != before
    model.eval()(_batches(1)[0]).sum().backward()
    for layer in model.train():
        layer.num_calls = 0
        layer.zero_grad()
    remove()
    assert [{**module.__dict__} for module in model.modules()] == before
    remove()  # nothing more to do
    assert_identical(trained(model, _batches(1)), trained(plain, _batches(1)))


def test_remove_has_an_end_where_something_was_put_around_the_forward() -> None:
    model = _model()
    remove = recompute(model, "1")
    _with_own_forward(model[1])
    with recomputations() as recomputed:
        model(_batches(1)[0]).sum().backward()
        assert recomputed == ["1"]
        remove()
        model(_batches(1)[0]).sum().backward()
        assert recomputed == ["1"]


def test_what_is_removed_between_forward_and_backward_is_recomputed_all_the_same() -> None:
    plain, model = _model(), _model()
    remove = insert_checkpoints(model, [[Recomputed(name) for name in "0123"]])
    x = _batches(1)[0]
    for one in (plain, model):
        torch.manual_seed(2)
        loss = one(x).square().sum()
        remove()
        loss.backward()
    assert_identical([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
