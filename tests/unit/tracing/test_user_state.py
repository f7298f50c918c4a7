"""What a step changes is set back in place: the same objects, with the same contents."""

from __future__ import annotations

import array
import collections
import dataclasses
import functools
import itertools
import random
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lightning_memtrain.tracing import UserState
from lightning_memtrain.tracing.user_state.opaque_snapshots import MOST_ARRAY_BYTES


class Meter:
    def __init__(self) -> None:
        self.values: list[float] = []
        self.num = 0

    def add(self, value: float) -> None:
        self.values.append(value)
        self.num += 1


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


def test_an_object_that_was_replaced_comes_back_with_what_it_held() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    meter = module.meter = Meter()
    linear = module[0]
    state = UserState(module)
    meter.add(1.0)
    module.meter = Meter()
    module[0] = nn.Identity()
    linear.bias = None
    state.restore()
    assert module.meter is meter
    assert (meter.values, meter.num) == ([], 0)
    assert module[0] is linear
    assert linear.bias is not None


def test_order_of_attributes_and_submodules_is_set_back() -> None:
    module = nn.Sequential(nn.Linear(1, 1), nn.Tanh())
    first = module[0]
    state = UserState(module)
    del module[0]
    module.add_module("0", first)
    state.restore()
    assert [name for name, _ in module.named_children()] == ["0", "1"]


def test_a_cycle_and_a_long_chain_are_walked() -> None:
    chain: list[Any] = []
    innermost = chain
    for _ in range(50_000):
        chain = [chain]
    holder = types.SimpleNamespace(chain=chain)
    holder.itself = holder
    state = UserState(holder)
    innermost.append(1)
    state.restore()
    assert innermost == []


def test_attributes_that_are_their_own_dictionary_are_set_back() -> None:
    class Items(dict):  # type: ignore[type-arg]
        def __init__(self) -> None:
            super().__init__(a=1)
            self.__dict__ = self

    items = Items()
    state = UserState(items)
    items.b = 2
    items.__dict__ = {}
    state.restore()
    assert items == {"a": 1}
    assert items.a == 1


def test_keys_that_compare_by_what_they_hold_are_put_back() -> None:
    class Key:
        def __init__(self, value: int) -> None:
            self.value = value

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Key) and self.value == other.value

        def __hash__(self) -> int:
            return hash(self.value)

    one, two = Key(1), Key(2)
    table, keys = {one: "one", two: "two"}, {one, two}
    state = UserState(table, keys)
    one.value = 2
    table.pop(two)
    keys.clear()
    state.restore()
    assert [*table] == [one, two]
    assert (table[one], table[two]) == ("one", "two")
    assert {id(key) for key in keys} == {id(one), id(two)}


def test_what_is_alive_in_weak_collections_is_set_back() -> None:
    kept = [Meter(), Meter()]
    values = weakref.WeakValueDictionary({"a": kept[0]})
    keys = weakref.WeakKeyDictionary({kept[0]: [1]})
    items = weakref.WeakSet([kept[0]])
    state = UserState(values, keys, items)
    values["b"] = kept[1]
    keys[kept[0]].append(2)
    del keys[kept[0]]
    items.remove(kept[0])
    items.add(kept[1])
    state.restore()
    assert dict(values) == {"a": kept[0]}
    assert dict(keys) == {kept[0]: [1]}
    assert [*items] == [kept[0]]


ITERATORS: dict[str, Callable[[], Any]] = {
    "count": itertools.count,
    "count by steps": lambda: itertools.count(5, 2),
    "list": lambda: iter([1, 2]),
    "tuple": lambda: iter((1, 2)),
    "text": lambda: iter("ab"),
    "range": lambda: iter(range(4, 6)),
    "backwards": lambda: reversed([1, 2]),
}


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_begins_again_where_it_stood(kind: str) -> None:
    iterator = ITERATORS[kind]()
    holder = types.SimpleNamespace(first=iterator, others=[iterator, {"deep": iterator}])
    state = UserState(holder)
    state.restore()
    assert holder.first is iterator  # nothing has moved
    first = [next(holder.first), next(holder.others[0])]
    for _ in range(2):
        [*itertools.islice(holder.first, 5)]  # to its end, if it has one
        state.restore()
        assert holder.first is holder.others[0] is holder.others[1]["deep"]
        assert [next(holder.first), next(holder.others[0])] == first


def test_what_a_list_iterator_goes_over_is_set_back() -> None:
    items = [[1], [2]]
    holder = types.SimpleNamespace(iterator=iter(items))
    state = UserState(holder)
    next(holder.iterator).append(3)
    state.restore()
    assert items == [[1], [2]]


def test_arrays_are_set_back_in_place() -> None:
    numpy = pytest.importorskip("numpy")
    grid = numpy.arange(6.0).reshape(2, 3)
    objects = numpy.array([[1], None], dtype=object)
    numbers = array.array("d", [1.0, 2.0])
    state = UserState(types.SimpleNamespace(grid=grid, column=grid[:, 1], objects=objects, numbers=numbers))
    assert state.num_bytes == state.num_bytes_on(torch.device("cpu")) == 8 * (6 + 2 + 2 + 2)
    grid[:] = 0
    objects[0].append(2)
    objects[1] = "new"
    numbers[0] = 5
    numbers.append(3)
    state.restore()
    assert grid.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert objects.tolist() == [[1], None]
    assert numbers.tolist() == [1, 2]


def test_arrays_beyond_the_bound_and_those_that_cannot_be_written_are_left_alone(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    large = numpy.zeros(MOST_ARRAY_BYTES + 1, dtype=numpy.uint8)
    fixed = numpy.zeros(2)
    fixed.flags.writeable = False
    of_a_file = numpy.memmap(tmp_path / "numbers", dtype=numpy.uint8, mode="w+", shape=(4,))
    state = UserState(large, fixed, of_a_file, bytearray(MOST_ARRAY_BYTES + 1))
    assert state.num_bytes == 0
    large[0] = of_a_file[0] = 1
    state.restore()
    assert large[0] == of_a_file[0] == 1


def test_many_small_arrays_are_copied_up_to_the_bound() -> None:
    numpy = pytest.importorskip("numpy")
    arrays = [numpy.zeros(MOST_ARRAY_BYTES // 4, dtype=numpy.uint8) for _ in range(6)]
    assert UserState(arrays).num_bytes == MOST_ARRAY_BYTES


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


def test_attributes_behind_a_property_of_their_name_are_set_back() -> None:
    class Hidden(Meter):
        @property
        def __dict__(self) -> Any:  # type: ignore[override]
            raise RuntimeError("I am not to be asked")

    meter = Hidden()
    state = UserState(meter)
    meter.add(1.0)
    meter.late = 1
    state.restore()
    assert (meter.values, meter.num) == ([], 0)
    assert not hasattr(meter, "late")


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


def test_generators_and_caches_of_functions_are_left_as_they_are() -> None:
    @functools.lru_cache
    def squared(value: int) -> int:
        return value * value

    holder = types.SimpleNamespace(generator=(value for value in range(3)), squared=squared)
    state = UserState(holder)
    next(holder.generator)
    squared(2)
    state.restore()
    assert next(holder.generator) == 1
    assert squared.cache_info().currsize == 1


def test_another_generator_of_numpy_is_set_back() -> None:
    numpy = pytest.importorskip("numpy")
    typical = numpy.random.get_bit_generator()
    numpy.random.set_bit_generator(numpy.random.PCG64(1))
    try:
        state = UserState()
        first = numpy.random.rand()
        state.restore()
        assert numpy.random.rand() == first
    finally:
        numpy.random.set_bit_generator(typical)
