"""A translation corpus and model in miniature, for tests of the recipe on fairseq."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge

needs_fairseq = pytest.mark.skipif(
    not bridge.is_installed(),
    reason="fairseq is not installed: pip install 'lightning-memtrain[translation]'",
)

TINY: dict[str, Any] = {
    "encoder_embed_dim": 16,
    "decoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "decoder_ffn_embed_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_kernel_size_list": [3, 7],
    "decoder_kernel_size_list": [3, 7],
    "encoder_glu": False,
    "decoder_glu": False,
}
WITHOUT_DROPOUT = {**TINY, "dropout": 0.0, "attention_dropout": 0.0, "weight_dropout": 0.0}
SIZES = {"train": 96, "valid": 12, "test": 10}


def sentences(number: int, seed: int) -> tuple[list[str], list[str]]:
    """German and English sentences of 2 to 11 invented words each; a word's translation has its number."""
    rng = random.Random(seed)
    numbers = [[rng.randrange(40) for _ in range(rng.randint(2, 11))] for _ in range(number)]
    german = [" ".join(f"wort{n}" for n in line) for line in numbers]
    english = [" ".join(f"word{n}" for n in line[: rng.randint(2, len(line))]) for line in numbers]
    return german, english


def write_corpus(folder: Path, sizes: dict[str, int] = SIZES) -> Path:
    """A prepared folder with a few pairs in each split, in words: without `code`."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate(sizes.items()):
        for language, lines in zip(("de", "en"), sentences(size, seed), strict=True):
            (folder / f"{split}.{language}").write_text("".join(f"{line}\n" for line in lines))
    return folder
