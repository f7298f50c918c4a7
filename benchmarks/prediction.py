"""What is predicted for a GPU beside what real GPUs needed, and what a prediction itself costs.

    python -m benchmarks.prediction [--write NAME] [ROW...]

The real figures are those of recordings of torch's allocator (one training step in steady state). Time is
that of the whole prediction but for the imports, memory the most that its process had, the imports included.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from benchmarks.decoder import DecoderStep, decoder_batch
from benchmarks.results_file import write_results
from lightning_memtrain.core import MIB
from lightning_memtrain.planning import Prediction, predict
from lightning_memtrain.planning.prediction.forked import call_in_copy

# Context, autocast, and allocated and reserved MiB of the recording.
_RECORDED = {
    "decoder 423M, 4 x 128, float32": (128, False, 6_701.1, 6_900),
    "decoder 423M, 4 x 256, float32": (256, False, 8_691.2, 8_836),
    "decoder 423M, 4 x 512, bf16 autocast": (512, True, 11_858.5, 12_074),
    "decoder 423M, 4 x 1024, bf16 autocast": (1024, True, 23_092.2, 24_012),
}


class GPT2(pl.LightningModule):
    """GPT-2 small as transformers has it."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(GPT2Config())

    def training_step(self, batch: Any, index: int) -> Any:
        """The loss."""
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        """AdamW."""
        return torch.optim.AdamW(self.parameters())


def rows() -> dict[str, Callable[[], Prediction]]:
    """What is predicted, by name."""

    def decoder(context: int, autocast: bool) -> Callable[[], Prediction]:
        return lambda: predict(
            lambda: DecoderStep(context, autocast=autocast), decoder_batch(context), device="A100 80GB"
        )

    made = {name: decoder(context, autocast) for name, (context, autocast, _, _) in _RECORDED.items()}
    tokens = torch.randint(50_000, (4, 512))
    made["GPT-2 124M, 4 x 512, float32"] = lambda: predict(GPT2, tokens, device="A100 80GB")
    return made


def measure(make: Callable[[], Prediction]) -> dict[str, Any]:
    """One row, in a process of its own, so that its memory is its own."""

    def run() -> dict[str, Any]:
        start, busy = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        prediction = make()
        seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "allocated_mib": round(prediction.allocated_bytes / MIB, 1),
            "reserved_mib": round(prediction.reserved_bytes / MIB, 1),
            "seconds": round(seconds, 1),
            "processor_seconds": round(used.ru_utime + used.ru_stime - busy.ru_utime - busy.ru_stime, 1),
            "resident_mib": round(used.ru_maxrss / 1024),
        }

    return call_in_copy(run)


def with_truth(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row beside the recording of its model, if there is one."""
    if name not in _RECORDED:
        return row
    _, _, allocated, reserved = _RECORDED[name]
    return {
        **row,
        "real_allocated_mib": allocated,
        "real_reserved_mib": reserved,
        "allocated_off_percent": round((row["allocated_mib"] / allocated - 1) * 100, 2),
        "reserved_off_percent": round((row["reserved_mib"] / reserved - 1) * 100, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", help="names of rows, or parts of them; all by default")
    parser.add_argument("--write", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    results = {}
    for name, make in rows().items():
        if not options.rows or any(part in name for part in options.rows):
            results[name] = with_truth(name, measure(make))
            print(name, results[name], flush=True)
    if options.write:
        write_results(options.write, results)


if __name__ == "__main__":
    main()
