"""The curve of peak against time, and what is chosen from it, on fake tensors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_memtrain import MemoryLedger
from lightning_memtrain.checkpointing.insertion import insert_checkpoints
from lightning_memtrain.checkpointing.selection import step_curve
from lightning_memtrain.checkpointing.selection.counted_step import call_seconds
from lightning_memtrain.checkpointing.selection.step_curve import StepCurve
from lightning_memtrain.core import MIB
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import OpCall
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet
from lightning_memtrain.tracing.step.fake_step import FakeStep


class SecondsByFlops(OpTimes):
    """As if an operator took a second per TFLOP and per 100 GB of its arguments: the same on any machine."""

    def _measure(self, call: OpCall) -> float:
        args, kwargs = call.make_arguments(torch.device("meta"))
        with FlopCounterMode(display=False) as counter:
            call.func(*args, **kwargs)
        num_bytes = sum(tensor.nbytes for tensor in tensors_in(args))
        return counter.get_total_flops() / 1e12 + num_bytes / 1e11


@pytest.fixture(autouse=True)
def _calls_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_curve, "call_seconds", lambda: 0.0)


def wide_resnet(
    device: str, batch_size: int = 20
) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, ...]]:
    with torch.device(device):
        model = WideResNet(depth=28, widen_factor=2)
        batch = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), batch


def curve_of(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> StepCurve:
    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(images), labels)

    return StepCurve(FakeStep(model, loss, batch, [optimizer]), SecondsByFlops("cpu"))


def real_peak(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...]) -> int:
    """Peak of a step whose optimizer has its state."""
    for _ in range(2):
        with MemoryLedger(model, optimizer, batch) as ledger:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.breakdown().peak_bytes


def test_what_is_predicted_is_what_a_real_step_holds_to_the_byte() -> None:
    model, optimizer, batch = wide_resnet("cpu", batch_size=4)
    curve = curve_of(model, optimizer, batch)
    limit = (curve.schedules[0].peak_bytes + curve.schedules[-1].peak_bytes) // 2
    for chosen in (curve.knee(), curve.fitting(limit)):
        remove = insert_checkpoints(model, chosen.groups)
        assert real_peak(model, optimizer, batch) == chosen.breakdown.peak_bytes
        remove()
    assert real_peak(model, optimizer, batch) == curve.plain.peak_bytes


def test_nothing_of_the_model_or_its_optimizer_changes() -> None:
    model, optimizer, batch = wide_resnet("cpu", batch_size=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    random = torch.get_rng_state()
    curve_of(model, optimizer, batch).knee()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(
        one is other for one, other in zip(tensors, (*model.parameters(), *model.buffers()), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_choice_takes_no_more_operations_than_blocks_chosen_by_hand() -> None:
    # 381.15 MiB in all; what whole blocks, chosen one after the other by what they free for a FLOP, took.
    by_hand = {200.0: 1.095, 156.5: 1.132, 137.4: 1.165}
    model, optimizer, batch = wide_resnet("meta", batch_size=100)

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        model.zero_grad()
        return counter.get_total_flops()

    plain = flops()
    curve = curve_of(model, optimizer, batch)
    for limit_mib, most in by_hand.items():
        chosen = curve.fitting(int(limit_mib * MIB))
        remove = insert_checkpoints(model, chosen.groups)
        assert real_peak(model, optimizer, batch) == chosen.breakdown.peak_bytes <= limit_mib * MIB
        assert flops() <= most * plain
        remove()


def test_the_knee_leaves_alone_what_buys_nothing() -> None:
    curve = curve_of(*wide_resnet("meta", batch_size=100))
    chosen = curve.knee()
    assert chosen.breakdown.peak_bytes < 138 * MIB  # all blocks: 136.50 MiB
    names = {one.name for group in chosen.groups for one in group}
    assert "fc" not in names
    assert "conv" not in names
    assert chosen.seconds < 0.2 * curve.step_seconds


def test_a_limit_that_is_out_of_reach_names_the_floor_and_what_holds_it() -> None:
    curve = curve_of(*wide_resnet("meta", batch_size=100))
    with pytest.raises(MisconfigurationException) as caught:
        curve.fitting(100 * MIB)
    message = str(caught.value)
    assert message.startswith(
        "`MemoryBudget(limit)` must be at least 136.50 MiB for this model and batch, the lowest peak that "
        "recomputing reaches, but got 100.00 MiB. At that peak there are 81.25 MiB of activations of what is "
        "running (microbatches: `Microbatching`), "
    )
    assert "5.60 MiB of weights (fewer bits or sparse weights make them smaller)" in message
    assert "5.60 MiB of optimizer state (an optimizer with less state, or with state in 8 bits)" in message
    assert message.endswith("Raise the limit, or make one of these smaller.")


def test_a_limit_above_the_plain_peak_recomputes_nothing() -> None:
    curve = curve_of(*wide_resnet("meta", batch_size=10))
    chosen = curve.fitting(curve.plain.peak_bytes)
    assert chosen.groups == []
    assert chosen.seconds == 0


def test_what_a_choice_says() -> None:
    curve = curve_of(*wide_resnet("meta", batch_size=100))
    text = str(curve.fitting(200 * MIB))
    assert "modules are recomputed: peak 19" in text
    assert "instead of 381.15 MiB, about " in text
    assert text.endswith("% more time")


def test_a_chain_of_cheap_layers_is_recomputed_in_segments() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(32)))
        batch = torch.randn(256, 64)
    step = FakeStep(model, lambda x: model(x).square().mean(), (batch,), [])
    curve = StepCurve(step, SecondsByFlops("cpu"))
    lowest = curve.fitting(curve.schedules[-1].peak_bytes)
    held = lowest.breakdown.peak_bytes - curve.plain.at_peak.model_bytes
    # 36 layer outputs without, of which Chen's segments leave 14, beside the batch and a gradient.
    assert held < 16 * batch.nbytes
    assert any(len(group) > 1 for group in lowest.groups)


def test_calls_are_measured() -> None:
    assert 0 <= call_seconds() < 0.1
