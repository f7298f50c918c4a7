"""What optimizers keep across parameters, however deep."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_memtrain.optimizer_steps.optimizer_contents import containers_in, optimizers_in
from lightning_memtrain.optimizer_steps.shared_state import SharedState


class Slotted:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, and does without the constructor of its class, as most of its kind do."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups, self.state = optimizer, optimizer.param_groups, defaultdict(dict)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


class Mine(torch.optim.SGD):
    """Not known to treat each parameter by itself."""


def optimizer() -> Any:
    made: Any = Mine([nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3))], lr=0.1)
    made.history = {"steps": 0, "losses": [1.0, {"deep": 2.0}], "seen": {3}}
    made.counter, made.slotted = SimpleNamespace(value=0, nan=float("nan")), Slotted()
    made.recent, made.numbers = deque([1, 2], maxlen=2), itertools.count()
    made.first, made.scale, made.table = True, torch.ones(()), torch.zeros(2000)
    made.inner = Lookahead(torch.optim.Adam(made.param_groups[0]["params"]))
    made.state["across"] = {"norm": torch.zeros(1)}
    return made


CHANGES: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "history['steps']": (lambda o: o.history.update(steps=1), True),
    "history['losses'][1]['deep']": (lambda o: o.history["losses"][1].update(deep=3.0), True),
    "history['losses'][2]": (lambda o: o.history["losses"].append(1.0), True),
    "history['more']": (lambda o: o.history.update(more=None), True),
    "history['seen'][0]": (lambda o: o.history.update(seen={4}), True),
    "counter.value": (lambda o: setattr(o.counter, "value", 1), True),
    "slotted.count": (lambda o: setattr(o.slotted, "count", 1), True),
    "recent[1]": (lambda o: (o.recent.pop(), o.recent.append(7)), True),
    "first": (lambda o: setattr(o, "first", False), True),
    "new": (lambda o: setattr(o, "new", 1), True),
    "scale": (lambda o: o.scale.mul_(2), True),
    "param_groups[0]['lr']": (lambda o: o.param_groups[0].update(lr=0.2), True),
    "inner.param_groups[0]['lr']": (lambda o: o.inner.optimizer.param_groups[0].update(lr=0.2), True),
    "inner.slow[0][1]": (lambda o: o.inner.slow[0][1].add_(1), True),
    "state['across']['norm']": (lambda o: o.state["across"]["norm"].add_(1), True),
    "table": (lambda o: o.table.add_(1), False),
    "numbers": (lambda o: next(o.numbers), False),
}


@pytest.mark.parametrize("place", CHANGES)
def test_a_change_is_found_and_put_back(place: str) -> None:
    change, can_be_restored = CHANGES[place]
    one = optimizer()
    before = SharedState(one)
    assert before.changed() == []
    change(one)
    assert before.changed() == [place]
    assert before.restore() is can_be_restored
    assert before.changed() == ([] if can_be_restored else [place])


def test_everything_at_once_is_put_back_into_the_same_containers() -> None:
    one = optimizer()
    history, losses, group = one.history, one.history["losses"], one.param_groups[0]
    before = SharedState(one)
    for change, can_be_restored in CHANGES.values():
        if can_be_restored:
            change(one)
    assert before.restore()
    assert one.history is history
    assert one.history["losses"] is losses
    assert one.param_groups[0] is group
    assert not hasattr(one, "new")
    assert group["lr"] == 0.1
    assert history == {"steps": 0, "losses": [1.0, {"deep": 2.0}], "seen": {3}}
    assert one.scale.item() == 1.0


def test_parameters_and_what_is_kept_of_each_are_not_shared() -> None:
    plain = torch.ones(2, requires_grad=True)  # optimizers take these, too
    one = Mine([plain, nn.Parameter(torch.ones(3))], lr=0.1, momentum=0.9)
    one.other = dict.fromkeys(one.param_groups[0]["params"], 0)
    before = SharedState(one)
    for p in one.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
        one.other[p] += 1
    one.step()
    assert plain.tolist() != [1.0, 1.0]
    assert before.changed() == []


def test_code_models_and_programs_around_an_optimizer_are_not_searched() -> None:
    one: Any = Mine([nn.Parameter(torch.ones(2))], lr=0.1)
    one.model = nn.Sequential(nn.BatchNorm1d(2))
    one.model.count, one.function = 0, test_a_change_is_found_and_put_back
    one.data = torch.utils.data.TensorDataset(torch.ones(1))
    before = SharedState(one)
    one.model.count = 1
    one.model(torch.ones(3, 2))
    assert before.changed() == []
    assert [c.path for c in containers_in(one) if "data" in c.path] == []


@pytest.mark.parametrize("module", ["torch.optim.adam", "torchao.optim.adam", "bitsandbytes.optim.adam"])
def test_libraries_that_are_known_are_not_searched(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Adam8bit(torch.optim.SGD):
        initialized = False

    one = Adam8bit([nn.Parameter(torch.ones(2))], lr=0.1)
    before = SharedState(one)
    one.initialized = True
    assert before.changed() == ["initialized"]
    monkeypatch.setattr(Adam8bit, "__module__", module)
    one.initialized = False
    before = SharedState(one)
    one.initialized = True
    assert before.known
    assert before.changed() == []


def test_wrapped_optimizers_are_found() -> None:
    one = optimizer()
    assert optimizers_in(one) == [one, one.inner, one.inner.optimizer]
