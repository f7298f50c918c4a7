"""Where the text of the corpora comes from, before it is split into subwords."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from lightning_memtrain.recipes.download import ChecksumError, download, unpack
from lightning_memtrain.recipes.iwslt14_dynamicconv import text
from lightning_memtrain.recipes.iwslt14_dynamicconv.text import LANGUAGES, Pairs

DATA_DIR_VARIABLE = "MEMTRAIN_DATA_DIR"
# Tokenised pairs of each split.
Corpus = dict[str, Pairs]

IWSLT14_URL = "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14/de-en.tgz"
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
    reason = "a download was not asked for"
    if (folder := _find_official(places)) is None and url is not None:
        archive = places[0] / url.rsplit("/", 1)[-1]
        try:
            download(url, archive, sha256=None)
            unpack(archive, "de-en", places[0])
            archive.unlink()
            folder = _find_official(places)
        except (OSError, ValueError) as error:
            reason = f"the download from {url} failed ({error})"
    if folder is None:
        raise FileNotFoundError(
            f"IWSLT'14 was not found in {', '.join(f'`{place}`' for place in places)}, and {reason}: pass a "
            "`data_dir` that holds the folder `de-en` of the official archive, or one with prepared text "
            f"(`iwslt14.tokenized.de-en`), or name such a folder in ${DATA_DIR_VARIABLE}."
        )
    return folder


def _find_official(places: Sequence[Path]) -> Path | None:
    folders = chain.from_iterable((place, place / "de-en", place / "orig" / "de-en") for place in places)
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
    reason = "a download was not asked for"
    if (folder := _find_multi30k(places)) is None and url is not None:
        try:
            for name, sha256 in MULTI30K_SHA256.items():
                if not (places[0] / "multi30k" / name).is_file():
                    download(f"{url}/{name}", places[0] / "multi30k" / name, sha256=sha256)
            folder = _find_multi30k(places)
        except (OSError, ChecksumError) as error:
            reason = f"the download from {url} failed ({error})"
    if folder is None:
        raise FileNotFoundError(
            f"Multi30k was not found in {', '.join(f'`{place}`' for place in places)}, and {reason}: pass a "
            "`data_dir` that holds `train.lc.norm.tok.de` and the other files of its repository's folder "
            f"`data/task1/tok`, or name such a folder in ${DATA_DIR_VARIABLE}."
        )
    return folder


def _find_multi30k(places: Sequence[Path]) -> Path | None:
    folders = chain.from_iterable((place, place / "multi30k") for place in places)
    return next(
        (folder for folder in folders if all((folder / name).is_file() for name in MULTI30K_SHA256)), None
    )


def multi30k_corpus(folder: Path) -> Corpus:
    """The training and validation pairs of Multi30k, and its test set of 2016.

    Args:
        folder: holds ``train.lc.norm.tok.de`` and so on.

    Returns:
        The pairs of each split.
    """
    return {split: text.read_pairs(folder / f"{stem}.lc.norm.tok") for split, stem in MULTI30K_STEMS.items()}
