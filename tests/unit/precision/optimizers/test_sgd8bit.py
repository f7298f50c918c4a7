"""SGD8bit: torch's SGD with a momentum of one byte per parameter."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import Category
from lightning_memtrain.optimizer_steps.shared_state import SharedState
from lightning_memtrain.precision.optimizers.sgd8bit import SGD8bit
from tests.helpers.optimizer_state import state_tensors

SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "dampening": {"momentum": 0.8, "dampening": 0.5},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.01},
}
BOTH = (SGD8bit, torch.optim.SGD)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 3)).to(dtype)


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def run(optimizer_type: Any, num_steps: int, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    model = network() if model is None else model
    optimizer = optimizer_type(model.parameters(), lr=0.01, **settings)
    for seed in range(num_steps):
        set_gradients(model, seed)
        optimizer.step()
    return model


@pytest.mark.parametrize("name", SETTINGS)
def test_its_first_step_is_that_of_sgd_and_later_ones_are_close(name: str) -> None:
    for num_steps, tolerance in ((1, 1e-6), (20, 2e-2)):
        ours, theirs = (run(kind, num_steps, **SETTINGS[name]) for kind in (SGD8bit, torch.optim.SGD))
        start = network()
        for p, q, before in zip(*(m.parameters() for m in (ours, theirs, start)), strict=True):
            assert (p - q).norm() <= tolerance * (q - before).norm()


def test_without_momentum_it_is_sgd_to_the_bit_and_keeps_nothing() -> None:
    settings = {"momentum": 0.0, "weight_decay": 0.1}
    ours, theirs = (run(kind, 5, **settings) for kind in BOTH)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    optimizer = SGD8bit(ours.parameters(), momentum=0.0)
    optimizer.step()
    assert list(state_tensors(optimizer)) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_without_momentum_weights_of_another_dtype_are_those_of_sgd_up_to_rounding(
    dtype: torch.dtype,
) -> None:
    # One step from the same weights: at most one rounding of the direction, and one of the weight, apart.
    ours, theirs = (run(kind, 1, network(dtype), momentum=0.0, weight_decay=0.1) for kind in BOTH)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        step_ulp = 5 * 0.01 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # of 5 deviations
        assert ((p - q).abs() <= torch.finfo(dtype).eps * q.abs() + step_ulp).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_state_takes_at_most_1_05_bytes_per_parameter(dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = SGD8bit(model.parameters())
    set_gradients(model, 0)
    with MemoryLedger(model, optimizer) as ledger:
        optimizer.step()
    numel = sum(p.numel() for p in model.parameters())
    num_bytes = sum(p.numel() + 4 * -(-p.numel() // 256) for p in model.parameters())
    held = ledger.breakdown()
    assert sum(value.nbytes for value in state_tensors(optimizer)) == num_bytes
    assert held.maxima[Category.OPTIMIZER_STATE] == num_bytes
    assert num_bytes <= 1.05 * numel
    # Of 120,000 weights, 16,384 at a time: six times float32 of a piece, and its 64 scales.
    assert held.ledger_peak_bytes - held.start_bytes - num_bytes <= 6 * 4 * 16_384 + 5 * 64


def test_temporary_bytes_do_not_grow_with_the_parameter() -> None:
    temporary = []
    for numel in (2**18, 2**20):
        model = nn.ParameterList([nn.Parameter(torch.zeros(numel))])
        optimizer = SGD8bit(model.parameters())
        set_gradients(model, 0)
        optimizer.step()
        with MemoryLedger(model, optimizer) as ledger:
            optimizer.step()
        held = ledger.breakdown()
        temporary.append(held.ledger_peak_bytes - held.start_bytes)
    assert temporary[0] == temporary[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_resumed_is_uninterrupted_to_the_bit(dtype: torch.dtype) -> None:
    def train(interrupt: bool) -> list[Tensor]:
        model = network(dtype)
        optimizer = SGD8bit(model.parameters(), lr=0.1, nesterov=True)
        for seed in range(6):
            if interrupt and seed == 3:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict()], file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                model = network(dtype)
                model.load_state_dict(saved[0])
                optimizer = SGD8bit(model.parameters(), lr=0.1)
                optimizer.load_state_dict(saved[1])
            set_gradients(model, seed)
            optimizer.step()
        dtypes = {value.dtype for value in state_tensors(optimizer)}
        assert dtypes == {torch.int8, torch.float32}
        return [*model.parameters(), *state_tensors(optimizer)]

    assert all(torch.equal(*pair) for pair in zip(train(False), train(True), strict=True))


def test_a_copied_optimizer_keeps_its_dtypes_too() -> None:
    model = network()
    optimizer = SGD8bit(model.parameters())
    set_gradients(model, 0)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    twin.load_state_dict(optimizer.state_dict())
    assert {value.dtype for value in state_tensors(twin)} == {torch.int8, torch.float32}
    for parameter in twin.param_groups[0]["params"]:
        parameter.grad = torch.zeros_like(parameter)
    twin.step()


def test_strides_do_not_matter() -> None:
    plain, strided = nn.Conv2d(8, 40, 3), nn.Conv2d(8, 40, 3)
    strided.load_state_dict(plain.state_dict())
    strided.to(memory_format=torch.channels_last)
    for model in (plain, strided):
        run(SGD8bit, 4, model)
    assert strided.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.weight, strided.weight)


def test_schedulers_groups_and_closures() -> None:
    model = network()
    optimizer = SGD8bit([{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    set_gradients(model, 0)
    assert optimizer.step(lambda: 3.0) == 3.0
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 1e-4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, r"`SGD8bit\(lr\)` must be at least 0, but got lr=-1.0. Use a positive step size."),
        ({"momentum": 1.0}, r"`SGD8bit\(momentum\)` must be in \[0, 1\), but got momentum=1.0. Use e.g. 0.9"),
        ({"weight_decay": -0.1}, r"`SGD8bit\(weight_decay\)` must be at least 0, but got weight_decay=-0.1."),
        (
            {"nesterov": True, "momentum": 0.0},
            r"nesterov=True\)` needs momentum and no dampening, but got momentum=0.0 and dampening=0.0. Give",
        ),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SGD8bit(network().parameters(), **arguments)


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(10, 4, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"needs dense gradients, but got a sparse one.*\(10, 4\).*sparse=False"
    ):
        SGD8bit(table.parameters()).step()


def test_a_step_that_rounds_leaves_nothing_on_the_optimizer() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = SGD8bit([weight])
    before = SharedState(optimizer)
    with optimizer.rounding_by(lambda values, dtype: None):
        assert before.changed() == ["_round"]
    assert before.changed() == []
