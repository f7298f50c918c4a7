from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from lightning_memtrain.microbatching.batchnorm.synchronized_batchnorm import SynchronizedBatchNorm

SIZES = [7, 6, 4, 3]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def chain(num_layers: int, **kwargs) -> nn.Sequential:
    """Batch norm layers with a nonlinear map behind each, so that one's gradient needs the next one's."""
    blocks = [
        module
        for _ in range(num_layers)
        for module in (nn.Linear(5, 5), nn.BatchNorm1d(5, **kwargs), nn.Tanh())
    ]
    return nn.Sequential(*blocks, nn.Linear(5, 1)).double()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    assert expected
    flat = [torch.cat([grads[name].flatten() for name in expected]) for grads in (found, expected)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


def loss_of(model, rows):
    return model(rows).exp().sum()


def run_unsplit(model, rows):
    model.zero_grad()
    loss = loss_of(model, rows)
    loss.backward()
    return loss.item()


def run_chunks(synchronized, model, rows, num_sweeps):
    """Losses of the sweeps; the model is left with the gradients of the last."""
    losses = []
    with synchronized.batch():
        with synchronized.statistics_pass():
            model(rows)
        for _ in range(num_sweeps):
            model.zero_grad()
            losses.append(0.0)
            with synchronized.sweep():
                for chunk in rows.split(SIZES):
                    with synchronized.chunk():
                        loss = loss_of(model, chunk)
                        loss.backward()
                    losses[-1] += loss.item()
    return losses


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.8 + 0.3


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize(
    "kwargs", [{}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}]
)
def test_one_more_layer_is_exact_with_each_sweep(num_layers, kwargs):
    unsplit = chain(num_layers, **kwargs)
    model = copy.deepcopy(unsplit)
    synchronized = SynchronizedBatchNorm(model)
    for _ in range(2):
        rows = draw(sum(SIZES), 5)
        expected_loss = run_unsplit(unsplit, rows)
        expected = gradients(unsplit)
        for num_sweeps in range(1, num_layers + 2):
            attempt = copy.deepcopy(model)
            losses = run_chunks(SynchronizedBatchNorm(attempt), attempt, rows, num_sweeps)
            assert losses == pytest.approx([expected_loss] * num_sweeps, rel=1e-12)
            found = gradients(attempt)
            # Layers behind the last `num_sweeps - 1` batch norms have their exact gradient.
            exact = {
                name for name in expected if int(name.split(".")[0]) >= 3 * (num_layers + 1 - num_sweeps)
            }
            assert relative_error({n: found[n] for n in exact}, {n: expected[n] for n in exact}) < 1e-12
            if num_sweeps <= num_layers:
                assert relative_error(found, expected) > 1e-4
        run_chunks(synchronized, model, rows, num_layers + 1)
        # The pass over the unsplit batch is the update itself.
        for buffer, value in zip(model.buffers(), unsplit.buffers(), strict=True):
            assert torch.equal(buffer, value)


def test_one_sweep_is_nearer_to_the_unsplit_gradient_than_chunks_with_their_own_statistics():
    model = chain(3)
    rows = draw(sum(SIZES), 5)
    run_unsplit(model, rows)
    expected = gradients(model)
    model.zero_grad()
    for chunk in rows.split(SIZES):
        loss_of(model, chunk).backward()
    plain = relative_error(gradients(model), expected)
    run_chunks(SynchronizedBatchNorm(model), model, rows, num_sweeps=1)
    assert relative_error(gradients(model), expected) < 0.5 * plain


def test_images_and_frozen_parameters():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1)
    ).double()
    model[1].weight.requires_grad_(False)
    rows = draw(sum(SIZES), 3, 4, 4)
    run_unsplit(model, rows)
    expected = gradients(model)
    run_chunks(SynchronizedBatchNorm(model), model, rows, num_sweeps=2)
    assert model[1].weight.grad is None
    assert relative_error(gradients(model), expected) < 1e-12


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_keeps_its_types(autocast):
    model = chain(2).float()
    rows = draw(sum(SIZES), 5).float()
    if not autocast:
        model, rows = model.bfloat16(), rows.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        run_unsplit(model, rows)
        expected = gradients(model)
        run_chunks(SynchronizedBatchNorm(model), model, rows, num_sweeps=3)
    found = gradients(model)
    assert {name: grad.dtype for name, grad in found.items()} == {
        name: parameter.dtype for name, parameter in model.named_parameters()
    }
    assert relative_error(found, expected) < 0.05  # bfloat16 rounds to 1 in 256


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.linear = nn.Linear(5, 5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(self.norm(self.linear(rows))).tanh())


def test_calls_of_a_shared_layer_have_statistics_of_their_own():
    model = Twice().double()
    rows = draw(sum(SIZES), 5)
    run_unsplit(model, rows)
    expected = gradients(model)
    run_chunks(SynchronizedBatchNorm(model), model, rows, num_sweeps=3)
    assert relative_error(gradients(model), expected) < 1e-12


class Checkpointed(nn.Module):
    def __init__(self, body: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.body = body
        self.reentrant = reentrant

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, rows.detach().requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [True, False])
def test_recomputation_uses_the_statistics_of_its_call(reentrant, early_stop):
    body = chain(2)
    rows = draw(sum(SIZES), 5)
    run_unsplit(body, rows)
    expected = {f"body.{name}": grad for name, grad in gradients(body).items()}
    model = Checkpointed(body, reentrant)
    with set_checkpoint_early_stop(early_stop):
        run_chunks(SynchronizedBatchNorm(model), model, rows, num_sweeps=3)
    assert relative_error(gradients(model), expected) < 1e-12


def test_recomputation_of_a_shared_layer_is_refused():
    model = Checkpointed(Twice().double(), reentrant=False)
    with pytest.raises(RuntimeError, match=r"must call a layer once .* but 'body.norm' is called 2 times"):
        run_chunks(SynchronizedBatchNorm(model), model, draw(sum(SIZES), 5), num_sweeps=1)


@pytest.mark.parametrize("fails", [True, False])
def test_after_a_batch_the_layers_are_their_own_again(fails):
    model = chain(1)
    before = [buffer.clone() for buffer in model.buffers()]
    synchronized = SynchronizedBatchNorm(model)
    rows = draw(8, 5)
    with pytest.raises(MemoryError) if fails else nullcontext(), synchronized.batch():
        with synchronized.statistics_pass():
            assert not model(rows).requires_grad
        with synchronized.sweep(), synchronized.chunk():
            assert "forward" in vars(model[1])
            model(rows[:4])
            if fails:
                raise MemoryError
    assert "forward" not in vars(model[1])
    assert not model[1]._forward_pre_hooks
    unchanged = [torch.equal(buffer, old) for buffer, old in zip(model.buffers(), before, strict=True)]
    assert unchanged == [fails] * 3


def test_layers_in_evaluation_mode_are_left_alone():
    model = chain(1)
    model(draw(8, 5))
    model[1].eval()
    rows = draw(sum(SIZES), 5)
    before = [buffer.clone() for buffer in model.buffers()]
    run_unsplit(model, rows)
    expected = gradients(model)
    run_chunks(SynchronizedBatchNorm(model), model, rows, num_sweeps=1)
    assert relative_error(gradients(model), expected) < 1e-12
    assert all(torch.equal(buffer, old) for buffer, old in zip(model.buffers(), before, strict=True))


def test_a_chunk_without_statistics_is_refused():
    model = chain(1)
    synchronized = SynchronizedBatchNorm(model)
    message = r"must call each layer at most as often as `statistics_pass` did, but '1' is called more than 0"
    with (
        pytest.raises(RuntimeError, match=message),
        synchronized.batch(),
        synchronized.sweep(),
        synchronized.chunk(),
    ):
        model(draw(4, 5))


def test_layers_with_a_forward_of_their_own_are_refused():
    with pytest.raises(
        ValueError, match="must have torch's own batch norm layers, but got SyncBatchNorm at '0'"
    ):
        SynchronizedBatchNorm(nn.Sequential(nn.SyncBatchNorm(4)))


@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_models_are_refused(in_place):
    body = chain(1)
    if in_place:
        body.compile(backend="eager")
    model = nn.Sequential(body if in_place else torch.compile(body, backend="eager"))
    with pytest.raises(ValueError, match=r"must not be compiled, .* but got the compiled module '0'"):
        SynchronizedBatchNorm(model)
