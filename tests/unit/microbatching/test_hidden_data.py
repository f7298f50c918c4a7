"""Items of a batch that are no containers: refused where they hide data of the samples."""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_memtrain.microbatching import Microbatching
from lightning_memtrain.microbatching.splitting.batches import batch_size_of, split_batch
from tests.helpers.twin_runs import assert_same_run, train

CURE = (
    "\nPass `split_fn`, a function from (batch, number of chunks) to a list of chunks, "
    "to say how such a batch is split."
)
Y = torch.arange(4.0)


class Graphs:
    """As torch_geometric's and dgl's batches are: moved as one, and its tensors need not be in sight."""

    def to(self, device: Any) -> Graphs:
        return self


class Hiding:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


class Private:
    __slots__ = ("__rows", "name")

    def __init__(self) -> None:
        self.__rows = [Y]


class Readable:
    def __array__(self) -> np.ndarray:
        return np.zeros(4)


class Kind(enum.Enum):
    TRAIN = 1


MOVES = "whose method `to` shows that it holds data, as batches of graphs"
REFUSED: dict[str, tuple[Any, str]] = {
    "graphs": (Graphs(), f"an object of class Graphs, {MOVES}"),
    "module": (nn.Linear(1, 1), f"an object of class Linear, {MOVES}"),
    "tensor": (Hiding(x=Y), "an object of class Hiding, which hides data (in `.x`)"),
    "array": (Hiding(x=np.zeros(4)), "an object of class Hiding, which hides data (in `.x`)"),
    "deep": (Hiding(a={"b": [0, (Y,)]}), "an object of class Hiding, which hides data (in `.a['b'][1][0]`)"),
    "inside": (Hiding(a=Hiding(b=Graphs())), "an object of class Hiding, which hides data (in `.a.b`)"),
    "slots": (Private(), "an object of class Private, which hides data (in `._Private__rows[0]`)"),
    "deque": (deque([Y]), "an object of class deque, which hides data (in `[0]`)"),
    "set": ({Y}, "an object of class set, which hides data (in `[0]`)"),
    "readable": (Readable(), "an object of class Readable, which can be read as an array"),
    "iterator": (iter([1]), "an object of class list_iterator, an iterator, which the first chunk uses up"),
}


@pytest.mark.parametrize(("item", "described"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("nested", [False, True])
def test_what_hides_data_is_refused_by_name(item: Any, described: str, nested: bool):
    batch, path = ({"in": [item, Y]}, "batch['in'][0]") if nested else ((item, Y), "batch[0]")
    message = f"allow to be sliced by its first axis, the samples, but got {path}, {described}.{CURE}"
    for call in (batch_size_of, lambda batch: split_batch(batch, 2)):
        with pytest.raises(MisconfigurationException, match=re.escape(message)):
            call(batch)


def test_a_batch_that_is_an_object_is_refused_by_name():
    with pytest.raises(MisconfigurationException, match="but got batch, an object of class Graphs, whose m"):
        batch_size_of(Graphs())


@pytest.mark.parametrize(
    "item",
    [
        SimpleNamespace(depth=3, names=["a", "b", "c", "d"]),
        Kind.TRAIN,
        Graphs,
        lambda: Y,
        torch.device("cpu"),
        torch.float32,
        torch.Generator(),
        np.float32(1),
        Path("data"),
        deque("abcd"),
    ],
    ids=lambda item: type(item).__name__,
)
def test_what_hides_none_is_the_same_in_every_chunk(item: Any):
    assert all(chunk[0] is item for chunk in split_batch((item, Y), 2))


def test_an_object_that_holds_itself_ends():
    knot = Hiding(name="a")
    knot.again = [knot]
    assert split_batch((knot, Y), 2)[1][0] is knot


@pytest.mark.parametrize("kind", [list, tuple])
def test_one_object_per_sample_is_split_whatever_it_holds(kind: Callable[[Any], Any]):
    graphs = kind(Graphs() for _ in range(4))
    (first, _), (second, _) = split_batch((graphs, Y), 2)
    assert (first, second) == (graphs[:2], graphs[2:])
    message = f"but got batch[0][0], an object of class Graphs, {MOVES}.{CURE}"
    with pytest.raises(MisconfigurationException, match=re.escape(message)):
        split_batch((graphs[:3], Y), 2)


# ---------------------------------------------------------------------- containers with more than their items


@dataclass
class Molecules:
    """As chemprop's batches: what it is made of is no field, and some of it is made afterwards."""

    parts: InitVar[list[Tensor]]
    rows: Tensor = field(init=False)

    def __post_init__(self, parts: list[Tensor]) -> None:
        self.rows = torch.stack(parts)
        self.is_large = self.rows[:, 0] > 1


def test_a_dataclass_is_split_without_its_constructor_and_with_all_it_made():
    whole = Molecules([torch.tensor([float(n), 1.0]) for n in range(4)])
    assert batch_size_of(whole) == 4
    first, second = split_batch(whole, 2)
    assert type(first) is Molecules
    assert first.rows.tolist() == [[0, 1], [1, 1]]
    assert second.is_large.tolist() == [True, True]
    assert whole.is_large.tolist() == [False, False, True, True]


def test_tensors_in_attributes_of_containers_are_split():
    class Record(dict):
        pass

    class Rows(list):
        pass

    class Couple(NamedTuple):
        x: Tensor
        y: Tensor

    class Weighted(Couple):
        weight: Tensor

    for whole in (Record(y=Y), Rows([Y]), Rows("abcd"), Weighted(Y, Y)):
        whole.weight = Y + 1
        whole.name = "n"
        _, second = split_batch((whole, Y), 2)[1], split_batch((whole, Y), 2)[1][0]
        assert type(second) is type(whole)
        assert len(second) == (2 if whole == list("abcd") else len(whole))
        assert second.weight.tolist() == [3.0, 4.0]
        assert second.name == "n"
        assert whole.weight.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_tuple_with_a_constructor_of_its_own_is_split():
    class Couple(tuple):
        def __new__(cls, x: Tensor, y: Tensor) -> Couple:
            return super().__new__(cls, (x, y))

    largest = torch.max(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), dim=1)
    (_, (couple, returned)) = split_batch((Couple(Y[:2], Y[:2] + 1), largest), 2)
    assert type(couple) is Couple
    assert [tensor.tolist() for tensor in couple] == [[1.0], [2.0]]
    assert returned.values.tolist() == [4.0]
    assert returned.indices.tolist() == [0]


class Tensors:
    """As tensordict's ``TensorDict``: slices by itself, by the axes that all its tensors share."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors
        self.batch_size = torch.Size([min(len(tensor) for tensor in tensors.values())])

    def __getitem__(self, samples: slice) -> Tensors:
        return Tensors(**{name: tensor[samples] for name, tensor in self.tensors.items()})

    def to(self, device: Any) -> Tensors:
        return self


def test_what_slices_itself_is_asked_to():
    whole = Tensors(x=Y, y=Y + 1)
    assert batch_size_of((whole, Y)) == 4
    _, (second, _) = split_batch((whole, Y), 2)
    assert second.tensors["y"].tolist() == [3.0, 4.0]
    whole.batch_size = torch.Size([])
    with pytest.raises(MisconfigurationException, match=r"got batch\[0\], an object of class Tensors, whose"):
        split_batch((whole, Y), 2)


# ---------------------------------------------------------------------- through a trainer


class GraphNet(LightningModule):
    """Sums over the nodes of each graph; graphs are an object, as in pytorch_geometric's loaders."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        graphs, targets = batch
        sums = torch.zeros(len(targets), dtype=torch.float64)
        return nn.functional.mse_loss(sums.index_add(0, graphs.of, self.net(graphs.nodes)[:, 0]), targets)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class NodesOfGraphs(Graphs):
    def __init__(self, nodes: Tensor, of: Tensor) -> None:
        self.nodes, self.of = nodes, of


def graph_batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for num_graphs in (6, 5):
        of = torch.arange(num_graphs).repeat_interleave(torch.arange(num_graphs) % 3 + 1)
        nodes = torch.randn(len(of), 3, generator=generator, dtype=torch.float64)
        targets = torch.randn(num_graphs, generator=generator, dtype=torch.float64)
        found.append((NodesOfGraphs(nodes, of), targets))
    return found


def split_graphs(batch: Any, num_chunks: int) -> list[Any]:
    graphs, targets = batch
    chunks = []
    for numbers in torch.arange(len(targets)).tensor_split(min(num_chunks, len(targets))):
        inside = torch.isin(graphs.of, numbers)
        chunks.append((NodesOfGraphs(graphs.nodes[inside], graphs.of[inside] - numbers[0]), targets[numbers]))
    return chunks


@pytest.mark.parametrize("split", [{"microbatch_size": 1}, {"num_microbatches": 2}])
def test_graphs_are_not_passed_whole_to_every_chunk(split: dict[str, Any], tmp_path: Path):
    message = r"batch\[0\], an object of class NodesOfGraphs, .*\n.*split_fn"
    with pytest.raises(MisconfigurationException, match=message):
        train(GraphNet, graph_batches(), tmp_path, Microbatching(**split))


def test_graphs_are_split_by_the_function_that_the_error_asks_for(tmp_path: Path):
    plain = train(GraphNet, graph_batches(), tmp_path)
    splits = Microbatching(num_microbatches=3, split_fn=split_graphs, weight_fn=lambda chunk: len(chunk[1]))
    assert_same_run(plain, train(GraphNet, graph_batches(), tmp_path, splits))


class Column:
    """Stands for a column of a table, such as a `pandas.Index`."""

    ndim = 1

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.array(self.names)


def test_names_of_features_are_passed_whole_and_a_column_with_one_per_sample_is_refused() -> None:
    features = Column(["hour", "day"])
    chunks = split_batch({"x": torch.zeros(6, 2), "features": features}, 3)
    assert [chunk["features"] is features for chunk in chunks] == [True] * 3
    with pytest.raises(MisconfigurationException, match=r"\['features'\], an object of class Column"):
        split_batch({"x": torch.zeros(2, 2), "features": features}, 2)
