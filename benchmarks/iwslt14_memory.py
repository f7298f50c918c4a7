"""The memory of one DynamicConv training step on the true workload of IWSLT'14, in rows of techniques.

    python -m benchmarks.iwslt14_memory [--batch typical] [--data-dir DIR]
    python -m benchmarks.iwslt14_memory --lengths FILE.npz --dictionaries DIR [--only REGEX]

The batches are fairseq's at 4,000 tokens, of the true lengths of all 160,239 training pairs; tokens are
drawn from the true counts of the dictionaries, so that shapes, padding and the rows of the embeddings that
have a gradient are those of the real run. Both are read from the folder that the recipe prepares, which is
looked for where the recipe does: in ``--data-dir``, in $MEMTRAIN_DATA_DIR and in
~/.cache/lightning_memtrain.

Statistics of the text do as well, and give the same batches. ``--lengths`` is a file of ``numpy.savez`` with
the arrays ``de`` and ``en`` of whole numbers: for each training pair, the tokens of that side with the end of
the sentence. ``--dictionaries`` is a folder with fairseq's ``dict.de.txt`` and ``dict.en.txt``, a symbol and
its count on each line; they may be packed as ``.txt.xz``.

The peak is that of the ledger in the second step, when the optimizer's state exists. Results of all rows are
written; those of ``--only`` some are printed.
"""

from __future__ import annotations

import argparse
import gc
import lzma
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch

import lightning_memtrain as mt
from benchmarks.results_file import write_results
from lightning_memtrain.core import MIB
from lightning_memtrain.recipes.download import data_places
from lightning_memtrain.recipes.iwslt14_dynamicconv import fairseq_bridge as bridge
from lightning_memtrain.recipes.iwslt14_dynamicconv.batches import (
    max_tokens_batches,
    num_target_tokens,
    sorted_by_length,
    split_sample,
)
from lightning_memtrain.recipes.iwslt14_dynamicconv.data import (
    IWSLT14DataModule,
    find_prepared,
    load_dictionaries,
)
from lightning_memtrain.recipes.iwslt14_dynamicconv.module import TranslationModule
from lightning_memtrain.recipes.iwslt14_dynamicconv.text import LANGUAGES, read_lines

RECIPE = {
    "dropout": 0.3,
    "attention_dropout": 0.1,
    "weight_dropout": 0.1,
    "encoder_glu": False,
    "decoder_glu": False,
}
# Embeddings, the convolutions' kernels and the output projection stay dense.
LINEAR = mt.sparsity.Select(dense=("*.weight_linear", "*.output_projection"))
# Sentences, longest source and longest target of each batch that is measured.
BATCHES = {"typical": (120, 32, 31), "fullest": (400, 10, 10)}


@dataclass(frozen=True)
class Workload:
    """What is known of the training text.

    Args:
        lengths: tokens of each sentence with its end, int64, in German and in English.
        dictionaries: with the counts of the training text, by language.
    """

    lengths: Sequence[Any]
    dictionaries: dict[str, bridge.Dictionary]


def of_prepared_text(data_dir: str | None) -> Workload:
    """The workload of the folder that the recipe prepares."""
    places = data_places(data_dir)
    folder = find_prepared(IWSLT14DataModule.folder_name, places)
    if folder is None:
        sys.exit(
            f"The prepared text of IWSLT'14 is in none of {', '.join(map(str, places))}. Start "
            "`memtrain run iwslt14_dynamicconv` once, which prepares it, or see --lengths."
        )
    lengths = [
        np.array([len(line.split()) + 1 for line in read_lines(folder / f"train.{language}")])
        for language in LANGUAGES
    ]
    return Workload(lengths, load_dictionaries(folder))


def of_statistics(lengths: Path, dictionaries: Path) -> Workload:
    """The workload of two files of the formats that are described above."""
    arrays = np.load(lengths)
    words = {language: read_dictionary(dictionaries / f"dict.{language}.txt") for language in LANGUAGES}
    return Workload([arrays[language].astype(np.int64) for language in LANGUAGES], words)


def read_dictionary(file: Path) -> bridge.Dictionary:
    """A dictionary in fairseq's format, which may be packed."""
    packed = file.with_name(f"{file.name}.xz")
    content = file.read_bytes() if file.is_file() else lzma.decompress(packed.read_bytes())
    pairs = [line.rsplit(" ", 1) for line in content.decode().removesuffix("\n").split("\n")]
    return bridge.new_dictionary((symbol for symbol, _ in pairs), (int(count) for _, count in pairs))


def shape_of(rows: Any, sides: Sequence[Any]) -> tuple[int, ...]:
    return (len(rows), *(int(side[rows].max()) for side in sides))


def make_sample(workload: Workload, wanted: tuple[int, int, int], max_tokens: int = 4_000) -> bridge.Sample:
    """The batch of fairseq's that is nearest to a shape, of random words.

    Args:
        workload: lengths and dictionaries.
        wanted: sentences, and tokens of the longest source and of the longest target.
        max_tokens: of a batch.

    Returns:
        What the dataset's collater returns.
    """
    sides, dictionaries = workload.lengths, workload.dictionaries
    order = sorted_by_length(*sides, seed=1)
    batch = min(
        max_tokens_batches(order, np.maximum(*sides), max_tokens, multiple=8),
        key=lambda rows: sum(
            abs(found - size) for found, size in zip(shape_of(rows, sides), wanted, strict=True)
        ),
    )
    rng = np.random.default_rng(0)
    tokens = []
    for language, side in zip(LANGUAGES, sides, strict=True):
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


def half(weight_rounding: Literal["stochastic", "nearest"] = "stochastic") -> dict[str, Any]:
    return {"plugins": [mt.LowPrecision("bf16-true", weight_rounding=weight_rounding)]}


def rows() -> dict[str, tuple[dict[str, Any], list[pl.Callback], dict[str, Any]]]:
    """Arguments of the module, callbacks and arguments of the Trainer, by row."""
    whole: dict[str, Any] = {"loss_chunk": None}
    full = mt.ActivationCheckpointing
    bits8 = {"optimizer": mt.precision.adamw8bit, "loss_chunk": 128}
    bits4 = {"optimizer": mt.precision.adamw4bit, "loss_chunk": 128}
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
        "8 microbatches, checkpointed, bf16, Adam's moments, too": (
            {},
            [microbatching(8), full("full")],
            half(weight_rounding="nearest"),
        ),
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
                mt.SparseTraining(mt.sparsity.DSR(0.8), layers=LINEAR),
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


def train(
    dictionaries: dict[str, bridge.Dictionary],
    sample: bridge.Sample,
    num_steps: int,
    arguments: dict[str, Any],
    callbacks: Sequence[pl.Callback],
    options: dict[str, Any],
    recipe: dict[str, Any] = RECIPE,
) -> None:
    """Take steps on one batch, in a Trainer."""
    torch.manual_seed(0)
    model = bridge.build_model("lightconv_iwslt_de_en", recipe, dictionaries["de"], dictionaries["en"])
    assert sum(parameter.numel() for parameter in model.parameters()) == 38_685_184
    module = TranslationModule(model=model, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=num_steps,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[*callbacks],
            **options,
        )
        loader = torch.utils.data.DataLoader([sample] * num_steps, batch_size=None)
        trainer.fit(module, loader)


def measure(
    dictionaries: dict[str, bridge.Dictionary],
    sample: bridge.Sample,
    arguments: dict[str, Any],
    callbacks: Sequence[pl.Callback],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The ledger's peak of the second step, MiB, by category."""
    watch = SecondStep()
    train(dictionaries, sample, 2, arguments, [*callbacks, watch], options)
    assert watch.ledger is not None
    breakdown = watch.ledger.breakdown(timeline=False)
    at_peak = {key.value: round(count / MIB, 2) for key, count in breakdown.at_peak.items() if count}
    return {"peak_mib": round(breakdown.ledger_peak_bytes / MIB, 2), "at_peak_mib": at_peak}


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Options that say which batch is meant."""
    parser.add_argument("--batch", choices=BATCHES, default="typical")
    parser.add_argument("--data-dir", metavar="DIR", help="where the prepared text is, or the folder with it")
    parser.add_argument("--lengths", type=Path, metavar="FILE", help="lengths, in place of prepared text")
    parser.add_argument("--dictionaries", type=Path, metavar="DIR", help="their dictionaries")


def find_workload(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[Workload, tuple[int, int, int]]:
    """What is known of the text, and the shape of the batch."""
    if (options.lengths is None) != (options.dictionaries is None):
        parser.error("--lengths and --dictionaries go together.")
    wanted = BATCHES[options.batch]
    if options.lengths is not None:
        return of_statistics(options.lengths, options.dictionaries), wanted
    return of_prepared_text(options.data_dir), wanted


def main() -> None:
    """Measure all rows and write them, or those that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_workload(parser)
    parser.add_argument("--only", metavar="REGEX", help="rows whose name has this; they are not written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload, wanted = find_workload(parser, options)
    sample = make_sample(workload, wanted)
    shape = {name: list(sample["net_input"][name].shape) for name in ("src_tokens", "prev_output_tokens")}
    print(shape, sample["ntokens"], "target tokens")
    measured: dict[str, dict[str, Any]] = {}
    for row, (arguments, callbacks, trainer_options) in rows().items():
        if re.search(options.only or "", row):
            measured[row] = measure(workload.dictionaries, sample, arguments, callbacks, trainer_options)
            print(row, measured[row], flush=True)
    if options.only:
        return
    baseline = measured["baseline: float32, Adam, as fairseq"]["peak_mib"]
    for values in measured.values():
        values["times_less"] = round(baseline / values["peak_mib"], 2)
    batch = {**shape, "target_tokens": sample["ntokens"]}
    write_results(f"iwslt14_memory_{options.batch}", {"batch": batch, "rows": measured})


if __name__ == "__main__":
    main()
