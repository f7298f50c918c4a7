"""What a step reaches through code: globals, classes, closures, other modules."""

from __future__ import annotations

import contextvars
import enum
import functools
import importlib.util
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_memtrain.tracing import UserState

TOTAL = 0
HISTORY: list[float] = []
COUNTER = itertools.count(3)
VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("VARIABLE")
LOCAL = threading.local()
counting_module: Any = None


class Meter:
    shared = 0

    def __init__(self) -> None:
        self.values: list[float] = []

    def add(self, value: float) -> None:
        self.values.append(value)
        type(self).shared += 1


METER = Meter()


def add_to_globals(value: float) -> None:
    global TOTAL, LATE
    TOTAL += 1
    LATE = value
    HISTORY.append(value)
    METER.add(value)


@pytest.fixture
def counting() -> Iterator[types.ModuleType]:
    """A fresh copy of the user's module beside this one, known as ``counting_for_a_test``."""
    path = Path(__file__).with_name("counting.py")
    spec = importlib.util.spec_from_file_location("counting_for_a_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    globals()["counting_module"] = module
    yield module
    del sys.modules[spec.name]


def test_globals_and_class_attributes_that_code_names_are_set_back() -> None:
    class Step(nn.Module):
        def forward(self, value: float) -> None:
            self.helper(value)

        def helper(self, value: float) -> None:
            add_to_globals(value)

    step = Step()
    state = UserState(step)
    before = TOTAL, Meter.shared
    step(1.0)
    assert (TOTAL, HISTORY, Meter.shared, LATE) == (before[0] + 1, [1.0], before[1] + 1, 1.0)
    state.restore()
    assert (TOTAL, HISTORY, Meter.shared, METER.values) == (before[0], [], before[1], [])
    assert "LATE" not in globals()


def test_closures_defaults_and_function_attributes_are_set_back() -> None:
    count, seen = 0, []

    def step(value: int, memory: list[int] = [], *, by_name: list[int] = []) -> None:  # noqa: B006
        nonlocal count, late
        count += 1
        late = value
        for one in (seen, memory, by_name):
            one.append(value)
        step.calls = count  # type: ignore[attr-defined]

    state = UserState(functools.partial(step))
    step(1)
    step.__defaults__ = None
    state.restore()
    late: int
    assert (count, seen) == (0, [])
    assert step.__defaults__ == ([],)
    assert step.__kwdefaults__ == {"by_name": []}
    assert not hasattr(step, "calls")
    with pytest.raises(NameError):
        print(late)


def of_a_module() -> None:
    counting_module.NUM += 1
    counting_module.LATE = 1
    counting_module.SEEN.append(counting_module.table()[0])


def of_functions_of_a_module() -> None:
    counting_module.count(1)
    counting_module.table()


def of_a_class_of_a_module() -> None:
    counting_module.Registry.register("name")


def imported_when_called() -> None:
    import counting_for_a_test as other  # type: ignore[import-not-found]
    from counting_for_a_test import Registry

    other.count(1)
    Registry.register("name")


def by_text() -> None:
    setattr(counting_module, "NUM", 5)  # noqa: B010
    getattr(counting_module, "SEEN").append(1)  # noqa: B009


@torch.no_grad()
def decorated() -> None:
    counting_module.count(1)


def nested() -> None:
    def inner() -> list[None]:
        return [counting_module.count(value) for value in range(2)]

    inner()


class Callable_:
    def __call__(self) -> None:
        counting_module.count(1)

    def other(self) -> None:
        counting_module.count(1)


class WithProperty(nn.Module):
    @property
    def ticks(self) -> int:
        counting_module.count(1)
        return 0

    def forward(self) -> None:
        self.ticks  # noqa: B018


@pytest.mark.parametrize(
    "step",
    [
        *(of_a_module, of_functions_of_a_module, of_a_class_of_a_module, imported_when_called, by_text),
        *(decorated, nested, Callable_(), Callable_().other, functools.partial(of_a_module), WithProperty()),
        *([of_a_module], {"hook": nested}.get("hook"), functools.lru_cache(of_a_module)),
    ],
    ids=lambda step: getattr(step, "__name__", type(step).__name__),
)
def test_state_of_other_modules_is_set_back(step: Any, counting: types.ModuleType) -> None:
    def everything() -> Any:
        registry = counting.Registry
        return (
            *(counting.NUM, counting.SEEN[:], counting._LAZY, hasattr(counting, "LATE")),
            *(registry.num, dict(registry.entries)),
        )

    before = everything()
    state = UserState(step)
    (step[0] if isinstance(step, list) else step)()
    assert everything() != before
    state.restore()
    assert everything() == before


def test_a_module_imported_meanwhile_stays_where_it_is(counting: types.ModuleType) -> None:
    def step() -> None:
        counting_module.child = types.ModuleType("counting_for_a_test.child")
        counting_module.LATE = 1

    state = UserState(step)
    step()
    state.restore()
    assert isinstance(counting.child, types.ModuleType)
    assert not hasattr(counting, "LATE")


def test_code_that_no_step_gets_to_is_not_followed(counting: types.ModuleType) -> None:
    class Net(nn.Module):
        def forward(self) -> None:
            pass

        def never_named(self) -> None:
            counting_module.count(1)

    net = Net()
    state = UserState(net)
    net.never_named()
    state.restore()
    assert counting.NUM == 1


def test_a_property_is_not_asked() -> None:
    asked = []

    class Net(nn.Module):
        @property
        def value(self) -> int:
            asked.append(1)
            return 1

        def forward(self) -> int:
            return self.value

    net = Net()
    UserState(net).restore()
    assert asked == []


def test_attributes_of_classes_are_set_back() -> None:
    class Meta(type):
        def __setattr__(cls, name: str, value: Any) -> None:
            raise AttributeError("frozen")

        def __getattribute__(cls, name: str) -> Any:
            if name in ("__dict__", "__mro__", "__module__", "__name__"):
                raise RuntimeError("not to be asked")
            return type.__getattribute__(cls, name)

    class Base(metaclass=Meta):
        entries: ClassVar[dict[str, int]] = {}
        ids = itertools.count()

    class Child(Base):
        limit = 1

    child = Child()
    state = UserState([child])
    for _ in range(2):
        Base.entries["a"] = 1
        assert [next(Child.ids), next(Base.ids)] == [0, 1]
        type.__setattr__(Child, "limit", 2)
        type.__setattr__(Base, "late", 2)
        type.__delattr__(Base, "entries")
        state.restore()
        assert (Base.entries, Child.limit) == ({}, 1)
        assert not hasattr(Base, "late")


class Colour(enum.Enum):
    RED = [1]  # noqa: RUF012
    BLUE = [2]  # noqa: RUF012


def test_members_of_an_enumeration_are_set_back() -> None:
    state = UserState({"colour": Colour.RED})
    Colour.RED.value.append(3)
    Colour.BLUE.value.append(3)
    state.restore()
    assert [colour.value for colour in Colour] == [[1], [2]]


def test_an_object_gets_its_class_and_its_dictionary_back() -> None:
    class Other(Meter):
        pass

    meter = Meter()
    attributes = vars(meter)
    state = UserState(meter)
    meter.__class__ = Other
    meter.__dict__ = {"values": None}
    state.restore()
    assert type(meter) is Meter
    assert vars(meter) is attributes
    assert meter.values == []


def of_a_counter() -> Any:
    return next(COUNTER)


def of_a_context_variable() -> Any:
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


def of_a_thread() -> Any:
    LOCAL.num = getattr(LOCAL, "num", 0) + 1
    return LOCAL.num


@pytest.mark.parametrize("step", [of_a_counter, of_a_context_variable, of_a_thread])
def test_what_comes_next_comes_again(step: Callable[[], Any]) -> None:
    VARIABLE.set(1)
    state = UserState(step)
    first = step()
    assert step() != first
    for _ in range(2):
        state.restore()
        assert step() == first
