"""The command line of ``memtrain``; only running and reporting import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import INTERRUPTED, CommandError, did_you_mean
from lightning_memtrain.cli.parsing.command_options import (
    demo_options,
    plan_options,
    predict_options,
    profile_options,
    run_options,
)
from lightning_memtrain.cli.parsing.command_parser import CommandParser, Parser
from lightning_memtrain.cli.studies.study_options import add_compare_options, add_study_options

_RUN_EPILOG = """\
Any other option goes to LightningCLI, for example:
  memtrain run RECIPE --trainer.max_epochs=10 --data.batch_size=50 --trainer.callbacks+=RichProgressBar
`memtrain run RECIPE --help` lists what can be set, `--print_config` prints the resolved configuration, and
`--trainer.callbacks.help=NAME` explains a callback.
Ctrl-C or SIGTERM ends a run after its current step with a checkpoint and a report; --resume goes on there."""


_PREDICT_EPILOG = """\
The exit code is 0 if the run fits and 3 if it does not. Any other option goes to LightningCLI, as for
`memtrain run`. A class of a file is made without arguments and brings its `train_dataloader`."""


_PLAN_EPILOG = """\
Prints the ways that keep the limit, fastest first, and writes the plan and a page with a chart beside it.
The exit code is 0 if there is one and 3 if there is none. Then: memtrain run RECIPE --plan plan.yaml
Any other option goes to LightningCLI, as for `memtrain run`."""


_PROFILE_EPILOG = """\
Any other option goes to LightningCLI, as for `memtrain run`. A class of a file is made without arguments and
brings its `train_dataloader`; its Trainer has the defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command ``memtrain`` with its arguments.

    Args:
        argv: arguments after the command's name; ``None`` for those of the process.

    Returns:
        The exit code: 0, 1 if something is wrong with files, 2 if the command line is, 3 for a prediction or
        a plan that does not fit, and 128 plus the number of the signal that ended it (130 after Ctrl-C).
    """
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except CommandError as error:
        print(f"memtrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED


def _dispatch(argv: list[str]) -> int:
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    if argv[0] == "__complete":
        from lightning_memtrain.cli.parsing.completion import print_words

        return print_words(parser, argv[1:])
    command, asks_for_help = argv[0], not {"-h", "--help"}.isdisjoint(argv)
    if command == "run" and not asks_for_help:
        return _run(argv[1:])
    if command == "demo" and not asks_for_help:
        return _demo(argv[1:])
    if command == "predict" and not asks_for_help:
        return _predict(argv[1:])
    if command == "plan" and not asks_for_help:
        return _plan(argv[1:])
    if command == "profile" and not asks_for_help:
        return _profile(argv[1:])
    if command in _commands_of_recipes():
        return _run_command(command, argv[1:])
    if command == "run" and len(argv) > 1 and not argv[1].startswith("-"):  # and help of it is asked for
        return _help_of_run(parser, argv[1])
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        options = parser.commands.get(command, parser).option_strings
        raise CommandError(f"unknown argument `{unknown[0]}`.{did_you_mean(unknown[0], options)}")
    return args.function(args) or 0


def _recipes(args: argparse.Namespace) -> None:
    for recipe in recipes.installed().values():
        print(f"{recipe.name:28} {recipes.describe(recipe.config)}".rstrip())
        for name, path in recipe.variants.items():
            print(f"{f'  --variant {name}':28} {recipes.describe(path)}".rstrip())


def _show(args: argparse.Namespace) -> None:
    recipe = recipes.find(args.recipe)
    path = recipe.variant(args.variant) if args.variant else recipe.config
    print(path.read_text(encoding="utf-8"), end="")


def _copy(args: argparse.Namespace) -> None:
    folder = args.dir
    recipes.find(args.recipe).copy_to(folder, force=args.force)
    # Written so that it cannot be taken for a recipe's name.
    path = folder if folder.is_absolute() or len(folder.parts) > 1 else f"./{folder}"
    print(f"Copied to {folder}; run it with: memtrain run {path}")


def _report(args: argparse.Namespace) -> None:
    from lightning_memtrain.cli.show_report import show_report

    show_report(args.path, open_page=args.open)


def _study(args: argparse.Namespace) -> int:
    from lightning_memtrain.cli.studies.study_command import run_study

    return run_study(args)


def _compare(args: argparse.Namespace) -> None:
    from lightning_memtrain.cli.studies.compare_command import show_comparison

    show_comparison(args.runs, stage=args.stage, as_json=args.json, page=args.page)


def _devices(args: argparse.Namespace) -> None:
    from lightning_memtrain.cli.devices import show_devices

    show_devices()


def _run(argv: list[str]) -> int:
    # By hand, because argparse would take the value of a LightningCLI option that follows for the recipe.
    name = argv.pop(0) if argv and not argv[0].startswith("-") else None
    args, overrides = run_options().parse_known_args(argv)
    if args.resume is not None:
        if name or args.variant or args.run_dir or args.plan:
            raise CommandError(
                "--resume goes on with a run as it is; leave out recipe, --variant, --plan and --run-dir."
            )
        from lightning_memtrain.cli.run import resume

        exit_code, folder = resume(args.resume, args.trust, overrides, test=args.test)
    elif args.trust:
        raise CommandError("--trust is for the checkpoints of a run that is resumed; add --resume RUN.")
    elif name is None:
        raise CommandError("`memtrain run` needs a recipe before its options; `memtrain recipes` lists them.")
    else:
        from lightning_memtrain.cli.run import run

        recipe = recipes.find(name)
        exit_code, folder = run(recipe, args.variant, args.run_dir, overrides, plan=args.plan, test=args.test)
    print(f"Run folder: {folder.path}")
    return exit_code


def _help_of_run(parser: CommandParser, name: str) -> int:
    recipe = recipes.find(name)
    parser.commands["run"].print_help()
    from lightning_memtrain.cli.parsing.recipe_settings import settings_text

    print(f"\n{settings_text(recipe)}")
    return 0


def _demo(argv: list[str]) -> int:
    from lightning_memtrain.cli.demo import run_demo

    args, overrides = demo_options().parse_known_args(argv)
    return run_demo(args.run_dir, overrides)


def _of_target(
    argv: list[str], command: str, options: argparse.ArgumentParser
) -> tuple[str, argparse.Namespace, list[str]]:
    """What a command is about, its options, and those that are not its own."""
    # By hand, as for `run`.
    target = argv.pop(0) if argv and not argv[0].startswith("-") else None
    args, overrides = options.parse_known_args(argv)
    if target is None:
        raise CommandError(
            f"`memtrain {command}` needs a recipe, a configuration or file.py:Class before its options."
        )
    return target, args, overrides


def _predict(argv: list[str]) -> int:
    target, args, overrides = _of_target(argv, "predict", predict_options())
    from lightning_memtrain.cli.planning.predict_command import show_prediction

    return show_prediction(
        target,
        device=args.device,
        variants=args.variant,
        batch_size=args.batch_size,
        world_size=args.devices,
        strategy=args.strategy,
        as_json=args.json,
        overrides=overrides,
    )


def _plan(argv: list[str]) -> int:
    target, args, overrides = _of_target(argv, "plan", plan_options())
    from lightning_memtrain.cli.planning.plan_command import show_plan

    return show_plan(
        target,
        limit=args.limit,
        device=args.device,
        allow=[name for given in args.allow for name in given.split(",") if name],
        variants=args.variant,
        batch_size=args.batch_size,
        output=args.output,
        as_json=args.json,
        overrides=overrides,
    )


def _profile(argv: list[str]) -> int:
    target, args, overrides = _of_target(argv, "profile", profile_options())
    from lightning_memtrain.cli.planning.profile_command import show_profile

    return show_profile(
        target,
        steps=args.steps,
        variants=args.variant,
        batch_size=args.batch_size,
        stacks=not args.no_stacks,
        output=args.output,
        overrides=overrides,
    )


def _completion(args: argparse.Namespace) -> None:
    from lightning_memtrain.cli.parsing.completion import script

    print(script(args.shell))


def _commands_of_recipes() -> dict[str, str]:
    """What the commands that recipes bring along do, by name."""
    return {
        name: summary for recipe in recipes.installed().values() for name, summary in recipe.commands.items()
    }


def _run_command(name: str, argv: list[str]) -> int:
    """Run a command of a recipe; its options are known once it is known of which run it is asked."""
    from lightning_memtrain.cli.run_folder import RunFolder

    parser = Parser(prog=f"memtrain {name}", description=_commands_of_recipes()[name], allow_abbrev=False)
    parser.add_argument("folder", metavar="RUN", type=Path, help="a run's folder")
    if not argv or argv[0].startswith("-"):
        if not {"-h", "--help"}.isdisjoint(argv):
            parser.epilog = f"More options depend on the recipe: memtrain {name} RUN --help"
            parser.parse_args(argv)
        raise CommandError(f"`memtrain {name}` needs the folder of a run before its options.")
    run_dir = Path(argv[0])
    folder = RunFolder.open(run_dir)
    recipe = folder.recipe()
    if recipe is None or name not in recipe.commands:
        having = ", ".join(f"`{known}`" for known, it in recipes.installed().items() if name in it.commands)
        what = f"a run of `{recipe.name}`" if recipe else "a run of another recipe"
        raise CommandError(f"`memtrain {name}` needs a run of {having}, but `{run_dir}` is {what}.")
    if recipe not in recipes.installed().values():
        recipe.make_importable()
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    command = recipe.command(name)
    command.add_options(parser)
    try:
        return command.run(run_dir, parser.parse_intermixed_args(argv))
    except MisconfigurationException as error:
        raise CommandError(str(error)) from error


def _parser() -> CommandParser:
    parser = CommandParser()
    parser.add("recipes", "list the recipes and their variants").set_defaults(function=_recipes)
    show = parser.add("show", "print a recipe's YAML")
    copy = parser.add("copy", "copy a recipe's folder, to be changed and run")
    run = parser.add("run", "train by a recipe", run_options())
    report = parser.add("report", "print the memory report of a run, or a snapshot of CUDA memory")
    predict = parser.add("predict", "say what a run will need on a GPU, without the GPU", predict_options())
    study = parser.add("study", "run variants of a recipe, alone and combined, with several seeds")
    compare = parser.add("compare", "lay runs side by side: memory, modules, techniques, time, score")
    plan = parser.add("plan", "find how a run keeps a limit of memory, before it runs", plan_options())
    profile = parser.add("profile", "train a few steps and show their memory", profile_options())
    completion = parser.add("completion", "print what makes a shell complete this command")
    parser.add("devices", "list GPUs by name, with their memory").set_defaults(function=_devices)
    parser.add("demo", "train WRN-28-2 on handwritten digits and show its memory", demo_options())
    for name, summary in _commands_of_recipes().items():
        parser.add(name, summary[0].lower() + summary[1:])

    recipe: dict[str, Any] = {
        "metavar": "RECIPE",
        "help": "a name that `memtrain recipes` lists, or a recipe's folder",
    }
    show.add_argument("recipe", **recipe)
    show.add_argument("--variant", metavar="NAME", help="print what this variant lays over the recipe")
    show.set_defaults(function=_show)
    copy.add_argument("recipe", **recipe)
    copy.add_argument("dir", metavar="DIR", type=Path, help="the new folder")
    copy.add_argument("--force", action="store_true", help="overwrite files that are there")
    copy.set_defaults(function=_copy)
    run.add_argument("recipe", nargs="?", **recipe)
    run.epilog = _RUN_EPILOG
    predict.add_argument(
        "target",
        nargs="?",
        metavar="RECIPE|CONFIG.yaml|FILE.py:CLASS",
        help="a recipe, a configuration of LightningCLI, or a LightningModule of a file",
    )
    predict.epilog = _PREDICT_EPILOG
    plan.add_argument(
        "target",
        nargs="?",
        metavar="RECIPE|CONFIG.yaml|FILE.py:CLASS",
        help="a recipe, a configuration of LightningCLI, or a LightningModule of a file",
    )
    plan.epilog = _PLAN_EPILOG
    profile.add_argument(
        "target",
        nargs="?",
        metavar="RECIPE|CONFIG.yaml|FILE.py:CLASS",
        help="a recipe, a configuration of LightningCLI, or a LightningModule of a file",
    )
    profile.epilog = _PROFILE_EPILOG
    completion.add_argument("shell", choices=["bash", "zsh"], help="which shell")
    completion.epilog = 'For this shell: eval "$(memtrain completion bash)"'
    completion.set_defaults(function=_completion)
    report.add_argument(
        "path",
        metavar="PATH",
        type=Path,
        help="a run's folder, a memory_report.json, or a snapshot by torch.cuda.memory",
    )
    study.add_argument("recipe", **recipe)
    add_study_options(study)
    study.set_defaults(function=_study)
    add_compare_options(compare)
    compare.set_defaults(function=_compare)
    report.add_argument("--open", action="store_true", help="open the HTML page in a browser, too")
    report.set_defaults(function=_report)
    return parser
