"""The list of a model's submodules is that of torch."""

from __future__ import annotations

from torch import nn

from lightning_memtrain.ledger.submodules import named_submodules


def test_the_list_is_that_of_named_modules() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    assert named_submodules(model) == [*model.named_modules()]


def test_a_shared_module_is_listed_where_it_comes_first_and_an_empty_place_is_not() -> None:
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.Sequential(nn.Tanh(), shared), shared, nn.Sequential(shared))
    model.add_module("nothing", None)
    model.add_module("itself", model)
    names = [name for name, _ in named_submodules(model)]
    assert names == ["", "0", "0.0", "0.1", "2"] == [name for name, _ in model.named_modules()]
