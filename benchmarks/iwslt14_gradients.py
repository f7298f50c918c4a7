"""How far the gradients of microbatches of the translation recipe lie from those of the whole batch.

    python -m benchmarks.iwslt14_gradients [--batch typical] [--data-dir DIR]
    python -m benchmarks.iwslt14_gradients --lengths FILE.npz --dictionaries DIR

The batches are those of `benchmarks.iwslt14_memory`, which says what the options mean; the model is the whole
one in float32, without dropout, which would draw other numbers for chunks than for the batch. A distance is
the norm of the difference over the norm of the gradient of the batch.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch

import lightning_memtrain as mt
from benchmarks.iwslt14_memory import RECIPE, add_workload, find_workload, make_sample, microbatching, train
from benchmarks.results_file import write_results
from lightning_memtrain.recipes.iwslt14_dynamicconv.batches import split_sample

NUM_MICROBATCHES = 8
WITHOUT_DROPOUT = RECIPE | {"dropout": 0.0, "attention_dropout": 0.0, "weight_dropout": 0.0}


class Gradient(pl.Callback):
    """Keeps the gradient of the step."""

    def __init__(self) -> None:
        self.found = torch.empty(0)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        """Copy it."""
        gradients = (parameter.grad for parameter in pl_module.parameters())
        self.found = torch.cat(
            [gradient.flatten().double() for gradient in gradients if gradient is not None]
        )


def contenders() -> dict[str, list[pl.Callback]]:
    """Callbacks, by what they do to the batch."""
    number = NUM_MICROBATCHES
    equal = mt.Microbatching(number, split_fn=split_sample, weight_fn=lambda chunk: 1)
    return {"by target tokens": [microbatching(number)], "mean of means": [equal]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_workload(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    workload, shape = find_workload(parser, options)
    sample = make_sample(workload, shape)

    def gradient(callbacks: list[pl.Callback]) -> torch.Tensor:
        watch = Gradient()
        train(workload.dictionaries, sample, 1, {}, [*callbacks, watch], {}, recipe=WITHOUT_DROPOUT)
        return watch.found

    whole = gradient([])
    results: dict[str, Any] = {"microbatches": NUM_MICROBATCHES, "relative_distance": {}}
    for name, callbacks in contenders().items():
        distance = float((gradient(callbacks) - whole).norm() / whole.norm())
        results["relative_distance"][name] = float(f"{distance:.2e}")
        print(name, results["relative_distance"][name], flush=True)
    write_results(f"iwslt14_gradients_{options.batch}", results)


if __name__ == "__main__":
    main()
