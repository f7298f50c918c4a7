"""From raw text to subwords: Moses' rules, the official files, and what is wrong with files."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from lightning_memtrain.recipes.iwslt14_dynamicconv import corpora, text
from lightning_memtrain.recipes.iwslt14_dynamicconv.text import Pairs

pytest.importorskip("sacremoses", reason="sacremoses is not installed: pip install '.[translation]'")


def test_tokens_are_those_of_moses() -> None:
    lines = ["  Das  ist Dr. Müllers „Haus“, z.B. &  [1] ", "It's 3.5|4 <km>."]
    assert text.tokenize(lines[:1], "de") == [
        "das ist dr. müllers „ haus “ , z.b. &amp; &#91; 1 &#93;",
    ]
    assert text.tokenize(lines[1:], "en", lowercase=False) == ["It &apos;s 3.5 &#124; 4 &lt; km &gt; ."]
    assert text.detokenize("it &apos;s 3.5 &amp; more .", "en") == "it's 3.5 & more."


@pytest.mark.parametrize(("language", "most"), [("de", 3), ("en", 0)])
def test_tokens_of_multi30k_are_those_of_its_authors(true_text: Path, language: str, most: int) -> None:
    raw, published = (
        lzma.decompress((true_text / "multi30k" / f"val.{kind}.{language}.xz").read_bytes()).decode()
        for kind in ("raw", "tok")
    )
    found = text.tokenize(raw.split("\n")[:-1], language)
    differing = [
        (mine, other) for mine, other in zip(found, published.split("\n"), strict=False) if mine != other
    ]
    # Its authors straightened quotation marks first, which IWSLT'14's preparation does not.
    assert len(differing) == most
    assert all("„" in mine for mine, _ in differing)


def test_clean_leaves_out_what_moses_script_does() -> None:
    pairs = {
        ("a b c", "d e"): True,
        ("a b c d", "e f"): False,  # twice as long
        ("a", "b c"): False,
        ("", "b"): False,
        ("  ", "b"): False,
        ("a" * 1001, "b"): False,
        ("a" * 1000, "b"): True,
        (" ".join("a" * 176), " ".join("b" * 175)): False,
        (" ".join("a" * 175), " ".join("b" * 175)): True,
    }
    kept = text.clean(Pairs(*map(list, zip(*pairs, strict=True))))
    assert [*zip(*kept, strict=True)] == [pair for pair, stays in pairs.items() if stays]


def test_every_23rd_pair_is_for_validation() -> None:
    lines = [str(i) for i in range(1, 60)]
    train, valid = text.hold_out(Pairs(lines, lines))
    assert valid == Pairs(["23", "46"], ["23", "46"])
    assert train.source == [line for line in lines if line not in ("23", "46")]


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """The folder ``de-en`` of the archive, with 46 sentences to train on and one in each part of the test."""
    folder = tmp_path / "de-en"
    folder.mkdir()
    for language, word in (("de", "Satz"), ("en", "Sentence")):
        sentences = "".join(f"{word} {i}!\n" for i in range(44))
        (folder / f"train.tags.de-en.{language}").write_text(
            f"<url>http://x</url>\n<talkid>1</talkid>\n<keywords>k</keywords>\n<title>{word} A</title>\n"
            f"<description>{word} B!</description>\n{sentences}"
        )
        for part in text.TEST_PARTS:
            (folder / f"IWSLT14.{part}.de-en.{language}.xml").write_text(
                f'<doc>\n<seg id="1"> {word} {part}: it\u2019s </seg>\n</doc>\n'
            )
    return folder


def test_the_official_files_become_three_splits(official: Path) -> None:
    corpus = corpora.iwslt14_corpus(official)
    assert {split: len(pairs.source) for split, pairs in corpus.items()} == {
        "train": 44,
        "valid": 2,
        "test": 5,
    }
    assert corpus["train"].target[:3] == ["sentence a", "sentence b !", "sentence 0 !"]
    assert corpus["valid"].source == ["satz 20 !", "satz 43 !"]
    assert corpus["test"].target[0] == "sentence ted.dev2010 : it &apos;s"
    assert ["tedx" in line for line in corpus["test"].source] == [False, True, False, False, False]


def test_subwords_are_learnt_and_joined_again() -> None:
    lines = ["low lower lowest"] * 5 + ["new newer newest"] * 5
    codes = text.learn_subwords(lines, 6)
    assert codes.startswith("#version: 0.2\n")
    assert len(codes.splitlines()) == 7
    (split,) = text.Subwords(codes).split(["lowest slower"])
    assert "@@ " in split
    assert split.replace("@@ ", "") == "lowest slower"


def test_files_of_unequal_length_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.de").write_text("a\nb\n")
    (tmp_path / "x.en").write_text("a\n")
    with pytest.raises(ValueError, match=r"x\.de` and `.*x\.en` must be translations .* have 2 and 1 lines"):
        text.read_pairs(tmp_path / "x")


def test_an_empty_line_is_refused_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "x.de").write_text("a\nb\n")
    (tmp_path / "x.en").write_text("a\n \n")
    with pytest.raises(ValueError, match=r"line 2 of `.*x\.en` is empty"):
        text.read_pairs(tmp_path / "x")


def test_a_line_that_is_not_utf8_is_refused_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "x.de").write_bytes("gut\nschön\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"must be UTF-8, but line 2 of `.*x\.de` is not .* iconv"):
        text.read_lines(tmp_path / "x.de")


def test_other_separators_do_not_end_a_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes("a\u2028b\x0bc\r\nd".encode())
    assert text.read_lines(tmp_path / "x") == ["a\u2028b\x0bc", "d"]
    assert text.split_lines("") == []
    assert text.split_lines("\na\x85\x0cb\n\n") == ["", "a\x85\x0cb", ""]
