"""What half precision with stochastic rounding costs in a model of many tensors, over Lightning's own.

    python -m benchmarks.precision_tensors [--repeats 5]

500 linear layers, 1,000 parameter tensors, under SGD in Lightning's Trainer: processor time of a training
step with `LowPrecision("bf16-true")` over that with `precision="bf16-true"`, which steps and rounds in
bfloat16. Fits take turns; the median of the ratios counts. One thread.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.ledger_overhead import keep_the_heap
from benchmarks.results_file import write_results
from lightning_memtrain import LowPrecision

NUM_LAYERS, BATCH_SIZE, NUM_STEPS = 500, 8, 8
WIDTHS = (16, 64, 128)
MOST = 3.0


class Deep(LightningModule):
    """Many small layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(NUM_LAYERS))
        self.seconds: list[float] = []
        self._start = 0.0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """A step through all layers."""
        for layer in self.layers:
            batch = batch + 0.01 * layer(batch)
        return batch.float().square().mean()

    def configure_optimizers(self) -> Any:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop it."""
        self.seconds.append(time.process_time() - self._start)


def seconds_per_step(width: int, **options: Any) -> float:
    torch.manual_seed(0)
    model = Deep(width)
    trainer = Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, DataLoader(torch.randn(NUM_STEPS * BATCH_SIZE, width), batch_size=BATCH_SIZE))
    return statistics.median(model.seconds[2:])  # the first ones warm up


def measure(width: int, repeats: int) -> dict[str, Any]:
    plain, ours = [], []
    for _ in range(repeats):
        plain.append(seconds_per_step(width, precision="bf16-true"))
        ours.append(seconds_per_step(width, plugins=[LowPrecision("bf16-true")]))
    ratio = statistics.median(own / other for own, other in zip(ours, plain, strict=True))
    return {
        "weights": NUM_LAYERS * width * (width + 1),
        "bf16_true_ms": round(1e3 * statistics.median(plain), 1),
        "low_precision_ms": round(1e3 * statistics.median(ours), 1),
        "low_precision_over_bf16_true": round(ratio, 2),
        "bar": MOST,
        "within_bar": ratio <= MOST,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    keep_the_heap()
    results = {}
    for width in WIDTHS:
        results[f"width {width}"] = measure(width, options.repeats)
        print(width, results[f"width {width}"], flush=True)
    write_results("precision_tensors", results)


if __name__ == "__main__":
    main()
