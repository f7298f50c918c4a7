"""A fault while entries move leaves all of a layer as it was, or all of it moved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain import sparsify_
from lightning_memtrain.precision import SGD8bit
from lightning_memtrain.sparsity import SparseWeight
from lightning_memtrain.sparsity.storage.patterns import Storage
from tests.helpers.faults import FailAtOp

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "Adam": torch.optim.Adam,
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "ASGD": torch.optim.ASGD,
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Rprop": torch.optim.Rprop,
    "SGD8bit": lambda p: SGD8bit(p, 0.1, momentum=0.9),
    "in the form of bitsandbytes": lambda p: Coded(p),
}
STORAGES: tuple[Storage, ...] = ("bitmask", "int32", "block16")
KEPT, GROWN = torch.arange(40) % 3 > 0, torch.tensor([1, 2, 51, 99, 70_002, 79_999])


class Coded(torch.optim.SGD):
    """State by blocks, as the optimizers of bitsandbytes have it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {
                "state1": torch.arange(parameter.numel(), dtype=torch.uint8),
                "qmap1": torch.linspace(0, 1, 256),
                "absmax1": torch.tensor([2.0]),
            }


def stepped(name: str, storage: Storage) -> tuple[nn.Linear, SparseWeight, Optimizer]:
    torch.manual_seed(0)
    layer = nn.Linear(400, 200)  # two blocks of positions
    positions = torch.cat([torch.arange(0, 100, 5), torch.arange(70_000, 70_100, 5)])
    weight = sparsify_(layer, {"weight": positions}, storage=storage, chunk_bytes=400 * 4 * 64)["weight"]
    optimizer = OPTIMIZERS[name]([weight.values])
    for _ in range(2):
        layer.zero_grad()
        layer(torch.randn(4, 400)).pow(2).sum().backward()
        optimizer.step()
    return layer, weight, optimizer


def tensors_of(layer: Any, weight: SparseWeight, optimizer: Optimizer) -> list[Any]:
    """All that has to go together, each a copy."""
    gradient = weight.values.grad
    parts: list[Any] = [weight.values.detach(), gradient, layer.sparsity_pattern, layer.spans]
    parts += [part for key, part in sorted(optimizer.state[weight.values].items())]
    return [part.clone() if isinstance(part, Tensor) else part for part in parts]


def are_equal(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_out_of_memory_at_any_operator_changes_nothing(name: str, storage: Storage) -> None:
    layer, weight, optimizer = stepped(name, storage)
    before = tensors_of(layer, weight, optimizer)
    num_faults = 0
    while True:
        fault = FailAtOp(num_faults)
        try:
            with fault:
                weight.replace(KEPT, GROWN, [optimizer])
        except torch.OutOfMemoryError:
            assert are_equal(tensors_of(layer, weight, optimizer), before), f"after operator {num_faults}"
            num_faults += 1
            continue
        break
    assert num_faults > 30
    assert not fault.done
    other = stepped(name, storage)
    other[1].replace(KEPT, GROWN, [other[2]])
    after = tensors_of(layer, weight, optimizer)
    assert are_equal(after, tensors_of(*other))
    assert not are_equal(after, before)


class InterruptAtLine:
    """Raises ``KeyboardInterrupt`` at one line of the package of sparse training, as a signal would."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.done = False

    def __enter__(self) -> InterruptAtLine:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if "lightning_memtrain/sparsity/" not in frame.f_code.co_filename.replace("\\", "/"):
            return None
        if event == "line":
            self.number -= 1
            if self.number < 0 and not self.done:
                self.done = True
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("name", ["AdamW amsgrad", "SGD8bit"])
def test_an_interrupt_at_any_line_changes_all_or_nothing(name: str) -> None:
    made = stepped(name, "block16")
    before = tensors_of(*made)
    other = stepped(name, "block16")
    other[1].replace(KEPT, GROWN, [other[2]])
    after = tensors_of(*other)
    num_before, num_after, line = 0, 0, 0
    while True:
        interrupt = InterruptAtLine(line)
        try:
            with interrupt:
                made[1].replace(KEPT, GROWN, [made[2]])
        except KeyboardInterrupt:
            now = tensors_of(*made)
            if are_equal(now, before):
                num_before += 1
            else:
                assert are_equal(now, after), f"after line {line}"
                num_after += 1
                made = stepped(name, "block16")
            line += 1
            continue
        break
    assert num_before > 50
    assert num_after > 5


def test_an_optimizer_that_fails_to_move_its_own_state_keeps_it() -> None:
    class Fails(torch.optim.SGD):
        def reindex_state(self, parameter: Tensor, source: Tensor) -> None:
            self.state[parameter]["momentum_buffer"] = torch.zeros(len(source))
            raise torch.OutOfMemoryError("injected")

    layer, weight, optimizer = stepped("SGD momentum", "int32")
    other = Fails([weight.values], lr=0.1, momentum=0.9)
    other.state[weight.values]["momentum_buffer"] = torch.ones(40)
    before = [*tensors_of(layer, weight, optimizer), *tensors_of(layer, weight, other)]
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        weight.replace(KEPT, GROWN, [optimizer, other])
    assert are_equal([*tensors_of(layer, weight, optimizer), *tensors_of(layer, weight, other)], before)
