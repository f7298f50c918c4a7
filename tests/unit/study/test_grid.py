"""The grid file of a study: what it may say, and what it is answered otherwise."""

from __future__ import annotations

import re

import pytest

from lightning_memtrain.study.grid import Layer, Score, read_grid
from lightning_memtrain.study.templates import expand_templates


def test_a_grid_with_everything():
    grid = read_grid(
        {
            "recipe": "net",
            "score": {"metric": "test/accuracy", "mode": "max", "percent": True},
            "seeds": [3, 1],
            "seed_keys": ["seed_everything", "data.init_args.seed"],
            "base": {"recipe_variants": "smoke", "config": {"trainer": {"max_epochs": 2}}},
            "variants": {
                "plain": None,
                "half": {"technique": "half", "strength": "bf16", "recipe_variants": ["bf16"], "seeds": 1},
                "sparse-{part}": {
                    "for": {"part": [0.5, 0.9]},
                    "technique": "sparse",
                    "strength": "{part}",
                    "config": {"model": {"part": "{part}", "name": "x{part}"}},
                },
            },
            "combinations": {
                "both": ["half", "sparse-0.9"],
                "few": {"of": ["half", "sparse-0.5"], "seeds": [7]},
            },
        }
    )
    assert [variant.name for variant in grid.variants] == [
        *("plain", "half", "sparse-0.5", "sparse-0.9", "both", "few")
    ]
    assert grid.baseline == "plain"
    assert grid.score == Score("test/accuracy", "max", percent=True)
    assert grid.seeds == (3, 1)
    assert grid.variant("half").seeds == (1,)
    assert grid.variant("few").seeds == (7,)
    assert grid.variant("sparse-0.9").strength == 0.9
    assert grid.variant("sparse-0.9").layer == Layer((), {"model": {"part": 0.9, "name": "x0.9"}})
    assert grid.layers(grid.variant("both")) == {
        "base": Layer(("smoke",), {"trainer": {"max_epochs": 2}}),
        "half": Layer(("bf16",)),
        "sparse-0.9": grid.variant("sparse-0.9").layer,
    }


def test_what_is_left_out_has_a_default():
    grid = read_grid({"variants": {"plain": {}}, "score": "val/loss"})
    assert (grid.seeds, grid.seed_keys, grid.score) == ((1, 2, 3), ("seed_everything",), Score("val/loss"))


V = {"plain": {}, "half": {}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["plain"], "the grid must be a mapping of names to values, but got ['plain']."),
        ({}, "the grid has no `variants`; give at least one, such as `plain: {}`."),
        ({"variant": V}, "the grid has the unknown key `variant`. Did you mean `variants`?"),
        ({"variants": {"plain": {"confi": {}}}}, "unknown key `confi`. Did you mean `config`?"),
        ({"variants": {"a/b": {}}}, "`variants.a/b` must be a name of letters, digits"),
        ({"variants": {"base": {}}}, "and is not `base`"),
        ({"variants": {"plain": {"strength": [1]}}}, "`variants.plain.strength` must be a number or a word"),
        ({"variants": {"plain": {"recipe_variants": 3}}}, "must be a list of names, but got 3"),
        ({"variants": V, "baseline": "plan"}, "none of the `variants`. Did you mean `plain`?"),
        ({"variants": V, "seeds": 0}, "`seeds` must be a number of seeds from 1 to 100"),
        ({"variants": V, "seeds": [1, 1]}, "a list of different seeds"),
        ({"variants": V, "seeds": True}, "but got True"),
        ({"variants": V, "seeds": [-1]}, "but got [-1]"),
        ({"variants": V, "score": {"mode": "max"}}, "`score.metric` must be the name of a logged metric"),
        ({"variants": V, "score": {"metric": "x", "mode": "up"}}, "must be max or min, but got 'up'"),
        ({"variants": V, "score": {"metric": "x", "percent": 1}}, "must be true or false, but got 1"),
        (
            {"variants": V, "combinations": {"both": ["plain", "hlaf"]}},
            "`combinations.both` names the unknown variant `hlaf`. Did you mean `half`?",
        ),
        ({"variants": V, "combinations": {"one": ["half"]}}, "must name at least two different variants"),
        ({"variants": V, "combinations": {"twice": ["half", "half"]}}, "at least two different variants"),
        ({"variants": V, "combinations": {"half": ["plain", "half"]}}, "has the name of a variant"),
        ({"variants": {"x-{a}": {"for": {"a": 1}}}}, "must map names to lists of values"),
        (
            {"variants": {"x-{b}": {"for": {"a": [1]}}}},
            "`variants.x-{b}` has `{b}`, but its `for` has a only",
        ),
        ({"variants": {"x": {"for": {"a": [1, 2]}}}}, "`variants` has `x` twice"),
    ],
)
def test_mistakes_are_answered(data, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_grid(data)


def test_templates_multiply():
    made = expand_templates({"{a}-{b}": {"for": {"a": ["x", "y"], "b": [1, 2]}, "config": [{"{a}": "{b}"}]}})
    assert list(made) == ["x-1", "x-2", "y-1", "y-2"]
    assert made["y-2"] == {"config": [{"y": 2}]}
