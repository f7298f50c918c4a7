"""Checkpoints within checkpoints: blocks in blocks, groups in groups, torch's own around and within."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lightning_memtrain.checkpointing import Full, Nested, Recomputed, SelectiveOps, Sqrt, insert_checkpoints
from tests.helpers.recomputed import assert_exact, assert_identical, recomputations, trained


def _rows() -> list[Tensor]:
    return [torch.randn(5, 6) for _ in range(3)]


def _layer() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.2), nn.BatchNorm1d(6), nn.Tanh())


def _stages() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 6), *(nn.Sequential(_layer(), _layer()) for _ in range(4)), nn.Linear(6, 6)
    )


STAGES = [str(index) for index in range(1, 5)]
LAYERS = [f"{stage}.{index}" for stage in STAGES for index in range(2)]


def _alone(names: list[str]) -> list[list[Recomputed]]:
    return [[Recomputed(name)] for name in names]


def _levels(names: list[str]) -> list[list[Recomputed]]:
    return [[Recomputed(name, (index // 2, index % 2)) for index, name in enumerate(names)]]


GROUPS = {
    "layers in stages": _alone(LAYERS) + _alone(STAGES),
    "stages before layers": _alone(STAGES) + _alone(LAYERS),
    "three deep": _alone([f"{name}.0" for name in LAYERS]) + _alone(LAYERS) + _alone(STAGES),
    "layers in all": _alone(LAYERS) + _alone([""]),
    "segments in stages": [[Recomputed(f"{stage}.{i}") for i in range(2)] for stage in STAGES]
    + _alone(STAGES),
    "layers in segments": [*_alone(LAYERS), [Recomputed(stage) for stage in STAGES]],
    "layers in levels": _alone(LAYERS) + _levels(STAGES),
    "levels in all": _levels(STAGES) + _alone([""]),
    "levels in segments": [*_levels(LAYERS[:4]), [Recomputed(stage) for stage in STAGES]],
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_within_groups_train_as_without_checkpoints(name: str) -> None:
    outcomes = []
    for groups in ([], GROUPS[name]):
        torch.manual_seed(0)
        model = _stages()
        insert_checkpoints(model, groups)
        outcomes.append(trained(model, _rows()))
    assert_identical(*outcomes)


class _OwnCheckpoints(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.one, self.two = _layer(), _layer()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.one, x, use_reentrant=self.use_reentrant) + self.two(x)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_model_may_use_the_checkpoints_of_torch_within_a_block(use_reentrant: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 6), _OwnCheckpoints(use_reentrant), _OwnCheckpoints(use_reentrant))

    # A reentrant one moves its running statistics once more in its own recomputation, with or without ours.
    assert_exact(make, ["1", "2"], _rows)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("policy", [Full(), Sqrt(), Nested(), SelectiveOps()])
def test_a_model_may_use_the_checkpoints_of_torch_around_blocks(policy: Any, use_reentrant: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 6)
            # Torch's own checkpoints move running statistics once more.
            layer = nn.TransformerEncoderLayer(6, 2, 8)
            self.layers = nn.Sequential(*(copy.deepcopy(layer) for _ in range(6)))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, self.first(x), use_reentrant=use_reentrant)

    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = Model()
        if checkpointed:
            insert_checkpoints(model, policy.groups(model), policy.contexts)
        with recomputations() as recomputed:
            outcomes.append(trained(model, _rows()))
    assert recomputed
    assert_identical(*outcomes)


POLICIES: list[tuple[Any, Callable[[], nn.Module]]] = [
    (policy, make)
    for policy in (Full(), Sqrt(), Nested(), Nested(3), SelectiveOps(), SelectiveOps(["aten.tanh"]))
    for make in (
        _stages,
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(6, 2, 8), 5, enable_nested_tensor=False),
    )
]


@pytest.mark.parametrize(("policy", "make"), POLICIES)
def test_policies_train_as_without_checkpoints(policy: Any, make: Callable[[], nn.Module]) -> None:
    outcomes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = make()
        if checkpointed:
            insert_checkpoints(model, policy.groups(model), policy.contexts)
        with recomputations() as recomputed:
            outcomes.append(trained(model, _rows()))
    assert len(set(recomputed)) == sum(len(group) for group in policy.groups(model))
    assert_identical(*outcomes)
