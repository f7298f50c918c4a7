"""Whether loading and augmenting CIFAR-10 keeps up with training WRN-28-2: images per second of both.

    python -m benchmarks.cifar10_input_pipeline [--steps 5] [--batch-size 100] [--threads 2]

A turn is one training step on a batch that is there already, and ``--batches`` batches from the recipe's
loader, in the training process (``num_workers=0``): indexing, crop, flip and normalisation of noise in the
shape of CIFAR-10. Times are CPU seconds of all threads; the median of the turns counts.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.models import wide_resnet_step
from benchmarks.results_file import write_results
from lightning_memtrain.recipes.cifar10_wrn28_2.data import CIFAR10DataModule, LabelledImages


class Noise(CIFAR10DataModule):
    """As many images as CIFAR-10 has, of the same shape."""

    def read(self, train: bool) -> LabelledImages:
        """Noise, whichever set is asked for."""
        images = torch.randint(0, 256, (50_000, 3, 32, 32), dtype=torch.uint8)
        return LabelledImages(images, torch.randint(0, 10, (50_000,)))


def cpu_seconds(run: Callable[[], object]) -> float:
    before = time.process_time()
    run()
    return time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batches", type=int, default=100, help="batches loaded in each turn")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    data = Noise(batch_size=options.batch_size)
    data.setup("fit")
    endless = itertools.chain.from_iterable(iter(data.train_dataloader, None))
    step = wide_resnet_step("cpu", options.batch_size)
    loading, training = [], []
    for turn in range(options.steps + 1):
        load_s = cpu_seconds(lambda: [next(endless) for _ in range(options.batches)]) / options.batches
        train_s = cpu_seconds(step)
        if turn:  # the first turn warms up
            loading.append(options.batch_size / load_s)
            training.append(options.batch_size / train_s)
    results = {
        "loading_images_per_cpu_s": round(statistics.median(loading)),
        "training_images_per_cpu_s": round(statistics.median(training)),
        "loading_over_training": round(
            statistics.median(a / b for a, b in zip(loading, training, strict=True)), 1
        ),
    }
    print(results)
    write_results("cifar10_input_pipeline", results)


if __name__ == "__main__":
    main()
