"""Every pair of variants of every recipe, in the configuration that LightningCLI makes of it."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_memtrain.cli import recipes, run
from lightning_memtrain.cli.errors import CommandError

pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

# What both set otherwise: these are refused, by the class that there can be one of.
REFUSED = {
    "cifar10_wrn28_2": {
        "Microbatching": [("all", "demo"), ("demo", "microbatched"), ("demo", "microbatched+checkpointed")],
        "ActivationCheckpointing": [
            ("all", "checkpointed"),
            ("all", "demo"),
            ("all", "fit"),
            ("checkpointed", "fit"),
            ("checkpointed", "microbatched+checkpointed"),
            ("demo", "fit"),
            ("demo", "microbatched+checkpointed"),
            ("fit", "microbatched+checkpointed"),
        ],
        "SparseTraining": [("all", "demo"), ("demo", "sparse")],
        "LowPrecision": [
            ("all", "bf16"),
            ("all", "fp16"),
            ("bf16", "fp16"),
            ("bf16", "int8"),
            ("fp16", "int8"),
        ],
    },
    "iwslt14_dynamicconv": {"Microbatching": [("all", "microbatched")]},
}
PAIRS = [
    (recipe.name, *pair)
    for recipe in recipes.installed().values()
    for pair in itertools.combinations(sorted(recipe.variants), 2)
]


class _Stop(Exception):
    pass


class _Parser(LightningCLI):
    """Makes the parser and reads nothing with it."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _Stop

    def setup_parser(self, *args: Any) -> None:
        super().setup_parser(*args)
        type(self).made = self.parser


@pytest.fixture(scope="module")
def parser() -> Any:
    with contextlib.suppress(_Stop):
        _Parser(run=False, args=[])
    return _Parser.made


def test_all_recipes_and_variants_are_here() -> None:
    assert {recipe for recipe, *_ in PAIRS} == recipes.installed().keys()
    assert len(PAIRS) == 12 * 11 // 2 + 7 * 6 // 2


def refused_classes(recipe: str, one: str, other: str) -> set[str]:
    return {name for name, pairs in REFUSED[recipe].items() if (one, other) in pairs}


def parsed(parser: Any, *configs: Path | str) -> dict[str, Any]:
    """What LightningCLI reads, as it would save it."""
    config = parser.parse_args([f"--config={config}" for config in configs])
    return cast(dict[str, Any], yaml.safe_load(parser.dump(config)))


def entries(config: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """What a file writes into a list of the trainer, extending or not."""
    trainer = config.get("trainer", {})
    return [*trainer.get(key, []), *trainer.get(f"{key}+", [])]


def class_name(entry: dict[str, Any]) -> str:
    return entry["class_path"].rpartition(".")[2]


def has_arrived(written: Any, arrived: Any) -> bool:
    if isinstance(written, dict):
        if "class_path" in written and "class_path" not in arrived:
            return has_arrived(written.get("init_args", {}), arrived)  # a dataclass, by its arguments
        arrived = {str(key): value for key, value in arrived.items()}
        return all(
            str(key) in arrived and has_arrived(value, arrived[str(key)]) for key, value in written.items()
        )
    return bool(arrived == written) or (isinstance(written, str) and str(arrived).endswith(f".{written}"))


def leaves(config: Any, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(config, dict) or at[1:] in [("callbacks",), ("callbacks+",), ("plugins+",)]:
        return {at: config}
    return {key: leaf for name, value in config.items() for key, leaf in leaves(value, (*at, name)).items()}


@pytest.mark.parametrize(("recipe_name", "one", "other"), PAIRS)
def test_a_pair_of_variants_adds_up(recipe_name: str, one: str, other: str, parser: Any, capsys) -> None:
    recipe = recipes.installed()[recipe_name]
    base = yaml.safe_load(recipe.config.read_text())
    files = {name: recipe.variant(name) for name in (one, other)}
    written = {name: yaml.safe_load(path.read_text()) for name, path in files.items()}
    for order in ((one, other), (other, one)):
        in_order = {name: files[name] for name in order}
        if refused := refused_classes(recipe_name, one, other):
            with pytest.raises(
                CommandError, match="|".join(f"both set `{name}`" for name in refused)
            ) as info:
                run._together(recipe.config, in_order)
            assert all(f"variant `{name}`" in str(info.value) for name in order)
            continue
        capsys.readouterr()
        config = parsed(parser, recipe.config, run._together(recipe.config, in_order))
        said = capsys.readouterr().err
        for key in ("callbacks", "plugins"):
            instead = [entry for name in order for entry in written[name].get("trainer", {}).get(key, [])]
            first = instead or entries(base, key)
            expected = [
                *first,
                *(e for name in order for e in written[name].get("trainer", {}).get(f"{key}+", [])),
            ]
            names = list(dict.fromkeys(map(class_name, expected)))
            arrived = config["trainer"].get(key) or []
            assert list(map(class_name, arrived)) == names
            for entry in expected:
                assert has_arrived(entry, arrived[names.index(class_name(entry))])
        first, last = (leaves(written[name]) for name in order)
        for key, value in {**first, **last}.items():
            if key[1:] in [("callbacks",), ("callbacks+",), ("plugins+",)]:
                continue
            arrived = config
            for name in key:
                arrived = arrived.get(name)  # what is null may be left out
            assert has_arrived(value, arrived), key
            # What the first one wanted otherwise is said.
            assert (f"`{'.'.join(key)}`" in said) == (key in first and key in last and first[key] != value)


BOTH = ["MemoryProfiler", "Microbatching", "ActivationCheckpointing"]


def test_both_of_a_pair_of_which_one_was_dropped(parser: Any) -> None:
    recipe = recipes.installed()["cifar10_wrn28_2"]
    files = {name: recipe.variant(name) for name in ("microbatched", "checkpointed")}
    config = parsed(parser, recipe.config, run._together(recipe.config, files))
    assert list(map(class_name, config["trainer"]["callbacks"])) == BOTH


def test_the_files_add_up_without_the_command_line_too(parser: Any) -> None:
    recipe = recipes.installed()["cifar10_wrn28_2"]
    files = [recipe.config, recipe.variant("microbatched"), recipe.variant("checkpointed")]
    assert list(map(class_name, parsed(parser, *files)["trainer"]["callbacks"])) == BOTH
