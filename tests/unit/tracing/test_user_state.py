"""What a step changes is set back in place: the same objects, with the same contents."""

from __future__ import annotations

import collections
import dataclasses
import functools
import random
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lightning_memtrain.tracing import UserState

TOTAL = 0
HISTORY: list[float] = []


class Meter:
    shared = 0

    def __init__(self) -> None:
        self.values: list[float] = []
        self.num = 0

    def add(self, value: float) -> None:
        self.values.append(value)
        self.num += 1
        type(self).shared += 1


class Slotted:
    __slots__ = ("empty", "items")

    def __init__(self) -> None:
        self.items = [1]


@dataclasses.dataclass(frozen=True)
class Frozen:
    extra: dataclasses.InitVar[int]
    numbers: list[int] = dataclasses.field(default_factory=list)
    scale: float = 1.0

    def __post_init__(self, extra: int) -> None:
        self.numbers.append(extra)


class Pair(NamedTuple):
    name: str
    items: list[int]


class Lazy:
    @functools.cached_property
    def table(self) -> list[int]:
        return [1, 2]


METER = Meter()


def add_to_globals(value: float) -> None:
    global TOTAL, LATE
    TOTAL += 1
    LATE = value
    HISTORY.append(value)
    METER.add(value)


def contents(value: Any) -> Any:
    """Everything of an object but its identity, to compare."""
    if isinstance(value, (list, tuple, collections.deque)):
        return type(value), [contents(item) for item in value]
    if isinstance(value, dict):
        return type(value), [(key, contents(item)) for key, item in value.items()]
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(map(repr, value))
    if isinstance(value, Slotted):
        return [(name, contents(getattr(value, name, "absent"))) for name in Slotted.__slots__]
    if hasattr(value, "__dict__") and not isinstance(value, (type, types.FunctionType)):
        return type(value), contents(vars(value))
    return repr(value)


def change_list(value: list[Any]) -> None:
    value[0].append("more")
    value.insert(0, "new")
    value.reverse()


def change_dict(value: dict[str, Any]) -> None:
    value["nested"]["list"].append(1)
    value["new"] = 0
    del value["first"]
    value["first"] = "back, but last"


def change_ordered(value: collections.OrderedDict[str, int]) -> None:
    value.move_to_end("a")


def change_default(value: collections.defaultdict[str, list[int]]) -> None:
    value["made by a look"]
    value["there"].append(2)
    value.default_factory = None


def change_deque(value: collections.deque[Any]) -> None:
    value.extend([7, 8, 9])


def change_set(value: set[Any]) -> None:
    value.discard(1)
    value.add("new")


def change_attributes(value: Meter) -> None:
    value.add(1.0)
    value.values = [2.0]
    value.late = True  # type: ignore[attr-defined]


def change_slots(value: Slotted) -> None:
    value.items.append(2)
    value.items = []
    value.empty = 1


def change_frozen(value: Frozen) -> None:
    value.numbers.append(1)
    object.__setattr__(value, "scale", 2.0)


def change_pair(value: Pair) -> None:
    value.items.append(1)


def change_lazy(value: Lazy) -> None:
    value.table.append(3)


def change_namespace(value: types.SimpleNamespace) -> None:
    value.count += 1
    value.inner.count += 1


def change_counter(value: collections.Counter[str]) -> None:
    value.update("aab")


def change_bytes(value: bytearray) -> None:
    value += b"more"


CHANGES: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
    (lambda: [[1], 2, "x"], change_list),
    (lambda: {"first": 1, "nested": {"list": []}, "last": 2}, change_dict),
    (lambda: collections.OrderedDict(a=1, b=2), change_ordered),
    (lambda: collections.defaultdict(list, there=[1]), change_default),
    (lambda: collections.deque([1, [2]], maxlen=3), change_deque),
    (lambda: {1, 2, "x"}, change_set),
    (Meter, change_attributes),
    (Slotted, change_slots),
    (lambda: Frozen(3), change_frozen),
    (lambda: Pair("a", []), change_pair),
    (Lazy, change_lazy),
    (lambda: types.SimpleNamespace(count=0, inner=types.SimpleNamespace(count=1)), change_namespace),
    (lambda: collections.Counter("abc"), change_counter),
    (lambda: bytearray(b"some"), change_bytes),
    (lambda: collections.UserDict(first=1, nested={"list": []}), change_dict),
]


@pytest.mark.parametrize(("make", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
def test_an_object_is_set_back_however_deep_it_lies(
    make: Callable[[], Any], change: Callable[[Any], None]
) -> None:
    value = make()
    module = nn.Linear(2, 2)
    module.kept = {"deep": [(value,)]}
    before = contents(value)
    state = UserState(module)
    for _ in range(2):  # as often as one likes
        change(value)
        assert contents(value) != before
        module.kept["deep"][0] = None
        module.kept = 3
        state.restore()
        assert module.kept["deep"][0][0] is value
        assert contents(value) == before
    shared = Meter.shared
    state.restore()
    assert Meter.shared == shared


def test_globals_and_class_attributes_that_code_names_are_set_back() -> None:
    class Step(nn.Module):
        def forward(self, value: float) -> None:
            add_to_globals(value)

    step = Step()
    state = UserState(step)
    before = TOTAL, Meter.shared
    step(1.0)
    assert (TOTAL, len(HISTORY), Meter.shared, METER.num, LATE) == (before[0] + 1, 1, before[1] + 1, 1, 1.0)
    state.restore()
    assert (TOTAL, HISTORY, Meter.shared, METER.num, METER.values) == (before[0], [], before[1], 0, [])
    assert "LATE" not in globals()


def test_closures_defaults_and_function_attributes_are_set_back() -> None:
    count, seen = 0, []

    def step(value: int, memory: list[int] = [], *, by_name: list[int] = []) -> None:  # noqa: B006
        nonlocal count
        count += 1
        for one in (seen, memory, by_name):
            one.append(value)
        step.calls = count  # type: ignore[attr-defined]

    state = UserState(functools.partial(step))
    step(1)
    state.restore()
    assert (count, seen) == (0, [])
    assert step.__defaults__ == ([],)
    assert step.__kwdefaults__ == {"by_name": []}
    assert not hasattr(step, "calls")


def test_tensors_are_found_once_each_and_their_values_copied_where_asked() -> None:
    module = nn.Linear(2, 2)
    weights = torch.ones(3)
    module.weights = [weights, {"again": weights}]
    module.bias.grad = torch.ones(2)
    state = UserState(module, copies=lambda tensor: tensor is not module.weight)
    assert {id(tensor) for tensor in state.tensors} == {
        id(tensor) for tensor in (module.weight, module.bias, module.bias.grad, weights)
    }
    assert len(state.tensors) == 4
    assert state.num_bytes == state.num_bytes_on(torch.device("cpu")) == 4 * (2 + 2 + 3)
    assert state.num_bytes_on(torch.device("cuda")) == 0
    gradient, kept = module.bias.grad, [module.bias.detach().clone(), weights.clone()]
    weight = module.weight
    with torch.no_grad():
        module.bias.add_(1)
        module.weight.add_(1)
        changed = module.weight.detach().clone()
        weights.resize_(5).zero_()
        gradient.zero_()
    module.bias.grad = None
    module.weight.requires_grad_(False)
    module.weight.mark = 1
    module.weight = nn.Parameter(torch.zeros(1))
    state.restore()
    assert module.weight is weight
    assert module.weight.requires_grad
    assert not hasattr(weight, "mark")
    assert torch.equal(weight, changed)
    assert module.bias.grad is gradient
    assert torch.equal(gradient, torch.ones(2))
    assert torch.equal(module.bias, kept[0])
    assert torch.equal(weights, kept[1])


def test_random_numbers_go_on_as_if_nothing_had_been_drawn() -> None:
    numpy = pytest.importorskip("numpy")
    holder = types.SimpleNamespace(
        torch=torch.Generator().manual_seed(1), python=random.Random(1), numpy=numpy.random.default_rng(1)
    )

    def draw() -> list[float]:
        return [
            *(float(torch.rand(())), random.random(), numpy.random.rand()),
            *(float(torch.rand((), generator=holder.torch)), holder.python.random(), holder.numpy.random()),
        ]

    state = UserState(holder)
    first = draw()
    assert draw() != first
    for _ in range(2):
        state.restore()
        assert draw() == first


class Refuses:
    def _no(self, *args: Any) -> Any:
        raise RuntimeError("I am not to be asked")

    __eq__ = __len__ = __bool__ = __iter__ = __hash__ = __getattr__ = __getattribute__ = __setattr__ = _no
    __dict__ = property(_no)  # type: ignore[assignment]
    __class__ = property(_no)  # type: ignore[assignment]
    __repr__ = __copy__ = __deepcopy__ = __reduce__ = _no


def test_an_object_that_refuses_everything_is_passed_over() -> None:
    class List(list):  # type: ignore[type-arg]
        __len__ = __iter__ = __getitem__ = __eq__ = __bool__ = Refuses._no

    items = List([[1]])
    inner = list.__getitem__(items, 0)
    holder = types.SimpleNamespace(refuses=Refuses.__new__(Refuses), items=items)
    state = UserState(holder)
    inner.append(2)
    list.append(items, 3)
    holder.refuses = None
    state.restore()
    assert type(holder.refuses) is Refuses
    assert [*list.__iter__(items)] == [[1]]


def test_hooks_that_a_forward_sets_are_taken_away() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    state = UserState(module)
    module[0].register_forward_hook(lambda *args: None)
    module[0].register_full_backward_hook(lambda *args: None)
    module.register_buffer("late", torch.ones(1))
    module.add_module("more", nn.Identity())
    state.restore()
    assert not module[0]._forward_hooks
    assert not module[0]._backward_hooks
    assert module[0]._is_full_backward_hook is None
    assert [name for name, _ in module.named_buffers()] == []
    assert [name for name, _ in module.named_children()] == ["0"]


def test_hidden_states_of_transformers_are_recorded_by_one_set_of_hooks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    tokens = torch.ones(1, 4, dtype=torch.long)

    def num_hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    def num_states() -> int:
        return len(model(tokens, output_hidden_states=True).hidden_states)

    before, marks = num_hooks(), [set(vars(module)) for module in model.modules()]
    state = UserState(model)
    assert num_states() == 3
    installed = num_hooks()
    state.restore()
    assert num_hooks() == before
    assert [set(vars(module)) for module in model.modules()] == marks
    assert num_states() == 3
    assert num_hooks() == installed
