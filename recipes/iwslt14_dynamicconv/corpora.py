"""Where the text of the corpora comes from, before it is split into subwords."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from lightning_memtrain.recipes.download import download, find_or_download, unpack

from . import text
from .text import LANGUAGES, Pairs

# Tokenised pairs of each split.
Corpus = dict[str, Pairs]

IWSLT14_URL = "https://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
MULTI30K_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/tok"
MULTI30K_STEMS = {"train": "train", "valid": "val", "test": "test_2016_flickr"}
MULTI30K_SHA256 = {
    "train.lc.norm.tok.de": "cb5a23529b65ec2061f1dc446192a9c37382b63cc75f81a0be59d34894b3a505",
    "train.lc.norm.tok.en": "08925f8e0572bcd5a006702fc5fe20e2d77c6917d4eebd576fc20de6693c2119",
    "val.lc.norm.tok.de": "97232bd273eceb7207f689527386a97e4be2616b18ada47576bdaf96c8ae1f00",
    "val.lc.norm.tok.en": "46573ce391ae227f1c72f873392436a20ef18e0a6d518098cfbd70b77c8572ec",
    "test_2016_flickr.lc.norm.tok.de": "c6a33d39d48f9f510de147651316cd9d918e09ad0219df734a2f16b6baccacc4",
    "test_2016_flickr.lc.norm.tok.en": "5b7f32627cf99eced828311b955dae9800bb52bc8b91cf8b6526829e605b29d2",
}


def obtain_iwslt14(places: Sequence[Path], url: str | None) -> Path:
    """Find the folder ``de-en`` of the official archive, or download it.

    Args:
        places: folders that may be it or hold it, in this order; a download goes into the first.
        url: where the archive can be downloaded; ``None`` for no download.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: if it is in none of the places and was not downloaded.
    """

    def fetch(url: str, scratch: Path) -> Path:
        return unpack(download(url, scratch, sha256=None), "de-en", scratch)

    cure = (
        "pass a `data_dir` that holds the folder `de-en` of the official archive, or one with prepared text "
        "(`iwslt14.tokenized.de-en`)"
    )
    return find_or_download("IWSLT'14", places, _find_official, url, fetch, cure=cure)


def _find_official(place: Path) -> Path | None:
    folders = (place, place / "de-en", place / "orig" / "de-en")
    return next((folder for folder in folders if (folder / "train.tags.de-en.de").is_file()), None)


def iwslt14_corpus(folder: Path) -> Corpus:
    """The three splits out of the folder ``de-en`` of the official archive, tokenised and in lower case.

    Args:
        folder: holds ``train.tags.de-en.de``, ``IWSLT14.TED.dev2010.de-en.de.xml`` and so on.

    Returns:
        The pairs of each split.
    """
    training = {
        language: text.training_lines(folder / f"train.tags.de-en.{language}") for language in LANGUAGES
    }
    testing: dict[str, list[str]] = {
        language: list(
            chain.from_iterable(
                text.segment_lines(folder / f"IWSLT14.{part}.de-en.{language}.xml")
                for part in text.TEST_PARTS
            )
        )
        for language in LANGUAGES
    }
    for lines in (training, testing):
        text.check_equal_lengths([str(folder)] * 2, list(lines.values()))
    total = sum(map(len, chain(training.values(), testing.values())))
    with text.steps("Tokenising", total) as advance:
        # Cleaned before letters are made small, as the script does; it makes no difference to lengths.
        train, test = (
            Pairs(*(text.tokenize(lines[language], language, advance=advance) for language in LANGUAGES))
            for lines in (training, testing)
        )
    train, valid = text.hold_out(text.clean(train))
    return {"train": train, "valid": valid, "test": test}


def obtain_multi30k(places: Sequence[Path], url: str | None) -> Path:
    """Find the tokenised files of Multi30k's repository, or download them.

    Args:
        places: folders that may hold them, in this order; a download goes into the folder ``multi30k`` of
            the first.
        url: where the files can be downloaded; ``None`` for no download.

    Returns:
        The folder that holds them.

    Raises:
        FileNotFoundError: if they are in none of the places and were not downloaded.
    """

    def fetch(url: str, scratch: Path) -> Path:
        folder = scratch / "multi30k"
        folder.mkdir(parents=True)
        for name, sha256 in MULTI30K_SHA256.items():
            # Copied, since what pooch downloads can be read by its owner alone.
            shutil.copyfile(download(f"{url}/{name}", scratch, sha256=sha256), folder / name)
        return folder

    cure = (
        "pass a `data_dir` that holds `train.lc.norm.tok.de` and the other files of its repository's folder "
        "`data/task1/tok`"
    )
    return find_or_download("Multi30k", places, _find_multi30k, url, fetch, cure=cure)


def _find_multi30k(place: Path) -> Path | None:
    folders = (place, place / "multi30k")
    return next((f for f in folders if all((f / name).is_file() for name in MULTI30K_SHA256)), None)


def multi30k_corpus(folder: Path) -> Corpus:
    """The training and validation pairs of Multi30k, and its test set of 2016.

    Args:
        folder: holds ``train.lc.norm.tok.de`` and so on.

    Returns:
        The pairs of each split.
    """
    return {split: text.read_pairs(folder / f"{stem}.lc.norm.tok") for split, stem in MULTI30K_STEMS.items()}
