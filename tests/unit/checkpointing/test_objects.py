"""Blocks that count, gather and draw in Python objects train as without checkpoints, and count once."""

from __future__ import annotations

import gc
import pickle
import random
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_memtrain.checkpointing import Recomputed, insert_checkpoints
from lightning_memtrain.checkpointing.recompute.objects.adapter_lookup import adapters_of
from tests.helpers.recomputed import assert_exact, assert_identical, recompute


def _rows() -> list[Tensor]:
    return [torch.randn(4, 6) for _ in range(3)]


class Tracker:
    """Counts, two objects deep."""

    def __init__(self) -> None:
        self.calls = 0
        self.inner = types.SimpleNamespace(total=0.0, seen={"sizes": []})

    def note(self, x: Tensor) -> float:
        self.calls += 1
        self.inner.total += x.detach().abs().mean().item()
        self.inner.seen["sizes"].append(len(x))
        return 1 / (self.calls + self.inner.total + len(self.inner.seen["sizes"]))


class Slotted:
    __slots__ = ("calls", "unset")

    def __init__(self) -> None:
        self.calls = 0


@dataclass
class Meter:
    values: list[float] = field(default_factory=list)
    last: Meter | None = None


class Log(list[float]):
    """A list with an attribute."""

    longest = 0


Pair = namedtuple("Pair", ["left", "right"])


class _Block(nn.Module):
    def __init__(self, make: Callable[[], Any], use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.held = make()
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return self.other(x.tanh() * self.use(self.held, x)).sin()


def _slotted(held: Slotted, x: Tensor) -> float:
    held.calls += 1
    return 1 / held.calls


def _meter(held: Meter, x: Tensor) -> float:
    held.values.append(x.detach().mean().item())
    held.last = Meter([*held.values], held.last)
    return sum(held.values) + len(held.last.values)


def _log(held: Log, x: Tensor) -> float:
    held.append(x.detach().mean().item())
    held.longest = max(held.longest, len(held))
    return sum(held) + held.longest


def _nested(held: dict[str, dict[str, list[int]]], x: Tensor) -> float:
    held.setdefault("by kind", {}).setdefault("all", []).append(len(x))
    return 1 / len(held["by kind"]["all"])


def _window(held: deque[float], x: Tensor) -> float:
    held.append(x.detach().mean().item())
    return sum(held) / len(held)


def _counter(held: Counter[str], x: Tensor) -> float:
    held["calls"] += 1
    return 1 / held["calls"]


def _default(held: defaultdict[str, list[int]], x: Tensor) -> float:
    held["calls"].append(1)
    return 1 / len(held["calls"])


def _ordered(held: OrderedDict[int, float], x: Tensor) -> float:
    held[len(held)] = 1.0
    held.move_to_end(0)
    return 1 / len(held)


def _members(held: set[int], x: Tensor) -> float:
    held.add(len(held))
    return 1 / len(held)


def _user_dict(held: UserDict[str, int], x: Tensor) -> float:
    held["calls"] = held.get("calls", 0) + 1
    return 1 / held["calls"]


def _array(held: np.ndarray, x: Tensor) -> float:
    held += 1
    return float(1 / held.sum())


def _in_tuple(held: tuple[list[int], Pair], x: Tensor) -> float:
    held[0].append(1)
    held[1].right["calls"] = len(held[0])
    return 1 / held[1].right["calls"]


def _method(held: Callable[[Tensor], float], x: Tensor) -> float:
    return held(x)


def _tensor(held: types.SimpleNamespace, x: Tensor) -> Tensor:
    held.total.add_(x.detach().mean(0))
    return held.total.exp()


def _tensors_in_a_list(held: dict[str, list[Tensor]], x: Tensor) -> Tensor:
    held["totals"][0].add_(x.detach().mean(0))
    held["totals"].append(x.detach().mean(0))
    return held["totals"][0].exp() + len(held["totals"])


def _tensor_with_graph(held: types.SimpleNamespace, x: Tensor) -> Tensor:
    before = held.hidden
    held.hidden = 0.5 * x.detach() if before is None else 0.5 * x + before.detach()
    return held.hidden.sigmoid()


def _draws(held: torch.Generator, x: Tensor) -> Tensor:
    return (torch.rand(x.shape, generator=held) > 0.3).float()


def _draws_in_python(held: random.Random, x: Tensor) -> float:
    return held.random()


def _draws_in_numpy(held: Any, x: Tensor) -> float:
    return float(held.normal())


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Any]]] = {
    "an object": (Tracker, Tracker.note),
    "slots": (Slotted, _slotted),
    "a dataclass": (Meter, _meter),
    "a list with attributes": (Log, _log),
    "nested dictionaries": (dict, _nested),
    "a window": (lambda: deque(maxlen=2), _window),
    "a counter": (Counter, _counter),
    "a dictionary with defaults": (lambda: defaultdict(list), _default),
    "an ordered dictionary": (OrderedDict, _ordered),
    "a set": (set, _members),
    "a dictionary of somebody's own": (UserDict, _user_dict),
    "an array": (lambda: np.zeros(3), _array),
    "tuples": (lambda: ([], Pair(1, {})), _in_tuple),
    "a method": (lambda: Tracker().note, _method),
    "a partial function": (lambda: partial(Tracker.note, Tracker()), _method),
    "a tensor": (lambda: types.SimpleNamespace(total=torch.zeros(6)), _tensor),
    "tensors in a list": (lambda: {"totals": [torch.zeros(6)]}, _tensors_in_a_list),
    "a tensor with a graph": (lambda: types.SimpleNamespace(hidden=None), _tensor_with_graph),
    "random numbers": (lambda: torch.Generator().manual_seed(3), _draws),
    "random numbers of Python": (lambda: random.Random(3), _draws_in_python),
    "random numbers of NumPy": (lambda: np.random.default_rng(3), _draws_in_numpy),
    "old random numbers of NumPy": (lambda: np.random.RandomState(3), _draws_in_numpy),
}


def _plain(value: Any) -> Any:
    """What an object holds, as lists."""
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
        return pickle.dumps(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (dict, UserDict)):
        return [[key, _plain(one)] for key, one in value.items()]
    if isinstance(value, (list, tuple, deque, set)):
        return [*map(_plain, value), *map(_plain, getattr(value, "__dict__", {}).values())]
    if isinstance(value, types.MethodType):
        return _plain(value.__self__)
    if isinstance(value, partial):
        return _plain(value.args)
    if isinstance(value, Slotted):
        return value.calls
    if isinstance(value, Parent):
        return value.num
    return _plain(vars(value)) if hasattr(value, "__dict__") else value


@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.parametrize("is_shared", [False, True])
def test_what_a_block_changes_in_an_object_changes_once(name: str, is_shared: bool) -> None:
    make, use = HOLDERS[name]
    models = []

    def build() -> nn.Module:
        models.append(nn.Sequential(nn.Linear(6, 6), *(_Block(make, use) for _ in range(2))))
        if is_shared:
            models[-1][2].held = models[-1][1].held
        return models[-1]

    assert_exact(build, ["1", "2"], _rows)
    assert_identical(*([_plain(block.held) for block in model[1:]] for model in models))
    assert_exact(build, [], _rows, groups=[[Recomputed("1"), Recomputed("2")]], num_recomputed=6)
    assert_identical(*([_plain(block.held) for block in model[1:]] for model in models[2:]))
    levels = [[Recomputed("1", (0, 0)), Recomputed("2", (0, 1))]]
    assert_exact(build, [], _rows, groups=levels, num_recomputed=9)
    assert_identical(*([_plain(block.held) for block in model[1:]] for model in models[4:]))


class _Passing(nn.Module):
    """Hands one object from block to block, and changes it itself at last."""

    def __init__(self, make: Callable[[], Any], use: Callable[[Any, Tensor], Any], last: Any = None) -> None:
        super().__init__()
        self.first, self.blocks = nn.Linear(6, 6), nn.ModuleList(_Passed(use) for _ in range(3))
        self.make, self.last = make, last
        self.handed: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x, handed = self.first(x), self.make()
        for block in self.blocks:
            x = block(x, handed)
        self.handed = _plain(handed)
        if self.last is not None:
            self.last(handed)
        return x


class _Passed(nn.Module):
    def __init__(self, use: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.other, self.use = nn.Linear(6, 6), nn.Linear(6, 6), use

    def forward(self, x: Tensor, handed: Any) -> Tensor:
        x = self.layer(x)
        return self.other(x.tanh() * self.use(handed, x)).sin()


@pytest.mark.parametrize("name", HOLDERS)
def test_what_blocks_pass_along_is_as_each_found_it(name: str) -> None:
    make, use = HOLDERS[name]
    models = []

    def build() -> nn.Module:
        models.append(_Passing(make, use))
        return models[-1]

    names = [f"blocks.{index}" for index in range(3)]
    assert_exact(build, names, _rows)
    assert_exact(build, [], _rows, groups=[[Recomputed(name) for name in names]], num_recomputed=9)
    assert_identical(*(model.handed for model in models[:2]))
    assert_identical(*(model.handed for model in models[2:]))


class Child:
    """Knows its parent, as batches of graphs do."""

    def __init__(self, parent: Parent) -> None:
        self.parent = weakref.ref(parent)
        self.outer = weakref.ref(_ELSEWHERE)


class Parent:
    def __init__(self) -> None:
        self.num, self.child = 1, Child(self)
        self.itself = self


_ELSEWHERE = Tracker()


def test_weak_references_stay_within_twins() -> None:
    def use(held: Parent, x: Tensor) -> float:
        parent = held.itself.child.parent()
        parent.num += 1
        assert held.child.outer() is _ELSEWHERE
        return 1 / held.num

    names = [f"blocks.{index}" for index in range(3)]
    assert_exact(lambda: _Passing(Parent, use), names, _rows)


class State:
    """Features of all blocks so far."""

    def __init__(self) -> None:
        self.features: dict[str, list[Tensor]] = {"all": []}
        self.scale = 1.0


def _gather(state: State, x: Tensor) -> Tensor:
    state.features["all"].append(x.exp())
    state.scale *= 0.5
    return sum(state.features["all"]) * state.scale


def test_tensors_with_a_graph_reach_later_blocks_in_an_object() -> None:
    names = [f"blocks.{index}" for index in range(3)]
    assert_exact(lambda: _Passing(State, _gather), names, _rows)


def test_what_a_block_only_reads_is_as_it_was_though_it_is_changed_later() -> None:
    def spoil(state: State) -> None:
        state.scale = 100.0
        state.features.clear()

    def read(state: State, x: Tensor) -> Tensor:
        return x * state.scale + len(state.features)

    assert_exact(lambda: _Passing(State, read, spoil), ["blocks.1"], _rows)


def test_what_is_filled_in_a_later_call_for_the_first_time_is_right() -> None:
    # The objects are others in each call, and what they hold is not there in the first one.
    def use(held: Any, x: Tensor) -> Tensor:
        if held.total is None:
            held.total = x.detach().mean(0)
        else:
            held.total.mul_(0.5).add_(x.detach().mean(0))
        return held.total.exp()

    names = [f"blocks.{index}" for index in range(3)]
    assert_exact(lambda: _Passing(lambda: types.SimpleNamespace(total=None), use), names, _rows)


def test_an_object_that_comes_later_counts_once() -> None:
    blocks = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        block = _Block(lambda: None, lambda held, x: 1.0 if held is None else held.note(x))
        if checkpointed:
            recompute(block, "")
        block(torch.ones(2, 6)).sum().backward()
        block.held = Tracker()
        for _ in range(2):
            block(torch.ones(2, 6)).sum().backward()
        blocks.append(block)
    assert blocks[1].held.calls == 2
    assert_identical(*(_plain(block.held) for block in blocks))
    assert_identical(*([p.grad for p in block.parameters()] for block in blocks))


def test_a_tensor_in_an_object_that_is_changed_before_backward_is_refused() -> None:
    block = _Passed(lambda held, x: x * held.inner["scale"][0])
    remove = insert_checkpoints(nn.ModuleList([block]), [[Recomputed("0")]])
    held = types.SimpleNamespace(inner={"scale": [torch.ones(6)]})
    loss = block(torch.ones(2, 6), held).sum()
    held.inner["scale"][0].mul_(2)
    with pytest.raises(RuntimeError) as caught:
        loss.backward()
    assert str(caught.value).startswith(
        "`ActivationCheckpointing` cannot recompute '0': its argument 2 ('inner[...][...]') was changed in "
        "place after its forward and before its backward"
    )
    remove()


def test_what_is_passed_and_held_as_well_may_not_be_written_to() -> None:
    def use(held: Any, x: Tensor) -> Tensor:
        held.total.add_(1)
        return held.total.exp()

    block = _Passed(use)
    block.total = torch.zeros(6)
    insert_checkpoints(nn.ModuleList([block]), [[Recomputed("0")]])
    block(
        torch.ones(2, 6), types.SimpleNamespace(total=block.total)
    ).sum().backward()  # one place, found first
    other = _Block(lambda: torch.zeros(6), lambda held, x: held.add_(1).exp())
    other.forward = lambda x, total, forward=other.forward: forward(x) + total
    insert_checkpoints(nn.ModuleList([other]), [[Recomputed("0")]])
    with pytest.raises(RuntimeError, match="argument 2 and attribute 'held' do"):
        other(torch.ones(2, 6), other.held)


def test_nothing_holds_what_is_passed() -> None:
    # What is not used in the loss keeps its graph, which must not keep the object that holds it.
    def use(state: State, x: Tensor) -> Tensor:
        state.features["unused"] = [x.exp().tanh()]
        return x

    model = _Passing(State, use)
    insert_checkpoints(model, [[Recomputed(f"blocks.{index}")] for index in range(3)])
    gone = []
    gc.disable()  # reference counts alone must do it
    try:
        for ends in (True, False):
            states: list[State] = []
            model.make = lambda states=states: states.append(State()) or states[0]
            loss = model(torch.ones(2, 6)).sum()
            if ends:
                loss.backward()
            gone += [weakref.ref(states.pop())]
            del loss
            assert [one() for one in gone] == [None] * len(gone)
    finally:
        gc.enable()


class _Colour(Enum):
    RED = 1


class _Closes:
    def __del__(self) -> None:
        raise AssertionError("a twin was made")


OPAQUE = [1, "a", 1.5, None, torch.ones(1), nn.Linear(1, 1), len, Tracker, _Colour.RED, ValueError(), random]
OPAQUE += [torch.Size([1]), np.float32(1), torch.optim.SGD([torch.ones(1)], 0.1), types.MappingProxyType({})]


@pytest.mark.parametrize("value", OPAQUE)
def test_what_is_not_looked_into(value: Any) -> None:
    assert adapters_of(type(value)) == ()


def test_objects_that_end_with_something_stay_themselves() -> None:
    assert adapters_of(_Closes) == ()


def test_global_random_numbers_are_those_of_the_call() -> None:
    def draw(held: Any, x: Tensor) -> Tensor:
        drawn = torch.rand(x.shape, generator=held[0]) + held[1].random() + held[2].normal()
        return F.dropout(x, 0.5) * drawn

    def make() -> Any:
        return [torch.default_generator, random._inst, np.random.mtrand._rand]

    def build() -> nn.Module:
        np.random.seed(0)
        return nn.Sequential(nn.Linear(6, 6), *(_Block(make, draw) for _ in range(2)))

    assert_exact(build, ["1", "2"], _rows)


def test_many_numbers_in_a_list_are_set_back_as_a_whole() -> None:
    models = []

    def use(held: list[int], x: Tensor) -> float:
        held.append(len(held))
        return 1 / len(held)

    def build() -> nn.Module:
        models.append(nn.Sequential(_Block(lambda: [0] * 3000, use)))
        return models[-1]

    assert_exact(build, ["0"], _rows)
    assert_identical(*(model[0].held for model in models))
    assert len(models[1][0].held) == 3003
