"""Options of the commands whose other options go to LightningCLI."""

from __future__ import annotations

from pathlib import Path

from lightning_memtrain.cli.parsing.command_parser import Parser


def _add_variant(options: Parser) -> None:
    options.add_argument(
        "--variant",
        metavar="NAME",
        action="append",
        default=[],
        help="what to lay over the recipe; several add up",
    )


def run_options() -> Parser:
    """Options of `memtrain run`."""
    options = demo_options()
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


def predict_options() -> Parser:
    """Options of `memtrain predict`."""
    options = Parser(prog="memtrain predict", add_help=False, allow_abbrev=False)
    options.add_argument("--device", metavar="NAME", help="a GPU that `memtrain devices` lists, or cpu")
    _add_variant(options)
    options.add_argument("--batch-size", type=int, metavar="N", help="samples in a batch of one device")
    options.add_argument("--devices", type=int, metavar="N", help="of how many devices one is predicted")
    options.add_argument("--strategy", metavar="NAME", help="what they exchange: ddp or fsdp2")
    options.add_argument("--json", action="store_true", help="print JSON, see docs/prediction.md")
    return options


def plan_options() -> Parser:
    """Options of `memtrain plan`."""
    options = Parser(prog="memtrain plan", add_help=False, allow_abbrev=False)
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


def demo_options() -> Parser:
    """Options of `memtrain demo`, which all runs have."""
    options = Parser(prog="memtrain", add_help=False, allow_abbrev=False)
    options.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder; default: runs/NAME-TIME")
    return options


def profile_options() -> Parser:
    """Options of `memtrain profile`."""
    options = Parser(prog="memtrain profile", add_help=False, allow_abbrev=False)
    options.add_argument("--steps", type=int, default=5, metavar="N", help="steps to train; default: 5")
    _add_variant(options)
    options.add_argument("--batch-size", type=int, metavar="N", help="samples in a batch")
    options.add_argument("--no-stacks", action="store_true", help="without lines of code, which is quicker")
    options.add_argument(
        "--output", type=Path, default=Path("memory"), metavar="DIR", help="for the report; default: memory"
    )
    return options
