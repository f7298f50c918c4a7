"""Each parameter is stepped when its gradient is complete, not before it and not much later."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing import Nested, Recomputed, insert_checkpoints
from lightning_memtrain.core import Category
from lightning_memtrain.optimizer_in_backward import AdamA, ExactMomentum, pending_steps
from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_steps import step_parameter
from lightning_memtrain.optimizer_steps.parameter_steps import step_parameters

MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def backward(steps: BackwardSteps, loss: Tensor, *, last: bool = True) -> None:
    steps.begin(loss, last=last)
    loss.backward()
    steps.end()


def batches(width: int, rows: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, width, generator=generator) for _ in range(4)]


def assert_trains_as_plain(
    model: nn.Module, make: MakeOptimizer = sgd, width: int = 8
) -> tuple[nn.Module, BackwardSteps]:
    plain = copy.deepcopy(model)
    reference, optimizer = make(plain.parameters()), make(model.parameters())
    steps = BackwardSteps(optimizer, step_parameter)
    for batch in batches(width):
        reference.zero_grad()
        plain(batch).square().mean().backward()
        reference.step()
        backward(steps, model(batch).square().mean())
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
        assert q.grad is None
        assert not q._post_accumulate_grad_hooks
    for p, q in zip(plain.buffers(), model.buffers(), strict=True):
        assert torch.equal(p, q)
    return model, steps


def test_the_gradients_are_those_of_one_layer_at_a_time() -> None:
    widths = (64, 48, 32, 40, 8)
    model = mlp(*widths)
    optimizer = sgd(model.parameters())
    steps = BackwardSteps(optimizer, step_parameter)
    backward(steps, model(torch.ones(2, 64)).sum())  # makes the momentum
    batch = torch.ones(2, 64)
    sizes = [4 * a * b for a, b in itertools.pairwise(widths)]
    with MemoryLedger(model, optimizer, batch) as ledger:
        backward(steps, model(batch).sum())
        optimizer.step()
    maxima = ledger.breakdown().maxima
    assert maxima[Category.GRADIENTS] == max(sizes)
    assert maxima[Category.OPTIMIZER_STATE] == maxima[Category.PARAMETERS] == sum(sizes)
    assert steps.num_stepped == 2 * len(sizes)
    assert steps.num_deferred == 0

    plain = mlp(*widths)
    optimizer = sgd(plain.parameters())
    with MemoryLedger(plain, optimizer, batch) as ledger:
        plain(batch).sum().backward()
        optimizer.step()
    assert ledger.breakdown().maxima[Category.GRADIENTS] == sum(sizes)


def test_accumulated_gradients_and_momentum_are_one_buffer() -> None:
    widths = (64, 48, 32, 8)
    model = mlp(*widths)
    optimizer = sgd(model.parameters())
    steps = BackwardSteps(optimizer, step_parameter, ExactMomentum())
    chunks = torch.ones(8, 64).chunk(4)
    total = sum(4 * a * b for a, b in itertools.pairwise(widths))
    largest = 4 * 64 * 48

    def step() -> None:
        for number, chunk in enumerate(chunks, 1):
            backward(steps, model(chunk).sum(), last=number == 4)
        steps.finish()
        optimizer.step()

    step()
    with MemoryLedger(model, optimizer, chunks) as ledger:
        step()
    breakdown = ledger.breakdown()
    held = breakdown.maxima
    # The momentum, which is the gradient at times, is counted once.
    assert held[Category.GRADIENTS] + held[Category.OPTIMIZER_STATE] == total
    assert held[Category.PARAMETERS] == total
    assert breakdown.ledger_peak_bytes <= 2 * total + largest + 4 * 8 * (64 + 48 + 32 + 8) * 2
    assert sum(breakdown.at_peak.values()) == breakdown.ledger_peak_bytes


class Tied(nn.Module):
    """One weight used by two blocks, with batch norm between; blocks may be recomputed."""

    def __init__(self, run: Callable[..., Tensor] = lambda block, x: block(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(8, 8)
        self.first = nn.Sequential(self.shared, nn.BatchNorm1d(8), nn.Tanh())
        self.second = nn.Sequential(self.shared, nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.second, self.run(self.first, x)))


def test_a_weight_that_is_used_twice_is_stepped_once() -> None:
    _, steps = assert_trains_as_plain(Tied())
    assert steps.num_stepped == 4 * len(list(Tied().parameters()))


def test_a_recomputation_sees_the_weights_of_the_forward() -> None:
    _model, steps = assert_trains_as_plain(Tied(lambda block, x: checkpoint(block, x, use_reentrant=False)))
    assert steps.num_deferred == 0


def test_a_backward_inside_of_backward_leaves_its_parameters_to_the_end() -> None:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x.requires_grad_(), use_reentrant=True)

    _, steps = assert_trains_as_plain(Tied(run))
    assert steps.num_deferred == 4 * len(
        list(Tied().first.parameters()) + list(Tied().second[1].parameters())
    )


def test_more_of_a_gradient_after_the_step_is_refused() -> None:
    shared = nn.Linear(4, 4)
    steps = BackwardSteps(sgd(shared.parameters()), step_parameter)
    inner = checkpoint(
        nn.Sequential(shared, nn.Tanh()), torch.ones(2, 4, requires_grad=True), use_reentrant=True
    )
    loss = shared(inner).sum()
    steps.begin(loss, last=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        loss.backward()
    steps.abandon()


@pytest.mark.parametrize("nested", [False, True])
def test_blocks_that_are_recomputed_by_our_own_checkpointing(nested: bool) -> None:
    layers = list(mlp(*[8] * 9))
    model = nn.Sequential(*(nn.Sequential(*layers[i : i + 2]) for i in range(0, 16, 2)))
    plain = copy.deepcopy(model)
    groups = Nested().groups(model) if nested else [[Recomputed(str(i)) for i in range(len(model))]]
    remove = insert_checkpoints(model, groups)
    reference, optimizer = sgd(plain.parameters()), sgd(model.parameters())
    steps = BackwardSteps(optimizer, step_parameter)
    for batch in batches(8):
        reference.zero_grad()
        plain(batch).square().mean().backward()
        reference.step()
        backward(steps, model(batch).square().mean())
    remove()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    assert steps.num_deferred == 0


def test_frozen_and_unused_parameters_are_left_alone() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 1), "unused": nn.Linear(8, 1), "frozen": nn.Linear(8, 8)})
    model["frozen"].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    before = copy.deepcopy(model.state_dict())
    steps = BackwardSteps(optimizer, step_parameter)
    backward(steps, model["used"](model["frozen"](torch.ones(2, 8))).sum())
    assert steps.num_stepped == 2
    assert set(optimizer.state) == set(model["used"].parameters())
    model["frozen"].requires_grad_(True)  # thawed between steps
    backward(steps, model["used"](model["frozen"](torch.ones(2, 8))).sum())
    assert steps.num_stepped == 6
    assert torch.equal(model["unused"].weight, before["unused.weight"])


def test_sparse_gradients() -> None:
    def embedding() -> nn.Embedding:
        torch.manual_seed(0)
        return nn.Embedding(10, 4, sparse=True)

    one, other = embedding(), embedding()
    optimizer, reference = (torch.optim.SparseAdam(list(e.parameters()), lr=0.1) for e in (one, other))
    steps = BackwardSteps(optimizer, step_parameter)
    for ids in (torch.tensor([1, 2, 2]), torch.tensor([0, 2])):
        backward(steps, one(ids).square().sum())
        reference.zero_grad()
        other(ids).square().sum().backward()
        reference.step()
    assert torch.equal(one.weight, other.weight)
    steps = BackwardSteps(sgd(one.parameters()), step_parameter, ExactMomentum())
    loss = one(torch.tensor([1])).sum()
    steps.begin(loss, last=False)
    with pytest.raises(MisconfigurationException, match="needs dense gradients"):
        loss.backward()
    steps.abandon()


def test_gradients_that_are_not_numbers_arrive() -> None:
    layer = nn.Linear(2, 1)
    steps = BackwardSteps(sgd(layer.parameters()), step_parameter)
    backward(steps, layer(torch.full((1, 2), torch.nan)).sum())
    assert layer.weight.isnan().all()


def test_an_optimizer_that_counts_in_its_groups_is_refused() -> None:
    class Counts(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            super().step()
            self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1

    layer = nn.Linear(2, 1)
    steps = BackwardSteps(Counts(layer.parameters(), lr=0.1), step_parameter)
    loss = layer(torch.ones(1, 2)).sum()
    steps.begin(loss, last=True)
    with pytest.raises(MisconfigurationException, match=r"each parameter by itself.*Counts.*\['k'\]"):
        loss.backward()
    steps.abandon()


def test_a_parameter_that_gets_no_gradient_in_the_last_backward_is_stepped_at_the_end() -> None:
    def run(accumulation: ExactMomentum | None) -> list[Tensor]:
        torch.manual_seed(0)
        first, second = nn.Linear(3, 1), nn.Linear(3, 1)
        optimizer = sgd([*first.parameters(), *second.parameters()])
        steps = BackwardSteps(optimizer, step_parameter, accumulation)
        for _ in range(3):
            optimizer.zero_grad()
            losses = (first(torch.ones(2, 3)).square().sum(), second(torch.ones(2, 3)).square().sum())
            for loss, last in zip(losses, (False, True), strict=True):
                if accumulation is None:
                    loss.backward()
                else:
                    backward(steps, loss, last=last)
            if accumulation is not None:
                steps.finish()
            optimizer.step()
        return [*first.parameters(), *second.parameters()]

    for p, q in zip(run(None), run(ExactMomentum()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.01, 1e6])
def test_clipping_by_the_norm_of_a_first_backward(max_norm: float) -> None:
    model = mlp(8, 6, 4)
    plain = copy.deepcopy(model)
    reference, optimizer = sgd(plain.parameters()), sgd(model.parameters())
    steps = BackwardSteps(optimizer, step_parameter)
    for batch in batches(8):
        reference.zero_grad()
        plain(batch).square().mean().backward()
        nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        reference.step()
        loss = model(batch).square().mean()
        steps.begin(loss, last=True)
        steps.measure(loss, max_norm)
        loss.backward()
        steps.end()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_adam_accumulation_is_its_equations() -> None:
    model = nn.Linear(3, 2, bias=False)
    weight = model.weight.detach().clone().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.05)
    steps = BackwardSteps(optimizer, step_parameter, AdamA())
    m, v = torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    generator = torch.Generator().manual_seed(0)
    for t in (1, 2, 3):
        gradients = [torch.randn(2, 3, generator=generator) for _ in range(4)]
        for number, gradient in enumerate(gradients):
            backward(steps, (model.weight * gradient).sum(), last=number == 3)
            assert model.weight.grad is None
        m = 0.8 * m + 0.2 * sum(g.double() for g in gradients)
        v = 0.9 * v + 0.1 * sum(g.double() ** 2 for g in gradients)
        weight *= 1 - 0.1 * 0.05
        weight -= 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
    torch.testing.assert_close(model.weight.double(), weight, rtol=1e-5, atol=1e-6)
    assert optimizer.state[model.weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


def many_small(num: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(num)))


@pytest.mark.parametrize("make", [sgd, torch.optim.AdamW])
def test_small_parameters_are_stepped_together_and_as_in_plain_torch(
    make: MakeOptimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped: list[int] = []

    def count(optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        stepped.append(len(parameters))
        step_parameters(optimizer, parameters)

    monkeypatch.setattr(pending_steps, "step_parameters", count)
    _, steps = assert_trains_as_plain(many_small(100), make)
    assert sum(stepped) == steps.num_stepped == 4 * 200
    # A 32nd of all gradients is 900 bytes: three layers, and one parameter more. The very first is stepped
    # alone, which tells whether the optimizer can do so at all.
    assert stepped[0] == 1
    assert set(stepped[1:-1]) <= {7, 8}
    assert len(stepped) == 4 * 25 + 1


def test_what_waits_is_a_small_part_of_all_gradients() -> None:
    model = many_small(100)
    optimizer = sgd(model.parameters())
    steps = BackwardSteps(optimizer, step_parameter)
    batch = torch.ones(2, 8)
    backward(steps, model(batch).sum())  # makes the momentum
    total = sum(p.nbytes for p in model.parameters())
    with MemoryLedger(model, optimizer, batch) as ledger:
        backward(steps, model(batch).sum())
    # Until more than a 32nd waits, with the one that is more, and one of the layer's other parameter.
    assert ledger.breakdown().maxima[Category.GRADIENTS] <= total / 32 + 2 * 4 * 64


def test_hooks_of_others_stay_and_run_before_the_step() -> None:
    layer = nn.Linear(2, 1)
    seen: list[bool] = []
    own = layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad is not None))
    steps = BackwardSteps(sgd(layer.parameters()), step_parameter)
    for number in (1, 2):
        loss = layer(torch.ones(1, 2)).sum()
        steps.begin(loss, last=True)
        later = layer.bias.register_post_accumulate_grad_hook(lambda p: None)
        loss.backward()
        steps.end()
        assert seen == [True] * number
        assert list(layer.weight._post_accumulate_grad_hooks) == [own.id]
        assert list(layer.bias._post_accumulate_grad_hooks) == [later.id]
        later.remove()
    assert steps.num_stepped == 4


def test_a_failed_backward_leaves_nothing_waiting() -> None:
    model = many_small(2)
    steps = BackwardSteps(sgd(model.parameters()), step_parameter)
    backward(steps, model(torch.ones(1, 8)).sum())
    before = copy.deepcopy(model.state_dict())
    loss = model(torch.ones(1, 8)).sum()
    steps.begin(loss, last=True)
    loss.backward()  # all of it is less than what may wait
    steps.abandon()
    steps.end()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_parameters_can_be_stepped_amid_a_backward_that_records_a_graph() -> None:
    layer, plain = nn.Linear(2, 1), nn.Linear(2, 1)
    plain.load_state_dict(layer.state_dict())
    optimizer, reference = sgd(layer.parameters()), sgd(plain.parameters())
    steps = BackwardSteps(optimizer, step_parameter)
    for _ in range(2):
        reference.zero_grad()
        plain(torch.ones(1, 2)).square().sum().backward()
        reference.step()
        loss = layer(torch.ones(1, 2)).square().sum()
        steps.begin(loss, last=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of cycles
            loss.backward(create_graph=True)
        steps.end()
    assert torch.equal(plain.weight, layer.weight)
    assert not layer.weight.grad_fn
