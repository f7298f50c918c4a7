"""Score a trained model on its test set: BLEU."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml

from lightning_memtrain.cli.errors import CommandError

from .. import checkpoints
from ..text import write_lines


def add_options(parser: ArgumentParser) -> None:
    """Declare the test set and where translations go.

    Args:
        parser: of the command.
    """
    parser.add_argument("--data-dir", metavar="DIR", help="where the data is; default: as in the run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the translations here, in order")
    checkpoints.add_options(parser)


def run(folder: Path, options: Namespace) -> int:
    """Translate the test set and print its BLEU, by torchmetrics and by sacrebleu.

    Args:
        folder: of the run.
        options: see :func:`add_options`.

    Returns:
        The exit code.

    Raises:
        CommandError: if the data is not there or does not fit the model.
    """
    from sacrebleu.metrics.bleu import BLEU

    module = checkpoints.load_trained(folder, options)
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
    package, _, name = config["class_path"].rpartition(".")
    arguments = config.get("init_args") or {}
    if options.data_dir is not None:
        arguments["data_dir"] = options.data_dir
    data: Any = getattr(import_module(package), name)(**arguments)
    trainer = pl.Trainer(devices=1, logger=False, enable_checkpointing=False)
    try:
        trainer.test(module, datamodule=data, verbose=False)
    except (OSError, ValueError) as error:
        raise CommandError(str(error), exit_code=1) from error
    # Sentences of one length come together; their numbers are those of the file.
    in_order = [triple for _, triple in sorted(module.test_translations.items())]
    _, translations, references = zip(*in_order, strict=True)
    # `force`: that the text is tokenised is meant.
    by_sacrebleu = BLEU(tokenize="none", force=True)
    score = by_sacrebleu.corpus_score(list(translations), [list(references)])
    print(f"test/bleu {trainer.callback_metrics['test/bleu']:.2f}")
    print(f"test/loss {trainer.callback_metrics['test/loss']:.4f}")
    print(f"sacrebleu {score.score:.2f} {by_sacrebleu.get_signature()}")
    if options.output is not None:
        write_lines(options.output, translations)
    return 0
