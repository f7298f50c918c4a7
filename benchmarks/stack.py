"""What techniques save on top of each other: the peak of one training step, by the ledger, in Lightning.

    python -m benchmarks.stack [--only transformer wide_resnet]

transformer: 2.6 million parameters, 24 sequences of 64 tokens, AdamW; 8-bit Adam is bitsandbytes', which has
to be installed. wide_resnet: WRN-28-2, a batch of 100 images, SGD with Nesterov momentum; sparse are its 3x3
convolutions inside blocks, 99 % of its weights.

Each row has what the row above it has, and one thing more, if it does not say otherwise. The third step is
measured, with all that is held at its peak by category. `Microbatching` is in every row, with one chunk if
not said otherwise, so that gradients of the step before are in none.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.lightning_steps import Training, Watch, peak_of, trainer_with
from benchmarks.models import Step, transformer_step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import ActivationCheckpointing, LowPrecision, Microbatching, SparseTraining
from lightning_memtrain.precision import ActivationCodec, SGD8bit, adamw8bit
from lightning_memtrain.sparsity import DSR, Select

# Peaks in MiB, at most.
BARS = {
    "transformer": {"+ 4 microbatches": 25.2},
    "wide_resnet": {
        "+ momentum in 8 bits": 8.5,
        "float32, microbatches of 1, checkpointing, 80 % zeros": 8.0,
        "+ bfloat16, momentum in 8 bits": 4.0,
    },
}
MakeOptimizer = Callable[[Any], Optimizer]
Row = dict[str, Any]


class Building(Training):
    """Makes its optimizer when the Trainer asks for it, when layers may have become sparse."""

    def __init__(self, step: Step, make: MakeOptimizer) -> None:
        super().__init__(step)
        self._make = make

    def configure_optimizers(self) -> Optimizer:
        """The step's new optimizer."""
        self._step.optimizer = self._make(self.parameters())
        return self._step.optimizer


def run(make: Callable[[], Step], optimizer: MakeOptimizer, row: Row) -> dict[str, Any]:
    """Three steps in a Trainer; the last one's peak."""
    torch.manual_seed(0)
    step = make()
    watch = Watch(step, peak=True)
    callbacks = row.get("callbacks", list)()
    if not any(isinstance(callback, Microbatching) for callback in callbacks):
        callbacks.insert(0, Microbatching(num_microbatches=1))
    plugins = [LowPrecision(**row["precision"])] if "precision" in row else []
    batches: DataLoader[Any] = DataLoader([step.inputs] * 3, batch_size=None)  # type: ignore[arg-type]
    trainer_with(*callbacks, watch, plugins=plugins).fit(Building(step, optimizer), batches)
    result = peak_of(watch.measured)
    gc.collect()
    return result


def transformer_rows() -> dict[str, tuple[MakeOptimizer, Row]]:
    eight_bits, four_bits = ActivationCodec(bits=8, compiled=False), ActivationCodec(bits=4, compiled=False)
    adam = partial(adamw8bit, lr=1e-4)
    full_adam = partial(torch.optim.AdamW, lr=1e-4)
    bf16: Row = {"precision": {"precision": "bf16-true"}}
    packed: Row = {"precision": {"precision": "bf16-true", "activations": four_bits}}
    microbatched: Row = packed | {"callbacks": lambda: [Microbatching(num_microbatches=4)]}
    return {
        "float32": (full_adam, {}),
        "bfloat16, stochastic rounding": (full_adam, bf16),
        "+ Adam in 8 bits": (adam, bf16),
        "+ activations in 8 bits": (
            adam,
            {"precision": {"precision": "bf16-true", "activations": eight_bits}},
        ),
        "activations in 4 bits instead": (adam, packed),
        "+ 4 microbatches": (adam, microbatched),
        "+ checkpointing": (
            adam,
            packed
            | {"callbacks": lambda: [Microbatching(num_microbatches=4), ActivationCheckpointing("full")]},
        ),
    }


def wide_resnet_rows() -> dict[str, tuple[MakeOptimizer, Row]]:
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    sgd, sgd8bit = partial(torch.optim.SGD, **settings), partial(SGD8bit, **settings)
    bf16 = {"precision": "bf16-true"}

    def stack(*sparse: Callable[[], Any]) -> Callable[[], list[Any]]:
        return lambda: [
            Microbatching(microbatch_size=1),
            ActivationCheckpointing("full"),
            *(make() for make in sparse),
        ]

    def zeros() -> SparseTraining:
        layers = Select(dense=("model.conv", "*.shortcut", "model.fc"))
        return SparseTraining(DSR(0.8), layers=layers)

    return {
        "float32": (sgd, {}),
        "microbatches of 1": (sgd, {"callbacks": lambda: [Microbatching(microbatch_size=1)]}),
        "+ checkpointing": (sgd, {"callbacks": stack()}),
        "+ bfloat16, stochastic rounding": (sgd, {"callbacks": stack(), "precision": bf16}),
        "+ momentum in 8 bits": (sgd8bit, {"callbacks": stack(), "precision": bf16}),
        "float32, microbatches of 1, checkpointing, 80 % zeros": (sgd, {"callbacks": stack(zeros)}),
        "+ bfloat16, momentum in 8 bits": (sgd8bit, {"callbacks": stack(zeros), "precision": bf16}),
    }


PARTS: dict[str, tuple[Callable[[], Step], Callable[[], dict[str, Any]]]] = {
    "transformer": (lambda: transformer_step("cpu", 24, num_layers=3, width=240), transformer_rows),
    "wide_resnet": (lambda: wide_resnet_step("cpu"), wide_resnet_rows),
}


def main() -> None:
    """Measure the rows, print them, write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        make, rows = PARTS[name]
        results: dict[str, Any] = {"num_parameters": sum(p.numel() for p in make().model.parameters())}
        for title, (optimizer, row) in rows().items():
            if "Adam in 8" in title and not find_spec("bitsandbytes"):
                print("bitsandbytes is not installed: the rows with 8-bit Adam are left out")
                break
            results[title] = run(make, optimizer, row)
            results[title]["over_float32"] = round(
                results["float32"]["ledger_mib"] / results[title]["ledger_mib"], 2
            )
            if title in BARS[name]:
                bar_mib = BARS[name][title]
                results[title] |= {"bar_mib": bar_mib, "within_bar": results[title]["ledger_mib"] <= bar_mib}
            print(name, title, results[title])
        write_results(f"stack_{name}", results)


if __name__ == "__main__":
    main()
