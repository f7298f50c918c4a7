from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_memtrain.coordination import RestorableState, register_restorable
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot, WrittenTensors

CPU = torch.device("cpu")
LARGE = 20_000  # numbers of a tensor that is not copied without being asked


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


def test_buffers_may_be_spared():
    model = Net()
    snapshot = BatchSnapshot(model, None, CPU, spared=[model.norm.running_mean])
    disturb(model)
    snapshot.restore()
    assert torch.equal(model.norm.running_mean, torch.ones(2))
    assert torch.equal(model.norm.running_var, torch.ones(2))


def test_objects_of_the_user_are_set_back():
    class Meter:
        def __init__(self) -> None:
            self.values: list[Tensor] = []
            self.count = {"steps": 0}

    model, total = Net(), SumMetric()
    model.meter, model.total = Meter(), total
    total.update(1.0)
    snapshot = BatchSnapshot(model, None, CPU)
    model.meter.values.append(torch.ones(1))
    model.meter.count["steps"] += 1
    model.late = 1
    total.update(2.0)
    snapshot.restore()
    assert (model.meter.values, model.meter.count) == ([], {"steps": 0})
    assert not hasattr(model, "late")
    assert total.compute() == 1.0
    assert total._update_count == 1


def test_other_techniques_go_back_first():
    gathered, seen = [1], []
    model = Net()
    model.meter = [1]

    def restore() -> None:
        seen.append(list(model.meter))
        gathered[:] = [1]

    undo = register_restorable(lambda: RestorableState((torch.ones(3),), restore))
    try:
        snapshot = BatchSnapshot(model, None, CPU)
    finally:
        undo()
    gathered.append(2)
    model.meter.append(2)
    snapshot.restore()
    assert (gathered, seen, model.meter) == ([1], [[1, 2]], [1])
    without = BatchSnapshot(model, None, CPU).num_bytes(accumulating=False)
    assert snapshot.num_bytes(accumulating=False) == without + 12


# ---------------------------------------------------------------------- values of large tensors


def holding(tensor: Tensor) -> Net:
    model = Net()
    model.teacher = {"queue": [tensor]}
    return model


LARGE_TENSORS = [lambda: torch.zeros(LARGE), lambda: nn.Parameter(torch.zeros(LARGE), requires_grad=False)]


@pytest.mark.parametrize("make", LARGE_TENSORS)
def test_a_large_tensor_is_copied_once_somebody_is_about_to_write_to_it(make: Any):
    large = make()
    model, written = holding(large), WrittenTensors()
    snapshot = BatchSnapshot(model, None, CPU, written=written)
    num_bytes = snapshot.num_bytes(accumulating=False)
    snapshot.before_write(large[:2])  # a view of it
    snapshot.before_write(large[:2])
    assert snapshot.num_bytes(accumulating=False) == num_bytes + 4 * LARGE
    large.data[:2] = 1
    snapshot.restore()
    assert torch.equal(large, torch.zeros(LARGE))
    # From then on it is copied at once.
    assert large in written
    again = BatchSnapshot(model, None, CPU, written=written)
    assert again.num_bytes(accumulating=False) == num_bytes + 4 * LARGE
    large.data.add_(1)
    again.restore()
    assert torch.equal(large, torch.zeros(LARGE))


def test_a_write_that_nobody_foresaw_is_said_and_cannot_happen_twice():
    large = torch.zeros(LARGE)
    model, written = holding(large), WrittenTensors()
    snapshot = BatchSnapshot(model, None, CPU, written=written)
    large.add_(1)
    message = (
        "^`Microbatching` runs a batch again in which a tensor was written to in place for the first time, "
        r"of shape \(20000,\): this cannot be taken back. From here on it is copied before every batch.$"
    )
    with pytest.warns(UserWarning, match=message):
        snapshot.restore()
    snapshot.restore()  # said once
    assert torch.equal(large, torch.ones(LARGE))
    snapshot = BatchSnapshot(model, None, CPU, written=written)
    large.add_(1)
    snapshot.restore()
    assert torch.equal(large, torch.ones(LARGE))


def test_a_batch_that_steps_write_to_is_copied_whatever_tensors_it_has():
    model, written = Net(), WrittenTensors()
    first, second = {"x": torch.zeros(3)}, {"x": torch.zeros(4)}
    snapshot = BatchSnapshot(model, None, CPU, batch=first, written=written)
    num_bytes = snapshot.num_bytes(accumulating=False)
    snapshot.before_write(first["x"])
    first["x"].add_(1)
    snapshot.restore()
    assert torch.equal(first["x"], torch.zeros(3))
    assert written.batch
    snapshot = BatchSnapshot(model, None, CPU, batch=second, written=written)
    assert snapshot.num_bytes(accumulating=False) == num_bytes + 16
    second["x"].add_(1)
    snapshot.restore()
    assert torch.equal(second["x"], torch.zeros(4))


def test_written_tensors_are_known_by_identity_and_not_kept_alive():
    written, tensor = WrittenTensors(), torch.zeros(2)
    written.add(tensor)
    assert tensor in written
    assert torch.zeros(2) not in written
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert alive() is None


def test_small_tensors_are_copied_as_long_as_they_are_not_too_many():
    model, rng_bytes = nn.Module(), torch.get_rng_state().nbytes
    model.kept = [torch.zeros(1_024) for _ in range(300)]
    snapshot = BatchSnapshot(model, None, CPU)
    assert snapshot.num_bytes(accumulating=False) == rng_bytes + 256 * 4_096
    model.kept = [torch.zeros(1_025) for _ in range(300)]
    assert BatchSnapshot(model, None, CPU).num_bytes(accumulating=False) == rng_bytes


# ---------------------------------------------------------------------- bytes


def test_it_says_how_much_it_keeps():
    model, rng_bytes = Net(), torch.get_rng_state().nbytes
    buffers_bytes = 4 + (8 + 8 + 8)  # its own; mean, variance and number of batches of the norm
    gradients_bytes = 8 + 4 + (8 + 8)  # of all but the frozen parameter
    snapshot = BatchSnapshot(model, None, CPU)
    assert snapshot.num_bytes(accumulating=False) == rng_bytes + buffers_bytes + 8
    assert snapshot.num_bytes(accumulating=True) == rng_bytes + buffers_bytes + gradients_bytes


def test_without_gradients_no_memory_is_held_for_them():
    model = Net()
    with_one = BatchSnapshot(model, None, CPU).num_bytes(accumulating=False)
    model.with_gradient.grad = None
    assert BatchSnapshot(model, None, CPU).num_bytes(accumulating=False) == with_one - 8


def test_it_says_what_is_within_reach():
    model = Net()
    state_bytes = 8 + 4 + 4 + (8 + 8) + (8 + 8 + 8) + 4
    assert BatchSnapshot(model, None, CPU).reachable_bytes == state_bytes
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    shown = torch.ones(9)
    model.seen = [torch.ones(100)[:10], shown]
    snapshot = BatchSnapshot(model, None, CPU, batch=torch.ones(50), optimizers=[optimizer], constant=[shown])
    assert snapshot.reachable_bytes == state_bytes + (4 + 2 * 8) + 400
    with MemoryLedger(model, optimizer) as ledger:
        assert snapshot.bytes_unknown_to(ledger) == 400
        model.seen[0].sum()
        assert snapshot.bytes_unknown_to(ledger) == 0


# ---------------------------------------------------------------------- devices


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
