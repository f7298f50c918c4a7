from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_memtrain.techniques.microbatching.snapshot import BatchSnapshot

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.with_gradient = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.without = nn.Parameter(torch.tensor([3.0]))
        self.frozen = nn.Parameter(torch.tensor([4.0]), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("unsaved", torch.tensor([5.0]), persistent=False)
        self.with_gradient.grad = torch.tensor([0.5, -0.5])


def disturb(model: Net) -> None:
    torch.rand(7)
    for buffer in model.buffers():
        buffer.add_(1)
    model.with_gradient.grad.add_(9)
    model.without.grad = torch.ones(1)


def test_everything_is_set_back_in_place_as_often_as_asked():
    model = Net()
    gradient, buffers = model.with_gradient.grad, list(model.buffers())
    values = [buffer.clone() for buffer in buffers]
    snapshot = BatchSnapshot(model, None, CPU)
    expected = torch.rand(3)
    for _ in range(2):
        disturb(model)
        snapshot.restore()
        assert model.with_gradient.grad is gradient
        assert torch.equal(gradient, torch.tensor([0.5, -0.5]))
        assert model.without.grad is None
        assert all(now is before for now, before in zip(model.buffers(), buffers, strict=True))
        assert all(torch.equal(now, value) for now, value in zip(buffers, values, strict=True))
        assert torch.equal(torch.rand(3), expected)


def test_a_gradient_that_was_replaced_or_removed_is_back():
    model = Net()
    gradient = model.with_gradient.grad
    snapshot = BatchSnapshot(model, None, CPU)
    model.with_gradient.grad = None
    snapshot.restore()
    assert model.with_gradient.grad is gradient


def test_without_gradients_no_memory_is_held_for_them():
    model = Net()
    model.with_gradient.grad = None
    snapshot = BatchSnapshot(model, None, CPU)
    assert all(value is None for _, _, value in snapshot._gradients)
    assert len(snapshot._gradients) == 4  # all but the frozen one


def test_it_says_how_much_it_keeps():
    model, rng_bytes = Net(), torch.get_rng_state().nbytes
    buffers_bytes = 4 + (8 + 8 + 8)  # its own; mean, variance and number of batches of the norm
    gradients_bytes = 8 + 4 + (8 + 8)  # of all but the frozen parameter
    snapshot = BatchSnapshot(model, None, CPU)
    assert snapshot.num_bytes(amid_window=False) == rng_bytes + buffers_bytes + 8
    assert snapshot.num_bytes(amid_window=True) == rng_bytes + buffers_bytes + gradients_bytes


def test_a_scale_made_since_is_forgotten_and_one_from_before_is_left():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    snapshot = BatchSnapshot(Net(), scaler, CPU)
    scaler.scale(torch.ones(1))
    assert scaler._scale is not None
    snapshot.restore()
    assert (scaler._scale, scaler._growth_tracker) == (None, None)
    scaler.scale(torch.ones(1))
    scale = scaler._scale
    BatchSnapshot(Net(), scaler, CPU).restore()
    assert scaler._scale is scale


def test_the_generator_of_the_device_is_kept_too(monkeypatch: pytest.MonkeyPatch):
    states = {"now": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states["now"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.update(now=state))
    device = torch.device("cuda", 0)
    snapshot = BatchSnapshot(nn.Linear(1, 1), None, device)
    states["now"] = torch.tensor([2])
    snapshot.restore()
    assert torch.equal(states["now"], torch.tensor([1]))
