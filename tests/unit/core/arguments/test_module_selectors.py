"""One grammar for naming modules, in every technique that takes names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import lightning_memtrain as mt
from lightning_memtrain.core.arguments.module_selectors import Selector, selects
from lightning_memtrain.precision.weights.kept_layers import kept_layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.norm(rows + self.down(self.up(rows).relu()))


class WideBlock(Block):
    pass


def network() -> nn.Module:
    return nn.ModuleDict({"encoder": nn.Sequential(Block(), WideBlock()), "head": nn.Linear(8, 8)})


def recomputed(selectors: Sequence[Selector]) -> set[str]:
    return {one.name for (one,) in mt.checkpointing.Modules(selectors).groups(network())}


def kept_in_fp32(selectors: Sequence[Selector]) -> set[str]:
    model = network()
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(layer)] for layer in kept_layers(model, selectors)}


def dense(selectors: Sequence[Selector]) -> set[str]:
    model = network()
    every = mt.sparsity.Select(dense_ends=False).layers(model)
    return every.keys() - mt.sparsity.Select(dense=selectors, dense_ends=False).layers(model).keys()


def sparse(selectors: Sequence[Selector]) -> set[str]:
    return set(mt.sparsity.Select(types=selectors, dense_ends=False).layers(network()))


BLOCKS = {"encoder.0", "encoder.1"}
LINEAR = {"encoder.0.up", "encoder.0.down", "encoder.1.up", "encoder.1.down", "head"}
UP = {"encoder.0.up", "encoder.1.up"}
#: What is named, the modules that are meant, and the linear layers that these have in them.
GRAMMAR: dict[str, tuple[list[Selector], set[str], set[str]]] = {
    "a path": (["encoder.0"], {"encoder.0"}, {"encoder.0.up", "encoder.0.down"}),
    "paths by a pattern": (
        ["encoder.*.up"],
        {"encoder.0.up", "encoder.1.up"},
        {"encoder.0.up", "encoder.1.up"},
    ),
    "the name of a class, subclasses, too": (["Block"], BLOCKS, LINEAR - {"head"}),
    "the name of a subclass": (["WideBlock"], {"encoder.1"}, {"encoder.1.up", "encoder.1.down"}),
    "classes by a pattern": (["*Block"], BLOCKS, LINEAR - {"head"}),
    "a class, subclasses, too": ([Block], BLOCKS, LINEAR - {"head"}),
    "a class of torch": ([nn.Linear], LINEAR, LINEAR),
    "its name": (["Linear"], LINEAR, LINEAR),
    "several": (["head", WideBlock], {"head", "encoder.1"}, {"head", "encoder.1.up", "encoder.1.down"}),
}


@pytest.mark.parametrize("name", GRAMMAR)
def test_all_techniques_read_the_same_grammar(name: str):
    selectors, modules, linear = GRAMMAR[name]
    assert recomputed(selectors) == kept_in_fp32(selectors) == modules
    assert dense(selectors) == sparse(selectors) == linear


ARGUMENTS: dict[str, Callable[[Sequence[Any]], object]] = {
    "Modules(names_or_types)": recomputed,
    "LowPrecision(keep_in_fp32)": kept_in_fp32,
    "Select(dense)": dense,
    "Select(types)": sparse,
    "Select(overrides)": lambda words: mt.sparsity.random_positions(
        network(), mt.sparsity.StaticSparse(0.5), mt.sparsity.Select(overrides=dict.fromkeys(words, 0.5))
    ),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
@pytest.mark.parametrize(
    ("word", "nearest"),
    [("encoder.0.upp", "'encoder.0.up'"), ("haed", "'head'"), ("Linera", "'Linear'"), (nn.Conv2d, None)],
)
def test_what_matches_nothing_is_refused_in_the_same_words(
    argument: str, word: Selector, nearest: str | None
):
    if argument == "Select(overrides)" and not isinstance(word, str):
        pytest.skip("has names alone")
    given = word if isinstance(word, str) else "Conv2d"
    what = "layers that become sparse" if argument == "Select(overrides)" else "modules of the model"
    beginning = f"`{argument}` must name {what}, but got {given!r}, which matches none. "
    with pytest.raises(
        mt.ArgumentError, match=f"^{re.escape(beginning)}(Did you mean|There are) .+[?.]$"
    ) as caught:
        ARGUMENTS[argument]([word])
    if nearest is not None and not (argument == "Select(overrides)" and nearest == "'Linear'"):
        assert nearest in str(caught.value)


def test_the_default_of_a_selection_is_for_models_of_all_kinds():
    # It names convolutions and recurrent layers, of which this model has none.
    assert set(mt.sparsity.Select(dense_ends=False).layers(network())) == LINEAR
    written = mt.sparsity.Select(types=list(mt.sparsity.Select().types), dense_ends=False)  # as YAML has it
    assert set(written.layers(network())) == LINEAR


# ---------------------------------------------------------------------- subclasses in the place of layers


def make_sparse(model: nn.Module) -> None:
    mt.sparsify_(model, {"encoder.0.up.weight": torch.arange(8)})


def parametrize(model: nn.Module) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.get_submodule("encoder.0.up"))


def put_subclass(model: nn.Module) -> None:
    class Sharded(nn.Linear):
        pass

    model.get_submodule("encoder.0.up").__class__ = Sharded


@pytest.mark.parametrize("change", [make_sparse, parametrize, put_subclass])
def test_a_layer_is_still_found_by_its_class_when_a_subclass_stands_there(
    change: Callable[[nn.Module], None],
):
    model = network()
    change(model)
    assert type(model.get_submodule("encoder.0.up")) is not nn.Linear
    for selector in ("Linear", nn.Linear, "Lin*"):
        assert {one.name for (one,) in mt.checkpointing.Modules([selector]).groups(model)} == LINEAR
        assert len(kept_layers(model, [selector])) == len(LINEAR)


def test_a_sparse_model_is_still_found_by_the_types_that_made_it_sparse():
    model = network()
    select = mt.sparsity.Select(types=["Linear"], dense_ends=False)
    mt.sparsify_(model, mt.sparsity.random_positions(model, mt.sparsity.StaticSparse(0.5), select))
    assert select.layers(model) == {}  # nothing is left to make sparse, which is no misspelt name


def test_a_model_on_meta_is_read_like_any_other():
    with torch.device("meta"):
        model = network()
    assert set(mt.sparsity.Select(types=["Block"], dense_ends=False).layers(model)) == LINEAR - {"head"}
    mt.precision.convert_to_low_precision_(model, torch.bfloat16, keep_in_fp32=("Linear",))
    kept = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == LINEAR


@pytest.mark.parametrize("name", ["first", "second", "around", "around.inner"])
def test_a_layer_in_several_places_may_be_named_by_any_of_them(name: str):
    model = network()
    model["first"] = model["second"] = layer = nn.Linear(8, 8)
    model["around"] = nn.ModuleDict({"inner": layer})
    (kept,) = kept_layers(model, [name])
    assert layer in kept.modules()
    assert "first" not in mt.sparsity.Select(dense=[name], dense_ends=False).layers(model)
    assert list(mt.sparsity.Select(types=[name], dense_ends=False).layers(model)) == ["first"]
    assert len(mt.checkpointing.Modules([name]).groups(model)) == 1


def test_the_model_itself_is_no_part_of_a_selection():
    with pytest.raises(mt.ArgumentError, match="got 'ModuleDict', which matches none"):
        mt.sparsity.Select(dense=[nn.ModuleDict]).layers(network())


def test_only_a_class_means_the_model_itself():
    assert not selects("*.0", "", Block())
    assert not selects("Module", "encoder", Block())  # which all are
    assert selects(Block, "", Block())


def test_yaml_names_modules_as_python_does():
    from jsonargparse import ArgumentParser
    from lightning.pytorch import Callback

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    init_args = "{policy: [Block, head]}"
    text = f"callback: {{class_path: lightning_memtrain.ActivationCheckpointing, init_args: {init_args}}}"
    make = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    made = make(parser.parse_string(text)).callback
    assert made.policy == mt.checkpointing.Modules(["Block", "head"])
