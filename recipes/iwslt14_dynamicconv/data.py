"""Data modules: IWSLT'14 and Multi30k, German to English."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import lightning.pytorch as pl
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.recipes.download import DATA_DIR_VARIABLE, data_places
from lightning_memtrain.recipes.resumable import ResumableLoader

from . import corpora, text
from . import fairseq_bridge as bridge
from .batches import (
    EpochBatches,
    Indices,
    max_tokens_batches,
    sorted_by_length,
)
from .corpora import Corpus
from .text import LANGUAGES

SPLITS = ("train", "valid", "test")
CODES = "code"

Overlong: TypeAlias = Literal["skip", "error"]


class TranslationDataModule(pl.LightningDataModule):
    """Sentence pairs in German and English, in fairseq's samples of at most so many tokens.

    Reads a folder of text that was prepared as fairseq's ``prepare-iwslt14.sh`` does: ``train``, ``valid``
    and ``test``, each with ``.de`` and ``.en``, in subwords separated by spaces; beside them the ``code`` of
    the subwords and, once they were made of the training text, ``dict.de.txt`` and ``dict.en.txt``. Looks for
    it in ``data_dir``, then in ``$MEMTRAIN_DATA_DIR``, then in ``~/.cache/lightning_memtrain`` (each may be
    the folder or hold it), and otherwise prepares it in the first of these three that is set. Subclasses say
    of what.

    Args:
        data_dir: where the data is or shall be; ``None`` to use the other places.
        max_tokens: most tokens of a sample with padding, on either side; at least 1.
        batch_multiple: the sentences of a training sample are fewer than this or divisible by it; at least 1.
        overlong: what to do about a sentence longer than ``max_tokens``: ``"skip"`` its pair and warn how
            many there are, or ``"error"``.
        num_workers: processes that make samples; 0 makes them in the training process.
        seed: of the order.
        download: whether to download what is not found.

    Raises:
        ArgumentError: if an argument lies outside its range.
    """

    folder_name: str
    num_merges: int

    def __init__(
        self,
        data_dir: str | None = None,
        max_tokens: int = 4_000,
        batch_multiple: int = 8,
        overlong: Overlong = "skip",
        num_workers: int = 0,
        seed: int = 1,
        download: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for argument, value, least in (
            ("max_tokens", max_tokens, 1),
            ("batch_multiple", batch_multiple, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ArgumentError(
                    f"`{name}({argument})` must be at least {least}, but got {argument}={value}."
                )
        if overlong not in get_args(Overlong):
            raise ArgumentError(
                f"`{name}(overlong)` must be 'skip' or 'error', but got overlong={overlong!r}."
            )
        self.max_tokens = max_tokens
        self.batch_multiple = batch_multiple
        self.overlong = overlong
        self.num_workers = num_workers
        self.seed = seed
        self._places = data_places(data_dir)
        self._download = download
        self._datasets: dict[str, Any] = {}
        self._batches: dict[str, list[Indices]] = {}
        self.dictionaries: dict[str, bridge.Dictionary] = {}
        self.num_skipped: dict[str, int] = {}
        # Not `data_dir`, which is another on another machine.
        self.save_hyperparameters("max_tokens", "batch_multiple", "overlong", "seed")

    def read_corpus(self, places: Sequence[Path], download: bool) -> Corpus:
        """Get the text, tokenised but not in subwords.

        Args:
            places: where to look; what is downloaded goes into the first.
            download: whether to download it.

        Returns:
            The pairs of each split.
        """
        raise NotImplementedError

    def check_dictionaries(self, dictionaries: Mapping[str, bridge.Dictionary]) -> None:
        """Look whether newly made dictionaries are those of the published runs."""

    def prepare_data(self) -> None:
        """Prepare the text if it is nowhere to be found; Lightning calls this in one process per machine."""
        bridge.load()  # before hours are spent on text that nothing can be trained on
        if self._find() is not None:
            return
        # Several runs may start at once on an empty machine; the first one prepares for all.
        self._places[0].mkdir(parents=True, exist_ok=True)
        with FileLock(self._places[0] / f".{self.folder_name}.lock"):
            if self._find() is None:
                self._prepare(self.read_corpus(self._places, self._download))

    def _prepare(self, corpus: Corpus) -> None:
        into = self._places[0]
        codes = text.learn_subwords(chain(*corpus["train"]), self.num_merges)
        subwords = text.Subwords(codes)
        num_lines = sum(2 * len(pairs.source) for pairs in corpus.values())
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=into) as scratch:
            folder = Path(scratch) / self.folder_name
            folder.mkdir()
            (folder / CODES).write_text(codes, encoding="utf-8")
            with text.steps("Splitting into subwords", num_lines) as advance:
                for split, pairs in corpus.items():
                    for language, lines in zip(LANGUAGES, pairs, strict=True):
                        text.write_lines(folder / f"{split}.{language}", subwords.split(lines, advance))
            self.check_dictionaries(load_dictionaries(folder))
            os.replace(folder, into / self.folder_name)

    def _find(self) -> Path | None:
        return find_prepared(self.folder_name, self._places)

    def setup(self, stage: str) -> None:
        """Read what the stage needs and has not been read.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            FileNotFoundError: if there is no prepared text.
            ValueError: if it cannot be used: see :func:`~text.read_pairs`; or a sentence has more than
                ``max_tokens`` tokens and ``overlong`` is ``"error"``; or there is no batch for each process.
        """
        folder = self._find()
        if folder is None:
            places = ", ".join(f"`{place}`" for place in self._places)
            raise FileNotFoundError(
                f"No prepared text was found in {places}: pass a `data_dir` that holds `train.de` and so on, "
                f"or name such a folder in ${DATA_DIR_VARIABLE}."
            )
        if not self.dictionaries:
            self.dictionaries = load_dictionaries(folder)
        splits = {"fit": ("train", "valid"), "validate": ("valid",), "test": ("test",)}.get(stage, ())
        for split in splits:
            if split not in self._datasets:
                self._read(folder, split)

    @property
    def codes(self) -> str:
        """How tokens are split into subwords; empty if the prepared folder does not say."""
        folder = self._find()
        return (folder / CODES).read_text(encoding="utf-8") if folder and (folder / CODES).is_file() else ""

    def _read(self, folder: Path, split: str) -> None:
        pairs = text.read_pairs(folder / split)
        ids: list[list[Tensor]] = []
        with text.steps(f"Reading {split} sentences", 2 * len(pairs.source)) as advance:
            for language, lines in zip(LANGUAGES, pairs, strict=True):
                indices = self.dictionaries[language].indices
                unknown, end = self.dictionaries[language].unk(), self.dictionaries[language].eos()
                ids.append([])
                for line in lines:
                    numbers = [*(indices.get(token, unknown) for token in line.split()), end]
                    ids[-1].append(torch.tensor(numbers, dtype=torch.int32))
                    advance()
        source, target = self._within_limit(folder, split, *ids)
        self._datasets[split] = bridge.pair_dataset(
            source, target, *(self.dictionaries[language] for language in LANGUAGES)
        )
        lengths = [np.array([len(ids) for ids in side]) for side in (source, target)]
        is_train = split == "train"
        order = sorted_by_length(*lengths, seed=self.seed if is_train else None)
        batches = max_tokens_batches(
            order, np.maximum(*lengths), self.max_tokens, self.batch_multiple if is_train else 1
        )
        num_processes = self.trainer.world_size if self.trainer else 1
        if len(batches) < num_processes:
            raise ValueError(
                f"`{folder / split}` must hold sentences for at least one batch in each process, but its "
                f"{len(source)} pairs make {len(batches)} for {num_processes} process(es) with "
                f"batch_multiple={self.batch_multiple} and max_tokens={self.max_tokens}. Give more text, or "
                "make `batch_multiple` smaller."
            )
        self._batches[split] = batches

    def _within_limit(
        self, folder: Path, split: str, source: list[Tensor], target: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        kept = [max(len(a), len(b)) <= self.max_tokens for a, b in zip(source, target, strict=True)]
        self.num_skipped[split] = len(kept) - sum(kept)
        if not self.num_skipped[split]:
            return source, target
        first = kept.index(False)
        found = (
            f"of `{folder / split}`, {self.num_skipped[split]} of {len(kept)} pairs have a sentence of more "
            f"than max_tokens={self.max_tokens} tokens, first the one in line {first + 1} with "
            f"{max(len(source[first]), len(target[first]))}"
        )
        if self.overlong == "error":
            raise ValueError(
                f"No sentence may be longer than a batch, but {found}. Raise `max_tokens`, or leave such "
                "pairs out with overlong='skip'."
            )
        warnings.warn(f"Pairs are left out: {found}. Raise `max_tokens` to use them.", stacklevel=2)
        sides = ([ids for ids, keep in zip(side, kept, strict=True) if keep] for side in (source, target))
        return next(sides), next(sides)

    def train_dataloader(self) -> ResumableLoader:
        """Samples in a new order every epoch; this process's share of them."""
        return self._loader("train", seed=self.seed)

    def val_dataloader(self) -> ResumableLoader:
        """The validation pairs, from short to long."""
        return self._loader("valid", seed=None)

    def test_dataloader(self) -> ResumableLoader:
        """The test pairs, from short to long."""
        return self._loader("test", seed=None)

    def _loader(self, split: str, seed: int | None) -> ResumableLoader:
        if self.num_workers == 0:
            # Lightning guesses from the number of workers; a sample takes a millisecond.
            warnings.filterwarnings("ignore", message=".*does not have many workers")
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        batches = EpochBatches(self._batches[split], seed=seed, num_replicas=world_size, rank=rank)
        dataset = self._datasets[split]
        return ResumableLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=dataset.collater,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds prepared text of all three splits."""
    return all((folder / f"{split}.{language}").is_file() for split in SPLITS for language in LANGUAGES)


def find_prepared(name: str, places: Sequence[Path]) -> Path | None:
    """Look for a folder of prepared text.

    Args:
        name: of the folder.
        places: each may be the folder or hold it.

    Returns:
        The first that is there, or ``None``.
    """
    folders = chain.from_iterable((place, place / name) for place in places)
    return next((folder for folder in folders if is_prepared(folder)), None)


def load_dictionaries(folder: Path) -> dict[str, bridge.Dictionary]:
    """Load the dictionaries of a prepared folder, or make them of its training text and save them there.

    Args:
        folder: holds ``train.de`` and ``train.en``, or ``dict.de.txt`` and ``dict.en.txt``.

    Returns:
        A dictionary for each language.
    """
    dictionaries = {}
    for language in LANGUAGES:
        file = folder / f"dict.{language}.txt"
        if file.is_file():
            dictionaries[language] = bridge.load().data.Dictionary.load(str(file))
            continue
        counts: Counter[str] = Counter()
        for line in text.read_lines(folder / f"train.{language}"):
            counts.update(line.split())
        dictionaries[language] = bridge.count_dictionary(counts)
        if os.access(folder, os.W_OK):
            dictionaries[language].save(str(file))
    return dictionaries


class IWSLT14DataModule(TranslationDataModule):
    """IWSLT'14 German-English: 160,239 pairs of TED talks to train on, 7,283 to validate, 6,750 to test.

    Prepared exactly as fairseq's ``prepare-iwslt14.sh`` does it: Moses' tokenisation and lower case, pairs of
    1 to 175 tokens of which none is more than 1.5 times as long as the other, every 23rd of them for
    validation, byte pair encoding with 10,000 merges learnt on both languages. Where the folder ``de-en`` of
    the official archive lies in one of the places, that is used; otherwise the archive is downloaded (19 MB).

    Its arguments are those of :class:`TranslationDataModule`.

    References:
        Cettolo et al., Report on the 11th IWSLT Evaluation Campaign, 2014.
    """

    folder_name = "iwslt14.tokenized.de-en"
    num_merges = 10_000
    num_pairs: ClassVar = {"train": 160_239, "valid": 7_283, "test": 6_750}
    dictionary_sizes: ClassVar = {"de": 8_848, "en": 6_632}

    def read_corpus(self, places: Sequence[Path], download: bool) -> Corpus:
        """Tokenise, clean and split the official files.

        Args:
            places: where to look for the folder ``de-en``; the download goes into the first.
            download: whether to download it.

        Returns:
            The pairs of each split.

        Raises:
            ValueError: if the pairs are not as many as in the published runs.
        """
        url = corpora.IWSLT14_URL if download else None
        corpus = corpora.iwslt14_corpus(corpora.obtain_iwslt14(places, url))
        found = {split: len(pairs.source) for split, pairs in corpus.items()}
        if found != self.num_pairs:
            # The authors publish no checksum of the archive: what is in it is checked instead.
            raise ValueError(
                f"IWSLT'14 must have {self.num_pairs} pairs after cleaning, but the files gave {found}. They "
                "are incomplete or of another year: delete them and try again."
            )
        return corpus

    def check_dictionaries(self, dictionaries: Mapping[str, bridge.Dictionary]) -> None:
        """Warn if tokenisation or subwords differ from those of the published runs."""
        found = {language: len(dictionary) for language, dictionary in dictionaries.items()}
        if found != self.dictionary_sizes:
            warnings.warn(
                f"The dictionaries of IWSLT'14 should have {self.dictionary_sizes} symbols, as in the "
                f"published runs, but have {found}: another version of sacremoses or subword-nmt splits "
                "words in another way. Results may differ a little.",
                stacklevel=2,
            )


class Multi30kDataModule(TranslationDataModule):
    """Multi30k, task 1: 29,000 captions of images in German and English; 1,014 to validate, 1,000 to test.

    The tokenised, lower-case files of its repository (``train.lc.norm.tok.de`` and so on, the test set of
    2016), with byte pair encoding of 6,000 merges learnt on both languages. They are looked for where
    prepared text is, and otherwise downloaded (5 MB). For a run that takes minutes.

    Its arguments are those of :class:`TranslationDataModule`.

    References:
        Elliott et al., Multi30K: Multilingual English-German Image Descriptions, 2016, W16-3210.
    """

    folder_name = "multi30k.tokenized.de-en"
    num_merges = 6_000

    def read_corpus(self, places: Sequence[Path], download: bool) -> Corpus:
        """Read the tokenised files.

        Args:
            places: where to look for them; the download goes into the first.
            download: whether to download them.

        Returns:
            The pairs of each split.
        """
        url = corpora.MULTI30K_URL if download else None
        return corpora.multi30k_corpus(corpora.obtain_multi30k(places, url))
