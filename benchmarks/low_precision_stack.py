"""What techniques save on top of each other: the peak of one training step, by the ledger, in Lightning.

    python -m benchmarks.low_precision_stack [--only transformer wide_resnet]

transformer: 2.6 million parameters, 24 sequences of 64 tokens, AdamW; 8-bit Adam is bitsandbytes', which has
to be installed. wide_resnet: WRN-28-2, a batch of 100 images, SGD with Nesterov momentum.

Each row has what the row above it has, and one thing more. The third step is measured, with all that is held
at its peak by category; `EarlyZeroGrad` is in every row, so that gradients of the step before are in none.
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

from benchmarks.lightning_steps import Watch, fit, peak_of
from benchmarks.models import Step, transformer_step, wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain import (
    ActivationCheckpointing,
    ActivationCodec,
    EarlyZeroGrad,
    LowPrecision,
    Microbatching,
    SGD8bit,
    adamw8bit,
)

# Peaks in MiB, at most.
BARS = {"transformer": ("+ 4 microbatches", 25.2), "wide_resnet": ("+ momentum in 8 bits", 8.5)}
Row = dict[str, Any]


def run(make: Callable[[], Step], optimizer: Callable[[Any], Optimizer] | None, row: Row) -> dict[str, Any]:
    """Three steps in a Trainer; the last one's peak."""
    torch.manual_seed(0)
    step = make()
    if optimizer is not None:
        step.optimizer = optimizer(step.model.parameters())
    watch = Watch(step, peak=True)
    callbacks = [EarlyZeroGrad(), *row.get("callbacks", list)()]
    plugins = [LowPrecision(**row["precision"])] if "precision" in row else []
    fit(step, [step.inputs] * 3, *callbacks, watch, plugins=plugins)
    result = peak_of(watch.measured)
    gc.collect()
    return result


def transformer_rows() -> dict[str, tuple[Callable[[Any], Optimizer] | None, Row]]:
    eight_bits, four_bits = ActivationCodec(bits=8, compiled=False), ActivationCodec(bits=4, compiled=False)
    adam = partial(adamw8bit, lr=1e-4)
    bf16: Row = {"precision": {"compute": "bf16-true"}}
    packed: Row = {"precision": {"compute": "bf16-true", "activations": four_bits}}
    microbatched: Row = packed | {"callbacks": lambda: [Microbatching(num_microbatches=4)]}
    return {
        "float32": (None, {}),
        "bfloat16, stochastic rounding": (None, bf16),
        "+ Adam in 8 bits": (adam, bf16),
        "+ activations in 8 bits": (adam, {"precision": {"compute": "bf16-true", "activations": eight_bits}}),
        "activations in 4 bits instead": (adam, packed),
        "+ 4 microbatches": (adam, microbatched),
        "+ checkpointing": (
            adam,
            packed
            | {"callbacks": lambda: [Microbatching(num_microbatches=4), ActivationCheckpointing("full")]},
        ),
    }


def wide_resnet_rows() -> dict[str, tuple[Callable[[Any], Optimizer] | None, Row]]:
    sgd8bit = partial(SGD8bit, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    stack: Row = {"callbacks": lambda: [Microbatching(microbatch_size=1), ActivationCheckpointing("full")]}
    halved: Row = stack | {"precision": {"compute": "bf16-true"}}
    return {
        "float32": (None, {}),
        "microbatches of 1": (None, {"callbacks": lambda: [Microbatching(microbatch_size=1)]}),
        "+ checkpointing": (None, stack),
        "+ bfloat16, stochastic rounding": (None, halved),
        "+ momentum in 8 bits": (sgd8bit, halved),
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
            bar_title, bar_mib = BARS[name]
            if title == bar_title:
                results[title] |= {"bar_mib": bar_mib, "within_bar": results[title]["ledger_mib"] <= bar_mib}
            print(name, title, results[title])
        write_results(f"low_precision_stack_{name}", results)


if __name__ == "__main__":
    main()
