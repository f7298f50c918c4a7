"""Every tensor that a batch holds is found, whatever the batch is made of."""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections import UserDict, deque
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_memtrain import MemoryLedger
from lightning_memtrain.core import Category
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors

ONE, TWO, THREE = torch.ones(1), torch.ones(2), torch.ones(3)


@dataclasses.dataclass
class Molecules:
    parts: dataclasses.InitVar[list[torch.Tensor]]
    atoms: torch.Tensor = dataclasses.field(init=False)
    bonds: torch.Tensor = dataclasses.field(init=False)  # set when it is first asked for
    default: torch.Tensor = dataclasses.field(init=False, default=THREE)

    def __post_init__(self, parts: list[torch.Tensor]) -> None:
        self.atoms = torch.cat(parts)


class Graph:
    """As graph libraries make them: a store of its own, and answers that are computed."""

    def __init__(self, x: torch.Tensor) -> None:
        self._store = {"x": x, "num_nodes": len(x)}
        self._next = self  # a cycle
        self._kind = type(self)

    def to(self, device: Any) -> Graph:
        return self

    @property
    def adjacency(self) -> torch.Tensor:
        raise RuntimeError("not computed yet")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name} here")


class Slots:
    __slots__ = ("__hidden", "unset", "x")

    def __init__(self, x: torch.Tensor, hidden: torch.Tensor) -> None:
        self.x, self.__hidden = x, hidden


class MoreSlots(Slots):
    __slots__ = ("y",)


class Pair(NamedTuple):
    x: torch.Tensor
    graph: Graph


class Lazy(dict[str, torch.Tensor]):
    """Loads its values when they are asked for, and cannot."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__(x=x)
        self.cached = x

    def values(self) -> Any:
        raise OSError("no such file")


class Unwilling:
    """Raises whatever it is asked."""

    def __getattribute__(self, name: str) -> Any:
        raise ValueError(name)


def more_slots() -> MoreSlots:
    made = MoreSlots(ONE, TWO)
    made.y = THREE
    return made


def objects_in_an_array() -> np.ndarray:
    array = np.empty(2, dtype=object)
    array[0], array[1] = ONE, Graph(TWO)
    return array


@pytest.mark.parametrize(
    ("thing", "expected"),
    [
        (None, []),
        ("text", []),
        (ONE, [ONE]),
        ([ONE, (TWO, {THREE}), 5, "x"], [ONE, TWO, THREE]),
        ({"a": ONE, "b": {"c": [TWO]}}, [ONE, TWO]),
        (UserDict(a=ONE, b=UserDict(c=TWO)), [ONE, TWO]),
        (deque([ONE, deque([TWO])]), [ONE, TWO]),
        ([ONE, ONE], [ONE]),
        (Graph(ONE), [ONE]),
        ([Graph(ONE), {"more": Graph(TWO)}], [ONE, TWO]),
        (Pair(ONE, Graph(TWO)), [ONE, TWO]),
        (Slots(ONE, TWO), [TWO, ONE]),
        (more_slots(), [THREE, TWO, ONE]),
        (Lazy(ONE), [ONE]),
        ([Unwilling(), ONE], [ONE]),
        (objects_in_an_array(), [ONE, TWO]),
        (np.ones(3), []),
        (nn.utils.rnn.pack_sequence([TWO]), 2),  # data, and the lengths of batches
        ([weakref.ref(ONE), weakref.proxy(Graph(ONE)), TWO], [TWO]),  # the graph is dead
        (iter([ONE]), []),
        ((item for item in [ONE]), []),
        (nn.Linear(2, 2), []),
        ([DataLoader(TensorDataset(ONE)), TensorDataset(ONE), lambda: ONE, Graph, torch], []),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_within(thing: Any, expected: Any) -> None:
    found = find_tensors(thing)
    if isinstance(expected, int):
        assert len(found) == expected
    else:
        assert [id(tensor) for tensor in found] == [id(tensor) for tensor in expected]


def test_a_dataclass_with_arguments_that_are_no_fields_and_fields_that_are_not_set() -> None:
    batch = Molecules([ONE, TWO])
    assert batch.atoms.shape == (3,)
    assert {id(tensor) for tensor in find_tensors(batch)} == {id(batch.atoms), id(THREE)}
    assert {id(tensor) for tensor in tensors_in([batch])} == {id(batch.atoms), id(THREE)}


@dataclasses.dataclass
class Cached:
    x: torch.Tensor
    total: torch.Tensor = dataclasses.field(init=False)


Cached.total = property(lambda self: 1 / 0)  # type: ignore[assignment]


def test_a_dataclass_with_a_property_that_raises() -> None:
    for found in (find_tensors(Cached(ONE)), tensors_in([Cached(ONE)])):
        assert [id(tensor) for tensor in found] == [id(ONE)]


def test_attrs_classes_of_both_kinds() -> None:
    attrs = pytest.importorskip("attrs")
    for slots in (True, False):
        made = attrs.make_class("Made", ["x", "rest"], slots=slots)
        assert {id(tensor) for tensor in find_tensors(made(ONE, [TWO]))} == {id(ONE), id(TWO)}


def test_the_batches_of_tokenisers() -> None:
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input_ids": ONE, "attention_mask": TWO})
    assert [id(tensor) for tensor in find_tensors(batch)] == [id(ONE), id(TWO)]


def test_nesting_of_any_depth_and_cycles_of_any_kind() -> None:
    deep: Any = ONE
    for _ in range(10 * sys.getrecursionlimit()):
        deep = [deep]
    assert [id(tensor) for tensor in find_tensors(deep)] == [id(ONE)]
    one: list[Any] = [ONE]
    two: dict[str, Any] = {"one": one, "x": TWO}
    one.append(two)
    two["itself"] = two
    assert [id(tensor) for tensor in find_tensors(one)] == [id(ONE), id(TWO)]


class Unequal:
    """As arrays and tensors are, which have no one truth value."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        raise TypeError("compare elements instead")

    __hash__ = None  # type: ignore[assignment]


def test_nothing_is_compared_or_hashed() -> None:
    assert [id(tensor) for tensor in find_tensors([Unequal(ONE), Unequal(TWO)])] == [id(ONE), id(TWO)]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: Molecules([x]),
        lambda x: Graph(x),
        lambda x: Slots(x, x),
        lambda x: Pair(x, Graph(x)),
        lambda x: UserDict(x=x),
        lambda x: [{"nested": Graph(x)}],
    ],
    ids=["dataclass", "graph", "slots", "named tuple", "mapping", "nested"],
)
def test_a_batch_of_any_kind_is_an_input_before_it_is_used(wrap: Any) -> None:
    batch = wrap(torch.ones(64, 4))
    default_bytes = THREE.nbytes if isinstance(batch, Molecules) else 0
    with MemoryLedger(nn.Linear(4, 1), inputs=batch) as ledger:
        pass
    assert ledger.breakdown().maxima[Category.INPUTS] == 64 * 4 * 4 + default_bytes


def test_state_that_an_optimizer_keeps_in_objects_of_its_own() -> None:
    class Statistics:
        def __init__(self) -> None:
            self.factors = [torch.zeros(10), torch.zeros(20)]

    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["statistics"] = Statistics()
    with MemoryLedger(model, optimizer) as ledger:
        pass
    assert ledger.breakdown().maxima[Category.OPTIMIZER_STATE] == 30 * 4
