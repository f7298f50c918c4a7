"""The memory of one DynamicConv training step on the true workload of IWSLT'14, in rows of techniques.

    python -m benchmarks.iwslt14_memory [--batch typical] [--only REGEX]

The batches are fairseq's at 4,000 tokens, of the true lengths of all 160,239 training pairs; tokens are drawn
from the true counts of the dictionaries, so that shapes, padding and the rows of the embeddings that have a
gradient are those of the real run. Lengths and dictionaries are looked for in $MEMTRAIN_DATA_DIR and
../shared/data/iwslt14. The peak is that of the ledger in the second step, when the optimizer's state exists.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

import lightning_memtrain as mt
from benchmarks.results_file import RESULTS, write_results
from lightning_memtrain.core import MIB
from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.batches import (
    max_tokens_batches,
    num_target_tokens,
    sorted_by_length,
    split_sample,
)
from lightning_memtrain.recipes.iwslt14_dynamicconv.module import TranslationModule

RECIPE = {
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "weight_dropout": 0.1,
    "encoder_glu": False,
    "decoder_glu": False,
}
# Embeddings, the convolutions' kernels and the output projection stay dense.
LINEAR = mt.Select(dense=("*.weight_linear", "*.output_projection"))
# Sentences, longest source and longest target of each batch that is measured.
BATCHES = {"typical": (120, 32, 31), "fullest": (400, 10, 10)}


def find_data() -> Path:
    """The folder with ``train_lengths.npz`` and both dictionaries."""
    places = [os.environ.get("MEMTRAIN_DATA_DIR"), "../shared/data/iwslt14"]
    for place in filter(None, places):
        if (Path(place) / "train_lengths.npz").is_file():
            return Path(place)
    sys.exit(f"The lengths of IWSLT'14 are in none of {places}.")


def load_dictionaries(folder: Path) -> dict[str, Any]:
    """The true dictionaries, with the counts of the training text."""
    dictionaries = {}
    for language in ("de", "en"):
        lines = lzma.decompress((folder / f"dict.{language}.txt.xz").read_bytes()).decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines]
        dictionaries[language] = bridge.new_dictionary((s for s, _ in pairs), (int(n) for _, n in pairs))
    return dictionaries


def shape_of(rows: Any, sides: Sequence[Any]) -> tuple[int, ...]:
    return (len(rows), *(int(side[rows].max()) for side in sides))


def make_sample(folder: Path, dictionaries: dict[str, Any], name: str) -> bridge.Sample:
    """One of fairseq's batches, of random words."""
    wanted = BATCHES[name]
    lengths = np.load(folder / "train_lengths.npz")
    sides = [lengths[language].astype(np.int64) for language in ("de", "en")]
    order = sorted_by_length(*sides, seed=1)
    batch = min(
        max_tokens_batches(order, np.maximum(*sides), 4_000, multiple=8),
        key=lambda rows: sum(
            abs(found - size) for found, size in zip(shape_of(rows, sides), wanted, strict=True)
        ),
    )
    rng = np.random.default_rng(0)
    tokens = []
    for language, side in zip(("de", "en"), sides, strict=True):
        dictionary = dictionaries[language]
        shares = np.array(dictionary.count[4:], dtype=float)
        ids = rng.choice(np.arange(4, len(dictionary)), size=int(side[batch].sum()), p=shares / shares.sum())
        ends = np.cumsum(side[batch])
        ids[ends - 1] = dictionary.eos()
        tokens.append([torch.from_numpy(part) for part in np.split(ids, ends[:-1])])
    dataset = bridge.pair_dataset(*tokens, dictionaries["de"], dictionaries["en"])
    return dataset.collater([dataset[i] for i in range(len(batch))])  # type: ignore[no-any-return]


def microbatching(number: int) -> mt.Microbatching:
    return mt.Microbatching(number, split_fn=split_sample, weight_fn=num_target_tokens)


def half() -> dict[str, Any]:
    return {"plugins": [mt.LowPrecision("bf16-true")]}


def rows() -> dict[str, tuple[dict[str, Any], list[pl.Callback], dict[str, Any]]]:
    """Arguments of the module, callbacks and arguments of the Trainer, by row."""
    whole: dict[str, Any] = {"loss_chunk": None}
    full = mt.ActivationCheckpointing
    bits8 = {"optimizer": mt.adamw8bit, "loss_chunk": 128}
    bits4 = {"optimizer": mt.adamw4bit, "loss_chunk": 128}
    rows = {"optimizer_rows": 1024}
    return {
        "baseline: float32, Adam, as fairseq": (whole, [], {}),
        "chunked loss": ({}, [], {}),
        "8 microbatches": (whole, [microbatching(8)], {}),
        "8 microbatches, chunked loss": ({}, [microbatching(8)], {}),
        "checkpointed": (whole, [full("full")], {}),
        "checkpointed, chunked loss": ({}, [full("full")], {}),
        "8 microbatches, checkpointed, chunked loss": ({}, [microbatching(8), full("full")], {}),
        "bf16": ({}, [], half()),
        "8 microbatches, checkpointed, bf16": ({}, [microbatching(8), full("full")], half()),
        "16 microbatches, checkpointed, bf16": (
            {"loss_chunk": 128},
            [microbatching(16), full("full")],
            half(),
        ),
        "and Adam in 8 bits": (bits8, [microbatching(16), full("full")], half()),
        "and the optimizer in rows": (bits8 | rows, [microbatching(16), full("full")], half()),
        "all: and 80 % zeros in linear layers": (
            bits8 | rows,
            [
                microbatching(16),
                full("full"),
                mt.SparseTraining(mt.DynamicSparseReparameterization(0.8), layers=LINEAR),
            ],
            half(),
        ),
        "and Adam in 4 bits instead": (bits4 | rows, [microbatching(16), full("full")], half()),
        "one microbatch, checkpointed, bf16, Adam in 8 bits": (bits8, [full("full")], half()),
    }


class SecondStep(pl.Callback):
    """Counts the bytes of the second step."""

    def __init__(self) -> None:
        self.ledger: mt.MemoryLedger | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to count."""
        if batch_idx == 1:
            gc.collect()
            self.ledger = mt.MemoryLedger(pl_module, trainer.optimizers, batch)
            self.ledger.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stop counting."""
        if self.ledger is not None:
            self.ledger.__exit__(None, None, None)


def measure(
    dictionaries: dict[str, Any],
    sample: bridge.Sample,
    arguments: dict[str, Any],
    callbacks: Sequence[pl.Callback],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The ledger's peak of the second step, MiB, by category."""
    torch.manual_seed(0)
    model = bridge.build_model("lightconv_iwslt_de_en", RECIPE, dictionaries["de"], dictionaries["en"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 38_685_184
    module = TranslationModule(model=model, **arguments)
    watch = SecondStep()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=2,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*callbacks, watch],
            **options,
        )
        loader = torch.utils.data.DataLoader([sample, sample], batch_size=None)
        trainer.fit(module, loader)
    assert watch.ledger is not None
    breakdown = watch.ledger.breakdown(timeline=False)
    at_peak = {key.value: round(count / MIB, 2) for key, count in breakdown.at_peak.items() if count}
    return {"peak_mib": round(breakdown.ledger_peak_bytes / MIB, 2), "at_peak_mib": at_peak}


def main() -> None:
    """Measure the rows that are asked for, and keep the others of an earlier run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", choices=BATCHES, default="typical")
    parser.add_argument("--only", default="", help="rows whose name has this regular expression")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = find_data()
    dictionaries = load_dictionaries(folder)
    sample = make_sample(folder, dictionaries, options.batch)
    shape = {name: list(sample["net_input"][name].shape) for name in ("src_tokens", "prev_output_tokens")}
    print(shape, sample["ntokens"], "target tokens")
    name = f"iwslt14_memory_{options.batch}"
    results: dict[str, Any] = {"batch": {**shape, "target_tokens": sample["ntokens"]}, "rows": {}}
    earlier = RESULTS / f"{name}.json"
    if options.only and earlier.is_file():
        results = json.loads(earlier.read_text())["results"]
    for row, (arguments, callbacks, trainer_options) in rows().items():
        if not re.search(options.only, row):
            continue
        results["rows"][row] = measure(dictionaries, sample, arguments, callbacks, trainer_options)
        print(row, results["rows"][row], flush=True)
    baseline = results["rows"].get("baseline: float32, Adam, as fairseq")
    for values in results["rows"].values():
        if baseline:
            values["times_less"] = round(baseline["peak_mib"] / values["peak_mib"], 2)
    write_results(name, results)


if __name__ == "__main__":
    main()
