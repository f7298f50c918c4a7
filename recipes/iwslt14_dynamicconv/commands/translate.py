"""Translate sentences by a trained model."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightning_memtrain.cli.errors import CommandError

from .. import checkpoints, text
from .. import fairseq_bridge as bridge
from ..batches import max_tokens_batches
from ..module import TranslationModule


def add_options(parser: ArgumentParser) -> None:
    """Declare the sentences and how they are translated.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "sentences", nargs="*", metavar="SENTENCE", help="German text; default: a sentence per line of stdin"
    )
    parser.add_argument(
        "--tokenized", action="store_true", help="input and output are tokens separated by spaces"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=4_000, metavar="N", help="tokens translated at once; default: 4000"
    )
    checkpoints.add_options(parser)


def run(folder: Path, options: Namespace) -> int:
    """Print the translation of each sentence on a line of its own.

    Args:
        folder: of the run.
        options: see :func:`add_options`.

    Returns:
        The exit code.
    """
    module = checkpoints.load_trained(folder, options)
    if options.sentences or not sys.stdin.isatty():
        lines = options.sentences or _stdin()
        for line in translate(module, lines, tokenized=options.tokenized, max_tokens=options.max_tokens):
            print(line)
        return 0
    for line in sys.stdin:
        print(
            *translate(module, [line], tokenized=options.tokenized, max_tokens=options.max_tokens), flush=True
        )
    return 0


def _stdin() -> list[str]:
    try:
        return text.split_lines(sys.stdin.buffer.read().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise CommandError(
            f"the sentences on stdin must be UTF-8, but are not ({error}).", exit_code=1
        ) from error


def translate(
    module: TranslationModule, lines: Sequence[str], *, tokenized: bool = False, max_tokens: int = 4_000
) -> list[str]:
    """Translate sentences.

    Args:
        module: a trained model.
        lines: German sentences; the translation of an empty one is empty.
        tokenized: whether they are tokens separated by spaces, in lower case, and so are the translations.
        max_tokens: most tokens that are translated at once.

    Returns:
        English sentences, in the order of ``lines``.

    Raises:
        CommandError: if a sentence has more than ``max_tokens`` tokens.
    """
    dictionary = module.dictionaries["de"]
    tokens = list(lines) if tokenized else text.tokenize(lines, "de")
    subwords = text.Subwords(module.codes).split(tokens) if module.codes else tokens
    ids = [bridge.encode(line, dictionary) for line in subwords]
    lengths = np.array([len(sentence) for sentence in ids])
    if len(lengths) and lengths.max() > max_tokens:
        raise CommandError(
            f"a sentence must have at most --max-tokens={max_tokens} tokens, but number "
            f"{lengths.argmax() + 1} has {lengths.max()}. Split it, or raise --max-tokens.",
            exit_code=1,
        )
    dataset = bridge.pair_dataset(ids, None, dictionary, module.dictionaries["en"])
    translations = [""] * len(ids)
    order = np.array([i for i in np.argsort(lengths, kind="stable") if lengths[i] > 1], dtype=np.int64)
    with text.steps("Translating", len(order)) as advance:
        for batch in max_tokens_batches(order, lengths, max_tokens):
            sample = dataset.collater([dataset[i] for i in batch.tolist()])
            for i, triple in zip(sample["id"].tolist(), module.translate_sample(sample), strict=True):
                translations[i] = triple[1] if tokenized else text.detokenize(triple[1], "en")
                advance()
    return translations
