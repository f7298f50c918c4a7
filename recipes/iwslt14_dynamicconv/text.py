"""Raw text to tokens: Moses tokenisation, cleaning, and byte pair encoding, as fairseq's script does it."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lightning.fabric.utilities.exceptions import MisconfigurationException

LANGUAGES = ("de", "en")

# What is called with each line that is done.
Advance = Callable[[], None]


class MissingPackageError(MisconfigurationException, ImportError):
    """A package is not installed; the message says how to install it."""


class Pairs(NamedTuple):
    """Sentences in two languages; those of one index are translations of each other."""

    source: list[str]
    target: list[str]


def split_lines(content: str) -> list[str]:
    r"""The sentences of a text with one per line.

    Args:
        content: lines end in ``\n`` or ``\r\n`` only, so that other separators stay in a sentence.

    Returns:
        Its lines, without the ends.

    Example:
        >>> split_lines("a\u2028b\r\n\nc\n")
        ['a\u2028b', '', 'c']
    """
    lines = content.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: Path) -> list[str]:
    """Read a text file with one sentence per line.

    Args:
        path: a UTF-8 file; see :func:`split_lines`.

    Returns:
        Its lines, without the ends.

    Raises:
        ValueError: if a line is not UTF-8.
    """
    content = path.read_bytes()
    try:
        return split_lines(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"Text must be UTF-8, but line {number} of `{path}` is not ({error}). Convert the file, for "
            f"instance: iconv -f ISO-8859-1 -t UTF-8 {path.name} > converted"
        ) from error


def read_pairs(stem: Path) -> Pairs:
    """Read ``<stem>.de`` and ``<stem>.en``.

    Args:
        stem: path of both files without their endings.

    Returns:
        The sentences of both.

    Raises:
        ValueError: if the files differ in length, or a line of them is empty or not UTF-8.
    """
    files = [stem.with_name(f"{stem.name}.{language}") for language in LANGUAGES]
    sides = [read_lines(file) for file in files]
    check_equal_lengths([str(file) for file in files], sides)
    for file, lines in zip(files, sides, strict=True):
        empty = next((number for number, line in enumerate(lines, start=1) if not line.strip()), None)
        if empty is not None:
            raise ValueError(
                f"Every line must hold a sentence, but line {empty} of `{file}` is empty. Delete the line "
                "from both files."
            )
    return Pairs(*sides)


def check_equal_lengths(names: Sequence[str], sides: Sequence[Sequence[str]]) -> None:
    """Refuse sentences that cannot be pairs.

    Args:
        names: of both sides, for the message.
        sides: sentences in both languages.

    Raises:
        ValueError: if there are more of one side.
    """
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"The lines of `{names[0]}` and `{names[1]}` must be translations of each other, but the files "
            f"have {len(sides[0])} and {len(sides[1])} lines. Find the lines that are missing; a shift would "
            "train on wrong pairs."
        )


def tokenize(
    lines: Iterable[str], language: str, *, lowercase: bool = True, advance: Advance = lambda: None
) -> list[str]:
    """Split words and punctuation by the rules of Moses.

    Args:
        lines: sentences.
        language: ``"de"`` or ``"en"``, whose abbreviations are known.
        lowercase: whether to make all letters small afterwards.
        advance: called after each line.

    Returns:
        Tokens separated by spaces; ``& | < > ' " [ ]`` are written ``&amp;`` and so on, as Moses does.

    References:
        Koehn et al., Moses: Open Source Toolkit for Statistical Machine Translation, ACL 2007.
    """
    tokenizer = _imported("sacremoses").MosesTokenizer(lang=language)
    tokenized = []
    for line in lines:
        # Moses makes single spaces of all white space; its port to Python leaves it at the ends.
        text: str = tokenizer.tokenize(" ".join(line.split()), return_str=True)
        tokenized.append(text.lower() if lowercase else text)
        advance()
    return tokenized


def detokenize(line: str, language: str) -> str:
    """Text as one writes it, of tokens by :func:`tokenize`; what was lower-cased stays so."""
    text: str = _imported("sacremoses").MosesDetokenizer(lang=language).detokenize(line.split())
    return text


def clean(pairs: Pairs, *, shortest: int = 1, longest: int = 175, ratio: float = 1.5) -> Pairs:
    """Leave out pairs whose lengths do not fit: Moses' ``clean-corpus-n.perl``.

    Args:
        pairs: tokenised sentences.
        shortest: least tokens of a sentence.
        longest: most tokens of a sentence.
        ratio: most times that one sentence may be as long as the other.

    Returns:
        The pairs that remain, with single spaces.

    Example:
        >>> clean(Pairs(["a  b", "a", ""], ["c d", "b c d", "e"]))
        Pairs(source=['a b'], target=['c d'])
    """
    kept = Pairs([], [])
    for sides in zip(*pairs, strict=True):
        words = [side.split() for side in sides]
        lengths = sorted(map(len, words))
        if not (max(shortest, 1) <= lengths[0] and lengths[1] <= longest):
            continue
        if lengths[1] / lengths[0] > ratio or any(len(word) > 1000 for side in words for word in side):
            continue
        for lines, side in zip(kept, words, strict=True):
            lines.append(" ".join(side))
    return kept


def learn_subwords(lines: Iterable[str], num_merges: int) -> str:
    """Learn byte pair encoding: which pairs of symbols to merge, most frequent first.

    Args:
        lines: tokenised text of both languages.
        num_merges: how many merges to learn.

    Returns:
        The codes, in the format of subword-nmt.

    References:
        Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, ACL 2016,
        arXiv:1508.07909.
    """
    codes = io.StringIO()
    text = io.StringIO("".join(f"{line}\n" for line in lines))
    with _quiet():
        _imported("subword_nmt.learn_bpe").learn_bpe(text, codes, num_merges)
    return codes.getvalue()


class Subwords:
    """Splits tokens into subwords by learnt codes; ``@@`` marks those that do not end a token.

    Args:
        codes: what :func:`learn_subwords` returns.
    """

    def __init__(self, codes: str) -> None:
        self._bpe = _imported("subword_nmt.apply_bpe").BPE(io.StringIO(codes))

    def split(self, lines: Iterable[str], advance: Advance = lambda: None) -> list[str]:
        """Split the tokens of lines.

        Args:
            lines: tokenised text.
            advance: called after each line.

        Returns:
            Subwords separated by spaces.
        """
        done = []
        for line in lines:
            done.append(self._bpe.process_line(line))
            advance()
        return done


# Lines of the training file that are about the talk and not from it.
_NO_SENTENCE = ("<url>", "<talkid>", "<keywords>")
_TAGS = re.compile(r"</?(?:title|description)>")
_SEGMENT = (re.compile(r'<seg id="[0-9]*">\s*'), re.compile(r"\s*</seg>\s*"))
# In the order in which they make up the test set.
TEST_PARTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")


def training_lines(path: Path) -> list[str]:
    """Sentences of a ``train.tags`` file of IWSLT'14, with titles and descriptions."""
    return [_TAGS.sub("", line) for line in read_lines(path) if not any(tag in line for tag in _NO_SENTENCE)]


def segment_lines(path: Path) -> list[str]:
    """Sentences of an XML file of IWSLT'14, with straight apostrophes."""
    found = (line for line in read_lines(path) if "<seg id" in line)
    return [_SEGMENT[1].sub("", _SEGMENT[0].sub("", line)).replace("\u2019", "'") for line in found]


def hold_out(pairs: Pairs, every: int = 23) -> tuple[Pairs, Pairs]:
    """Hold out every 23rd pair for validation.

    Args:
        pairs: all pairs of the training file.
        every: which of them.

    Returns:
        Pairs for training, and pairs for validation.

    Example:
        >>> train, valid = hold_out(Pairs(["a", "b", "c"], ["d", "e", "f"]), every=2)
        >>> train.source, valid.source
        (['a', 'c'], ['b'])
    """
    train = Pairs(*([line for i, line in enumerate(side, 1) if i % every] for side in pairs))
    valid = Pairs(*(side[every - 1 :: every] for side in pairs))
    return train, valid


@contextmanager
def steps(title: str, total: int) -> Iterator[Advance]:
    """Show a bar of progress on stderr for as long as the block runs.

    Args:
        title: what is done.
        total: how many times the function will be called.

    Yields:
        A function to call after each step.
    """
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a text file with one sentence per line."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _imported(module: str) -> Any:
    from importlib import import_module

    package = module.partition(".")[0]
    if find_spec(package) is None:
        raise MissingPackageError(
            f"Preparing text needs {package.replace('_', '-')}, which is not installed. Install it: "
            "pip install 'lightning-memtrain[translation]'"
        )
    return import_module(module)


@contextmanager
def _quiet() -> Iterator[None]:
    """subword-nmt shows a bar of its own, and a warning per merge that would be the last sensible one."""
    import contextlib

    with contextlib.redirect_stderr(io.StringIO()):
        yield
