"""The small commands, and one line for every mistake in the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_memtrain
from lightning_memtrain.cli import main, recipes
from lightning_memtrain.cli.recipes import Recipe
from tests.helpers.cli import environment


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    """A recipe `tiny` with a variant `fast`, the only one installed."""
    folder = tmp_path / "installed" / "tiny"
    (folder / "variants").mkdir(parents=True)
    (folder / "config.yaml").write_text("# A tiny net. More\n# words on it.\ntrainer:\n  max_steps: 3\n")
    (folder / "variants" / "fast.yaml").write_text("# One step only, see\n# below.\nseed_everything: 1\n")
    (folder / "model.py").write_text("x = 1\n")
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.pyc").write_text("")
    monkeypatch.setattr(recipes, "installed", lambda: {"tiny": Recipe("tiny", folder)})
    monkeypatch.chdir(tmp_path)
    return folder


def assert_error(capsys, code: int, *args: str) -> str:
    """Run the command, which must fail with one line on stderr and nothing on stdout."""
    assert main(args) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("memtrain: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("memtrain: error: ").rstrip("\n")


def test_recipes(recipe, capsys):
    assert main(["recipes"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny                         A tiny net.",
        "  --variant fast             One step only, see below.",
    ]


def test_installed_recipes_are_found_and_described():
    found = recipes.installed()
    assert "cifar10_wrn28_2" in found
    assert {"demo", "smoke"} <= found["cifar10_wrn28_2"].variants.keys()
    for recipe in found.values():
        for path in (recipe.config, *recipe.variants.values()):
            assert recipes.describe(path), path


def test_show(recipe, capsys):
    assert main(["show", "tiny"]) == 0
    assert capsys.readouterr().out == (recipe / "config.yaml").read_text()
    assert main(["show", "tiny", "--variant", "fast"]) == 0
    assert capsys.readouterr().out == (recipe / "variants" / "fast.yaml").read_text()


def test_copy(recipe, tmp_path, capsys):
    assert main(["copy", "tiny", "mine"]) == 0
    assert capsys.readouterr().out == "Copied to mine; run it with: memtrain run ./mine\n"
    copied = {str(path.relative_to("mine")) for path in Path("mine").rglob("*") if path.is_file()}
    assert copied == {"config.yaml", "model.py", "variants/fast.yaml"}
    # A copy is a recipe, too.
    assert main(["show", "./mine", "--variant=fast"]) == 0


NAMES = """\
model:
  class_path: {package}.model.Net  # and not {package}.py, nor other.{package}.model.Net
  init_args: {{file: {package}.zip, optimizer: torch.optim.SGD}}
data: {package}.parts.data.Images
"""


@pytest.mark.parametrize("package", ["lightning_memtrain.recipes.tiny", "tiny"])
def test_a_copy_is_a_package_of_its_own(recipe, package):
    (recipe / "parts").mkdir()
    for name in ("__init__.py", "parts/__init__.py", "parts/data.py", "optim.py"):
        (recipe / name).write_text("")
    (recipe / "config.yaml").write_text(NAMES.format(package=package))
    (recipe / "variants" / "fast.yaml").write_text(NAMES.format(package=package))
    (recipe / "README.md").write_text("from lightning_memtrain.recipes.tiny.model import x\n")
    (recipe / "model.py").write_text("tiny.model.Net = lightning_memtrain.recipes.download\n")
    assert main(["copy", "tiny", "to/my-copy"]) == 0
    kept = f"{package}.py, nor other.{package}.model.Net"
    expected = NAMES.format(package=package).replace(f"{package}.", "my_copy.")
    expected = expected.replace("my_copy.py, nor other.my_copy.model.Net", kept)
    expected = expected.replace("my_copy.zip", f"{package}.zip")
    for name in ("config.yaml", "variants/fast.yaml"):
        assert Path("to/my-copy", name).read_text() == expected
    assert Path("to/my-copy/model.py").read_text() == (recipe / "model.py").read_text()
    # A copy of the copy, and one that was renamed, are known by what their configuration names in them.
    assert Recipe("my-copy", Path("to/my-copy")).package == "my_copy"
    Path("to/my-copy").rename("renamed")
    assert Recipe("renamed", Path("renamed")).package == "my_copy"
    assert main(["copy", "./renamed", "again"]) == 0
    assert Path("again/config.yaml").read_text() == expected.replace("my_copy.", "again.")


def test_code_of_an_early_copy_is_renamed_with_it(recipe):
    (recipe / "config.yaml").write_text("model: lightning_memtrain.recipes.tiny.model.Net\n")
    (recipe / "model.py").write_text("from lightning_memtrain.recipes.tiny.parts import a\n")
    assert main(["copy", "tiny", "mine"]) == 0
    assert Path("mine/model.py").read_text() == "from mine.parts import a\n"


@pytest.mark.parametrize("name", ["json", "torch"])
def test_a_copy_takes_no_other_packages_name(recipe, capsys, name):
    error = assert_error(capsys, 2, "copy", "tiny", f"to/{name}")
    assert error.startswith(f"a copy in `to/{name}` would be imported as `{name}`, which is the name of /")
    assert error.endswith(f"{name}/__init__.py; name another folder.")
    assert not Path("to").exists()


@pytest.mark.parametrize(
    ("folder", "package"), [("mine", "mine"), ("my copy", "my_copy"), ("2", "_2"), ("class", "_class")]
)
def test_a_copy_is_named_after_its_folder(folder, package, tmp_path):
    assert recipes._package_name(tmp_path / folder) == package


def test_copy_overwrites_only_by_force(recipe, capsys):
    assert main(["copy", "tiny", "mine"]) == 0
    capsys.readouterr()
    Path("mine/model.py").write_text("x = 2\n")
    Path("mine/own.py").write_text("y = 1\n")
    error = assert_error(capsys, 2, "copy", "tiny", "mine")
    assert error == "`mine` is not empty; name another folder, or overwrite its files with --force."
    assert Path("mine/model.py").read_text() == "x = 2\n"
    assert main(["copy", "tiny", "mine", "--force"]) == 0
    assert Path("mine/model.py").read_text() == "x = 1\n"
    assert Path("mine/own.py").read_text() == "y = 1\n"


def test_copy_to_a_file(recipe, capsys):
    Path("mine").write_text("")
    assert assert_error(capsys, 2, "copy", "tiny", "mine").startswith("`mine` is a file; name a folder")


@pytest.mark.parametrize("command", ["show", "run", "copy"])
def test_unknown_recipe(recipe, capsys, command):
    arguments = ["there"] if command == "copy" else []
    error = assert_error(capsys, 2, command, "tniy", *arguments)
    assert error == (
        "unknown recipe `tniy`. Did you mean `tiny`? `memtrain recipes` lists all; "
        "a folder with a recipe works too."
    )


@pytest.mark.parametrize("command", ["show", "run"])
def test_unknown_variant(recipe, capsys, command):
    error = assert_error(capsys, 2, command, "tiny", "--variant", "fats")
    assert error == "unknown variant `fats` of recipe `tiny`: it has fast. Did you mean `fast`?"


def test_variant_of_a_recipe_without_variants(recipe, capsys):
    (recipe / "variants" / "fast.yaml").unlink()
    error = assert_error(capsys, 2, "show", "tiny", "--variant=fast")
    assert error == "unknown variant `fast` of recipe `tiny`: it has none."


def test_folder_that_is_no_recipe(recipe, capsys):
    error = assert_error(capsys, 2, "show", "./installed")
    assert error == "the folder `./installed` is no recipe: it has no `config.yaml`."


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["runn", "tiny"], "unknown command `runn`. Did you mean `run`? `memtrain --help` lists all."),
        (["xyz"], "unknown command `xyz`. `memtrain --help` lists all."),
        (["--versio"], "unknown argument `--versio`. Did you mean `--version`?"),
        (["copy", "--forc", "tiny", "x"], "unknown argument `--forc`. Did you mean `--force`?"),
        (["report", "--opne", "x"], "unknown argument `--opne`. Did you mean `--open`?"),
        (["recipes", "tiny"], "unknown argument `tiny`."),
        (["copy", "tiny"], "the following arguments are required: DIR. See `memtrain copy --help`."),
        (["run"], "`memtrain run` needs a recipe before its options; `memtrain recipes` lists them."),
        (
            ["run", "--trainer.max_steps", "2"],
            "`memtrain run` needs a recipe before its options; `memtrain recipes` lists them.",
        ),
        (
            ["run", "tiny", "--variant=fast", "--variant=fats"],
            "unknown variant `fats` of recipe `tiny`: it has fast. Did you mean `fast`?",
        ),
        (["run", "tiny", "--variant"], "argument --variant: expected one argument. See `memtrain --help`."),
        (
            ["run", "tiny", "--resume=x"],
            "--resume goes on with a run as it is; leave out recipe, --variant, --plan and --run-dir.",
        ),
        (
            ["run", "tiny", "--trust=a.B"],
            "--trust is for the checkpoints of a run that is resumed; add --resume RUN.",
        ),
        (["run", "--resume=nowhere"], "`nowhere` is no run folder: it does not exist."),
        (["run", "--resume=installed"], "`installed` is no run folder: it has no `config.yaml`."),
        (
            ["run", "tiny", "--run-dir=installed"],
            "the run folder `installed` exists and is not an empty folder; name another one, or go on "
            "with the run in it: memtrain run --resume installed",
        ),
    ],
)
def test_mistakes_in_the_command_line(recipe, capsys, args, message):
    assert assert_error(capsys, 2, *args) == message


def test_no_command(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["--help"], ["run", "--help"], ["run", "-h"], ["demo", "--help"]])
def test_help(args, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith("usage: memtrain")


def test_version(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"memtrain {lightning_memtrain.__version__}\n"


@pytest.mark.parametrize("package", ["jsonargparse", "docstring_parser"])
def test_without_jsonargparse(recipe, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert assert_error(capsys, 2, "run", "tiny") == (
        f"running a recipe needs {package}, which is not installed. "
        "Install it: pip install 'lightning-memtrain[cli]'"
    )


def test_interrupt_before_training(monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "installed", interrupted)
    assert main(["recipes"]) == 130


def loads_none_of_the_slow_packages(statement: str) -> bool:
    code = (
        "import sys\nfrom lightning_memtrain.cli import main\n"
        f"try:\n    {statement}\nexcept SystemExit:\n    pass\n"
        "sys.exit(99 if {'torch', 'lightning', 'jsonargparse'} & sys.modules.keys() else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert result.returncode in (0, 99), result.stderr
    return result.returncode == 0


@pytest.mark.parametrize("args", [["recipes"], ["--version"], ["run", "--help"], ["show", "cifar10_wrn28_2"]])
def test_small_commands_do_not_wait_for_torch(args):
    assert loads_none_of_the_slow_packages(f"main({args})")


def test_the_test_above_can_fail():
    assert not loads_none_of_the_slow_packages("import jsonargparse")
