"""The command line of ``memtrain``; only running and reporting import torch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lightning_memtrain.__about__ import __version__
from lightning_memtrain.cli import recipes
from lightning_memtrain.cli.errors import INTERRUPTED, CommandError, did_you_mean
from lightning_memtrain.cli.studies.study_options import add_compare_options, add_study_options

_RUN_EPILOG = """\
Any other option goes to LightningCLI, for example:
  memtrain run RECIPE --trainer.max_epochs=10 --data.batch_size=50 --trainer.callbacks+=RichProgressBar
`--print_config` prints the resolved configuration; `--trainer.callbacks.help=NAME` explains a callback.
Ctrl-C or SIGTERM ends a run after its current step with a checkpoint and a report; --resume goes on there."""


_PREDICT_EPILOG = """\
The exit code is 0 if the run fits and 3 if it does not. Any other option goes to LightningCLI, as for
`memtrain run`. A class of a file is made without arguments and brings its `train_dataloader`."""


_PLAN_EPILOG = """\
Prints the ways that keep the limit, fastest first, and writes the plan and a page with a chart beside it.
The exit code is 0 if there is one and 3 if there is none. Then: memtrain run RECIPE --plan plan.yaml
Any other option goes to LightningCLI, as for `memtrain run`."""


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
    command, asks_for_help = argv[0], not {"-h", "--help"}.isdisjoint(argv)
    if command == "run" and not asks_for_help:
        return _run(argv[1:])
    if command == "demo" and not asks_for_help:
        return _demo(argv[1:])
    if command == "predict" and not asks_for_help:
        return _predict(argv[1:])
    if command == "plan" and not asks_for_help:
        return _plan(argv[1:])
    if command in _commands_of_recipes():
        return _run_command(command, argv[1:])
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
    args, overrides = _run_options().parse_known_args(argv)
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


def _demo(argv: list[str]) -> int:
    from lightning_memtrain.cli.demo import run_demo

    args, overrides = _demo_options().parse_known_args(argv)
    return run_demo(args.run_dir, overrides)


def _predict(argv: list[str]) -> int:
    # By hand, as for `run`.
    target = argv.pop(0) if argv and not argv[0].startswith("-") else None
    args, overrides = _predict_options().parse_known_args(argv)
    if target is None:
        raise CommandError("`memtrain predict` needs a recipe or file.py:Class before its options.")
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
    # By hand, as for `run`.
    target = argv.pop(0) if argv and not argv[0].startswith("-") else None
    args, overrides = _plan_options().parse_known_args(argv)
    if target is None:
        raise CommandError(
            "`memtrain plan` needs a recipe, a configuration or file.py:Class before its options."
        )
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


def _commands_of_recipes() -> dict[str, str]:
    """What the commands that recipes bring along do, by name."""
    return {
        name: summary for recipe in recipes.installed().values() for name, summary in recipe.commands.items()
    }


def _run_command(name: str, argv: list[str]) -> int:
    """Run a command of a recipe; its options are known once it is known of which run it is asked."""
    from lightning_memtrain.cli.run_folder import RunFolder

    parser = _Parser(prog=f"memtrain {name}", description=_commands_of_recipes()[name], allow_abbrev=False)
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


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as a :class:`CommandError`."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}. See `{self.prog} --help`.")

    @property
    def option_strings(self) -> list[str]:
        return list(self._option_string_actions)


class _CommandParser(_Parser):
    """The parser of the whole command line: knows all commands and their options."""

    def __init__(self) -> None:
        summary = "Train in less memory and see where every byte goes."
        super().__init__(prog="memtrain", description=summary, allow_abbrev=False)
        self.add_argument("--version", action="version", version=f"memtrain {__version__}")
        self._subparsers_action = self.add_subparsers(
            metavar="COMMAND", title="commands", parser_class=_Parser
        )
        self.commands: dict[str, _Parser] = {}

    def add(self, name: str, summary: str, options: _Parser | None = None) -> _Parser:
        command = self._subparsers_action.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            allow_abbrev=False,
            parents=[options] if options else [],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.commands[name] = command
        return command

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action is self._subparsers_action and value not in self.commands:
            hint = did_you_mean(str(value), self.commands)
            raise CommandError(f"unknown command `{value}`.{hint} `memtrain --help` lists all.")
        super()._check_value(action, value)


def _parser() -> _CommandParser:
    parser = _CommandParser()
    parser.add("recipes", "list the recipes and their variants").set_defaults(function=_recipes)
    show = parser.add("show", "print a recipe's YAML")
    copy = parser.add("copy", "copy a recipe's folder, to be changed and run")
    run = parser.add("run", "train by a recipe", _run_options())
    report = parser.add("report", "print the memory report of a run, or a snapshot of CUDA memory")
    predict = parser.add("predict", "say what a run will need on a GPU, without the GPU", _predict_options())
    study = parser.add("study", "run variants of a recipe, alone and combined, with several seeds")
    compare = parser.add("compare", "lay runs side by side: memory, modules, techniques, time, score")
    plan = parser.add("plan", "find how a run keeps a limit of memory, before it runs", _plan_options())
    parser.add("devices", "list GPUs by name, with their memory").set_defaults(function=_devices)
    parser.add("demo", "train WRN-28-2 on handwritten digits and show its memory", _demo_options())
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


def _add_variant(options: _Parser) -> None:
    options.add_argument(
        "--variant",
        metavar="NAME",
        action="append",
        default=[],
        help="what to lay over the recipe; several add up",
    )


def _run_options() -> _Parser:
    options = _demo_options()
    _add_variant(options)
    options.add_argument("--test", action="store_true", help="test what was trained, after the last step")
    options.add_argument("--plan", type=Path, metavar="FILE", help="follow a plan of `memtrain plan`")
    options.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    options.add_argument(
        "--trust",
        metavar="CLASS",
        action="append",
        default=[],
        help="with --resume: let its checkpoint have objects of this class, named with its module",
    )
    return options


def _predict_options() -> _Parser:
    options = _Parser(prog="memtrain predict", add_help=False, allow_abbrev=False)
    options.add_argument("--device", metavar="NAME", help="a GPU that `memtrain devices` lists, or cpu")
    _add_variant(options)
    options.add_argument("--batch-size", type=int, metavar="N", help="samples in a batch of one device")
    options.add_argument("--devices", type=int, metavar="N", help="of how many devices one is predicted")
    options.add_argument("--strategy", metavar="NAME", help="what they exchange: ddp or fsdp2")
    options.add_argument("--json", action="store_true", help="print JSON, see docs/prediction.md")
    return options


def _plan_options() -> _Parser:
    options = _Parser(prog="memtrain plan", add_help=False, allow_abbrev=False)
    options.add_argument(
        "--limit", metavar="SIZE", help="most memory, e.g. 11GiB, or 0.9 of the device's; default: all of it"
    )
    options.add_argument("--device", metavar="NAME", help="a GPU that `memtrain devices` lists, or cpu")
    options.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="what may change the result; several add up",
    )
    _add_variant(options)
    options.add_argument("--batch-size", type=int, metavar="N", help="samples in a batch")
    options.add_argument(
        "--output", type=Path, default=Path("plan.yaml"), metavar="FILE", help="default: plan.yaml"
    )
    options.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return options


def _demo_options() -> _Parser:
    options = _Parser(prog="memtrain", add_help=False, allow_abbrev=False)
    options.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder; default: runs/NAME-TIME")
    return options
