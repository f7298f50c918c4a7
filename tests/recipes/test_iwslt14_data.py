"""The data modules: where text comes from, what becomes of it, and what they refuse."""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memtrain.recipes.iwslt14_dynamicconv import corpora, text
from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.data import (
    IWSLT14DataModule,
    Multi30kDataModule,
    TranslationDataModule,
    load_dictionaries,
)
from lightning_memtrain.recipes.iwslt14_dynamicconv.text import Pairs
from tests.helpers.translation import SIZES, needs_fairseq, sentences, write_corpus

pytestmark = needs_fairseq


def module(folder: Path, **options: Any) -> IWSLT14DataModule:
    return IWSLT14DataModule(str(folder), **{"max_tokens": 60, "download": False, **options})


def ready(folder: Path, stage: str = "fit", **options: Any) -> IWSLT14DataModule:
    data = module(folder, **options)
    data.prepare_data()
    data.setup(stage)
    return data


def unpacked(path: Path) -> str:
    return lzma.decompress(path.with_name(f"{path.name}.xz").read_bytes()).decode()


def test_samples_are_fairseqs(tmp_path: Path) -> None:
    data = ready(write_corpus(tmp_path))
    sample = next(iter(data.train_dataloader()))
    inputs, target = sample["net_input"], sample["target"]
    assert sample["nsentences"] % 8 == 0
    assert sample["ntokens"] == int(target.ne(1).sum())
    assert (inputs["src_tokens"][:, -1] == 2).all()  # padded on the left, so that all end in </s>
    assert (inputs["prev_output_tokens"][:, 0] == 2).all()
    assert torch.equal(
        inputs["prev_output_tokens"][:, 1:][target[:, 1:] != 1], target[:, :-1][target[:, 1:] != 1]
    )
    assert max(inputs["src_tokens"].numel(), target.numel()) <= 60


def test_validation_and_test_have_all_pairs_and_training_an_order_for_each_epoch(tmp_path: Path) -> None:
    data = ready(write_corpus(tmp_path))
    data.setup("test")
    for loader, split in ((data.val_dataloader(), "valid"), (data.test_dataloader(), "test")):
        assert sorted(int(i) for sample in loader for i in sample["id"]) == list(range(SIZES[split]))
    loader = data.train_dataloader()
    first = [sample["id"].tolist() for sample in loader]
    loader.batch_sampler.set_epoch(1)
    second = [sample["id"].tolist() for sample in loader]
    assert first != second
    assert sorted(first) == sorted(second)


def test_dictionaries_are_made_of_the_training_text_and_saved(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path)
    (folder / "train.de").write_text("b a\na c c\n")
    (folder / "train.en").write_text("x\ny\n")
    made = load_dictionaries(folder)["de"]
    assert made.symbols == ["<s>", "<pad>", "</s>", "<unk>", "a", "c", "b", "madeupword0000"]
    assert (folder / "dict.de.txt").read_text() == "a 2\nc 2\nb 1\nmadeupword0000 0\n"
    assert load_dictionaries(folder)["de"] == made


@pytest.mark.parametrize(("language", "size", "num_unknown"), [("de", 8_848, 22), ("en", 6_632, 6)])
def test_the_true_dictionaries_and_ids_come_out(
    true_text: Path, tmp_path: Path, language: str, size: int, num_unknown: int
) -> None:
    (tmp_path / f"dict.{language}.txt").write_text(
        unpacked(true_text / "iwslt14" / f"dict.{language}.txt"), encoding="utf-8"
    )
    true = bridge.load().data.Dictionary.load(str(tmp_path / f"dict.{language}.txt"))
    assert len(true) == size
    # From the counts of the training text alone come the order and the symbols that fill up.
    counts = {symbol: n for symbol, n in zip(true.symbols[4:], true.count[4:], strict=True) if n}
    assert bridge.count_dictionary(counts).symbols == true.symbols
    lines = unpacked(true_text / "iwslt14" / f"valid.bpe.{language}").split("\n")[:-1]
    assert len(lines) == IWSLT14DataModule.num_pairs["valid"]
    encoded = [bridge.encode(line, true) for line in lines]
    assert sum(bool((ids == true.unk()).any()) for ids in encoded) == num_unknown
    assert [true.string(ids) for ids in encoded[:500]] == lines[:500]


def test_the_true_model_has_as_many_parameters_as_the_published_one(true_text: Path) -> None:
    dictionaries = []
    for language in ("de", "en"):
        lines = unpacked(true_text / "iwslt14" / f"dict.{language}.txt").splitlines()
        dictionaries.append(bridge.new_dictionary(line.rsplit(" ", 1)[0] for line in lines))
    model = bridge.build_model(
        "lightconv_iwslt_de_en", {"encoder_glu": False, "decoder_glu": False}, *dictionaries
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == 38_685_184


class TinyDataModule(TranslationDataModule):
    """Prepares a few invented pairs."""

    folder_name = "tiny"
    num_merges = 20

    def read_corpus(self, places: Any, download: bool) -> corpora.Corpus:
        return {split: Pairs(*sentences(size, seed=size)) for split, size in SIZES.items()}


def test_text_is_prepared_once_and_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TinyDataModule(str(tmp_path), max_tokens=100)
    data.prepare_data()
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == sorted(
        ["code", "dict.de.txt", "dict.en.txt"]
        + [f"{split}.{language}" for split in SIZES for language in ("de", "en")]
    )
    lines = text.read_lines(tmp_path / "tiny" / "train.de")
    assert "@@ " in lines[0]
    assert [line.replace("@@ ", "") for line in lines] == sentences(96, seed=96)[0]
    monkeypatch.setattr(TinyDataModule, "read_corpus", None)  # would fail if it were called again
    again = TinyDataModule(str(tmp_path), max_tokens=100)
    again.prepare_data()
    again.setup("fit")
    assert again.codes == data.codes != ""
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".prepare")] == []


def test_a_preparation_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, dictionaries: object) -> None:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(TinyDataModule, "check_dictionaries", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        TinyDataModule(str(tmp_path)).prepare_data()
    assert [path.name for path in tmp_path.iterdir()] == [".tiny.lock"]


def test_the_data_is_found_by_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path / "somewhere" / "iwslt14.tokenized.de-en")
    monkeypatch.setenv("MEMTRAIN_DATA_DIR", str(tmp_path / "somewhere"))
    data = IWSLT14DataModule(download=False, max_tokens=60)
    data.prepare_data()
    data.setup("validate")
    assert len(data.val_dataloader().dataset) == SIZES["valid"]


@pytest.mark.parametrize("kind", [IWSLT14DataModule, Multi30kDataModule])
def test_missing_data_is_named_with_the_cure(tmp_path: Path, kind: type[TranslationDataModule]) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"was not found in `.*, and a download was not asked for: pass"
    ):
        kind(str(tmp_path), download=False).prepare_data()
    with pytest.raises(FileNotFoundError, match="No prepared text was found in"):
        kind(str(tmp_path), download=False).setup("fit")


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "IWSLT14_URL", "http://127.0.0.1:9/de-en.tgz")
    with pytest.raises(FileNotFoundError, match=r"the download from http://127.0.0.1:9/de-en.tgz failed \("):
        IWSLT14DataModule(str(tmp_path)).prepare_data()


def test_another_number_of_pairs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "obtain_iwslt14", lambda *_: tmp_path)
    monkeypatch.setattr(corpora, "iwslt14_corpus", lambda _: {"train": Pairs(["a"], ["b"])})
    with pytest.raises(
        ValueError, match=r"must have \{'train': 160239, .* but the files gave \{'train': 1\}"
    ):
        IWSLT14DataModule(str(tmp_path)).prepare_data()


def test_other_dictionaries_than_the_published_ones_are_warned_of(tmp_path: Path) -> None:
    dictionaries = load_dictionaries(write_corpus(tmp_path))
    with pytest.warns(UserWarning, match=r"should have \{'de': 8848, 'en': 6632\} .* but have \{'de': 48"):
        module(tmp_path).check_dictionaries(dictionaries)


def test_long_sentences_are_skipped_and_counted(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path)
    lines = text.read_lines(folder / "train.de")
    lines[4] = "wort1 " * 60
    text.write_lines(folder / "train.de", lines)
    with pytest.warns(UserWarning, match=r"1 of 96 pairs have .* max_tokens=60 tokens, .* line 5 with 61"):
        data = ready(folder)
    assert data.num_skipped == {"train": 1, "valid": 0}
    assert len(data.train_dataloader().dataset) == 95
    with pytest.raises(ValueError, match=r"No sentence may be longer than a batch, .* Raise `max_tokens`"):
        ready(folder, overlong="error")


def test_too_few_sentences_for_a_batch_are_refused(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path, {"train": 7, "valid": 2, "test": 2})
    with pytest.raises(ValueError, match=r"its 7 pairs make 0 for 1 process\(es\) with batch_multiple=8"):
        ready(folder, max_tokens=200)
    assert len(ready(folder, max_tokens=200, batch_multiple=1).train_dataloader()) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, r"`IWSLT14DataModule\(max_tokens\)` must be at least 1, but got max_tokens=0"),
        ({"batch_multiple": 0}, r"\(batch_multiple\)` must be at least 1"),
        ({"num_workers": -1}, r"\(num_workers\)` must be at least 0"),
        ({"seed": -1}, r"\(seed\)` must be at least 0"),
        ({"overlong": "keep"}, r"\(overlong\)` must be 'skip' or 'error', but got overlong='keep'"),
    ],
)
def test_arguments_are_checked(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(tmp_path, **options)


def test_a_resumed_loader_goes_on_in_mid_epoch(tmp_path: Path) -> None:
    data = ready(write_corpus(tmp_path))
    loader = data.train_dataloader()
    whole = [sample["id"].tolist() for sample in loader]
    samples = iter(loader)
    next(samples), next(samples)
    state = loader.state_dict()
    resumed = data.train_dataloader()
    resumed.load_state_dict(state)
    assert [sample["id"].tolist() for sample in resumed] == whole[2:]
    assert next(iter(resumed))["id"].tolist() == whole[0]
