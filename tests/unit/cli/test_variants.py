"""Variants of a recipe add up, and what cannot is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_memtrain.cli import main
from lightning_memtrain.cli.errors import CommandError
from lightning_memtrain.cli.variants import merge_variants


def the(name: str, **arguments: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"class_path": f"lightning_memtrain.{name}"}
    return {**entry, "init_args": arguments} if arguments else entry


PROFILER, CHUNKS, RECOMPUTE = the("MemoryProfiler"), the("Microbatching", microbatch_size=2), the("X")
RECIPE = {"trainer": {"max_steps": 3, "callbacks": [PROFILER]}, "model": {"class_path": "a.Net"}}


def callbacks(*entries: Any, extend: bool = True) -> dict[str, Any]:
    return {"trainer": {"callbacks+" if extend else "callbacks": list(entries)}}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        pytest.param(
            callbacks(CHUNKS), callbacks(RECOMPUTE), [PROFILER, CHUNKS, RECOMPUTE], id="both extend"
        ),
        pytest.param(
            callbacks(PROFILER, CHUNKS, extend=False),
            callbacks(PROFILER, RECOMPUTE, extend=False),
            [PROFILER, CHUNKS, RECOMPUTE],
            id="both take the place of the recipe's",
        ),
        pytest.param(
            callbacks(CHUNKS),
            callbacks(RECOMPUTE, extend=False),
            [RECOMPUTE, CHUNKS],
            id="the later one does",
        ),
        pytest.param(
            callbacks(RECOMPUTE, extend=False),
            callbacks(CHUNKS),
            [RECOMPUTE, CHUNKS],
            id="the first one does",
        ),
        pytest.param(callbacks(CHUNKS), callbacks(CHUNKS), [PROFILER, CHUNKS], id="once what is the same"),
        pytest.param(
            callbacks("MemoryProfiler"),
            {"trainer": {"callbacks": {"class_path": "MemoryProfiler", "init_args": {}}}},
            [{"class_path": "MemoryProfiler", "init_args": {}}],
            id="short names and single ones",
        ),
        pytest.param({}, {"trainer": {"callbacks": None}}, [], id="none at all"),
        pytest.param(
            callbacks({"class_path": "EarlyStopping", "init_args": {"monitor": "a"}}),
            callbacks({"class_path": "EarlyStopping", "init_args": {"monitor": "b"}}),
            [PROFILER, *({"class_path": "EarlyStopping", "init_args": {"monitor": m}} for m in "ab")],
            id="two of Lightning's",
        ),
    ],
)
def test_lists_of_objects_add_up(one, other, expected):
    overlay = merge_variants(RECIPE, {"one": one, "other": other})
    assert overlay.config["trainer"] == {"callbacks": expected}
    assert overlay.remarks == []


def test_a_list_that_the_recipe_does_not_set_is_extended():
    # The default of the argument may hold something.
    assert merge_variants(RECIPE, {"one": {"model": {"init_args": {"parts+": [1]}}}}).config == {
        "model": {"init_args": {"parts+": [1]}}
    }


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (
            callbacks(CHUNKS),
            callbacks(the("Microbatching", microbatch_size=5)),
            r"variant `one` and variant `other` both set `Microbatching` in `trainer\.callbacks`, each in "
            r"its own way, but a run has one\. Leave one of them out",
        ),
        (
            callbacks(the("MemoryProfiler", every_n_steps=5)),
            {},
            r"the recipe's `config.yaml` and variant `one` both set `MemoryProfiler` in `trainer\.callbacks`",
        ),
        (
            {"trainer": {"plugins": the("LowPrecision", precision="bf16-true")}},
            {"trainer": {"plugins+": [the("LowPrecision", precision="16-true")]}},
            r"variant `one` and variant `other` both set `LowPrecision` in `trainer\.plugins`",
        ),
        (
            {"trainer": {"strategy": "ddp"}},
            {"trainer": {"strategy": {"class_path": "FSDPStrategy", "init_args": {}}}},
            r"variant `one` and variant `other` both set `trainer\.strategy`, to `ddp` and "
            r"`FSDPStrategy`, but a run has one\. Leave one of them out\.",
        ),
        (
            {"trainer": {"precision": "16-mixed"}},
            {"trainer": {"precision": "bf16-mixed"}},
            r"both set `trainer\.precision`, to `16-mixed` and `bf16-mixed`",
        ),
    ],
)
def test_what_cannot_be_added_up_is_refused(one, other, message):
    with pytest.raises(CommandError, match=message):
        merge_variants(RECIPE, {"one": one, "other": other})


def test_the_same_strategy_twice():
    both = {"trainer": {"strategy": {"class_path": "DDPStrategy"}}}
    assert merge_variants(RECIPE, {"one": both, "other": both}).config == both


def test_of_other_values_the_last_one_counts_and_says_so():
    one = {"trainer": {"max_steps": 4, "devices": 2}, "model": {"init_args": {"lr": None, "betas": [1, 2]}}}
    other = {"trainer": {"max_steps": 5, "devices": 2}, "model": {"init_args": {"lr": 0.1, "betas": [3, 4]}}}
    overlay = merge_variants(RECIPE, {"one": one, "other": other})
    assert overlay.config == other
    assert overlay.remarks == [
        "`trainer.max_steps` is 5 by variant `other`; variant `one` has 4.",
        "`model.init_args.lr` is 0.1 by variant `other`; variant `one` has null.",
        "`model.init_args.betas` is [3, 4] by variant `other`; variant `one` has [1, 2].",
    ]


def test_arguments_of_one_class_are_not_given_to_another():
    one = {"data": {"class_path": "a.Images", "init_args": {"size": 3}}}
    other = {"data": {"class_path": "a.Text", "init_args": {"words": 5}}}
    overlay = merge_variants(RECIPE, {"one": one, "other": other})
    assert overlay.config == other
    assert overlay.remarks == ["`data` is `a.Text` by variant `other`; variant `one` has `a.Images`."]
    more = {"data": {"init_args": {"words": 6}}}
    assert merge_variants(RECIPE, {"other": other, "more": more}).config == {
        "data": {"class_path": "a.Text", "init_args": {"words": 6}}
    }


def test_the_command_line_says_what_it_refuses(capsys):
    assert main(["run", "cifar10_wrn28_2", "--variant=bf16", "--variant=int8"]) == 2
    assert capsys.readouterr().err.startswith(
        "memtrain: error: variant `bf16` and variant `int8` both set `LowPrecision` in `trainer.plugins`"
    )
