"""Low precision on real images: the recipe's variants beside float32, by their losses step for step.

    MEMTRAIN_DATA_DIR=... python -m benchmarks.precision_cifar10 [--only float32 bf16 ...]
        [--depth 16] [--batch-size 50] [--steps 400]

Each variant of `cifar10_wrn28_2` trains from the same weights on the same batches of CIFAR-10. Training loss
is the mean over 25 steps; validation loss and accuracy are over 1,000 images that are in no batch. With
`--only`, rows of an earlier run with the same settings stay in its results. A CPU without float16 arithmetic
takes some 6 s for a step of `fp16`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.charts import save_chart
from benchmarks.results_file import RESULTS, write_results

VARIANTS = {
    "float32": [],
    "bf16": ["--variant=bf16"],
    "fp16": ["--variant=fp16"],
    "int8": ["--variant=int8"],
    "all": ["--variant=all"],
}
NUM_VAL_IMAGES = 1000
WINDOW = 25


def train(arguments: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """One run by the command line; what its logger wrote."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                *(sys.executable, "-m", "lightning_memtrain.cli", "run", "cifar10_wrn28_2", *arguments),
                f"--run-dir={folder}",
                f"--model.depth={options.depth}",
                f"--data.batch_size={options.batch_size}",
                f"--data.num_val_images={NUM_VAL_IMAGES}",
                f"--trainer.max_steps={options.steps}",
                f"--trainer.val_check_interval={options.steps}",
                "--trainer.num_sanity_val_steps=0",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_checkpointing=false",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        (path,) = Path(folder).rglob("metrics.csv")
        with path.open() as file:
            rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    validated = [row for row in rows if row.get("val/loss")][-1]
    peaks = [float(row["memory/peak_mib"]) for row in rows if row.get("memory/peak_mib")]
    return {
        "train_loss": [
            round(statistics.mean(losses[at : at + WINDOW]), 4) for at in range(0, len(losses), WINDOW)
        ],
        "val_loss": round(float(validated["val/loss"]), 4),
        "val_accuracy": round(float(validated["val/accuracy"]), 4),
        "peak_mib": round(max(peaks), 2),
    }


def main() -> None:
    """Train all, print and write down what they reached, draw their losses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    name = f"precision_cifar10_depth{options.depth}_batch{options.batch_size}_steps{options.steps}"
    earlier = RESULTS / f"{name}.json"
    results: dict[str, Any] = json.loads(earlier.read_text())["results"] if earlier.exists() else {}
    for variant in options.only:
        results[variant] = train(VARIANTS[variant], options)
        print(variant, results[variant], flush=True)
        write_results(name, {v: results[v] for v in VARIANTS if v in results})
    curves = {
        variant: [(WINDOW * (at + 1), loss) for at, loss in enumerate(result["train_loss"])]
        for variant, result in results.items()
    }
    save_chart(name, curves, "step", f"training loss, mean of {WINDOW} steps")


if __name__ == "__main__":
    main()
