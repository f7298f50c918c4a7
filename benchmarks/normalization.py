"""What a normalisation that sees one image at a time is worth: test accuracy on CIFAR-10, beside batch norm.

    python -m benchmarks.normalization [--only batch group_4_centered] [--seeds 1 2] [--epochs 3]

WRN-16-1 learns all 50,000 images, averaged to 16x16 pixels, by the recipe's optimizer and schedule, so that a
run takes minutes on one CPU core. By seed, all begin with the same weights and see the same batches. Batches
are not split: without batch norm, splitting changes nothing (tested), and batch norm gets the whole batch.

batch: batch norm. group_N: group norm in groups of N channels; centered: the weights of each filter keep a
mean of zero (`center_weights_`); standardized: weights are standardised within forward (Qiao et al. 2019).

Every run is written as it ends; runs with the same settings that are in the file already are kept, and not
run again. CIFAR-10 is looked for in the folder that MEMTRAIN_DATA_DIR names.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks.results_file import RESULTS, write_results
from benchmarks.sparse_learning import augmented, read
from lightning_memtrain.microbatching import GroupNorm, center_weights_, replace_batchnorm
from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet
from lightning_memtrain.recipes.cifar10_wrn28_2.module import step_decay

NAME, DEPTH, WIDEN_FACTOR, BATCH_SIZE = "normalization_cifar10", 16, 1, 100
MILESTONES, DECAY = (0.3, 0.6, 0.8), 0.2
VARIANTS = (
    "batch",
    *(f"group_{size}{how}" for how in ("", "_centered", "_standardized") for size in (4, 16)),
)


class Standardized(nn.Module):
    """Filters of mean 0 and of norm 1, times a trained factor that begins at the norm that they had."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(self._norm(self._centered(weight.detach())))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the convolution uses."""
        centered = self._centered(weight)
        return centered * (self.gain / self._norm(centered))

    @staticmethod
    def _centered(weight: Tensor) -> Tensor:
        return weight - weight.mean((1, 2, 3), keepdim=True)

    @staticmethod
    def _norm(weight: Tensor) -> Tensor:
        return weight.square().sum((1, 2, 3), keepdim=True).add(1e-8).sqrt()


def network(variant: str, seed: int) -> WideResNet:
    """The network of a variant; the same weights for all of a seed."""
    torch.manual_seed(seed)
    model = WideResNet(DEPTH, WIDEN_FACTOR)
    if variant.startswith("group"):
        replace_batchnorm(model, GroupNorm(channels_per_group=int(variant.split("_")[1])))
    if variant.endswith("standardized"):
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d) and layer.in_channels > 3:
                parametrize.register_parametrization(layer, "weight", Standardized(layer.weight))
    return model.to(memory_format=torch.channels_last)


def run(variant: str, seed: int, data: tuple[Tensor, ...], num_epochs: int) -> dict[str, Any]:
    """Train, and test after every epoch."""
    images, labels, test_images, test_labels = data
    model = network(variant, seed)
    center = variant.endswith("centered")
    num_steps = num_epochs * (len(images) // BATCH_SIZE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    factor = step_decay([round(fraction * num_steps) for fraction in MILESTONES], DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator().manual_seed(seed)
    curve, start, start_cpu = [], time.perf_counter(), time.process_time()
    if center:
        center_weights_(model)
    for _ in range(num_epochs):
        model.train()
        total = torch.zeros(())
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            batch = augmented(images[chosen], generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if center:
                center_weights_(model)
            total += loss.detach()
        model.eval()
        with torch.no_grad():
            scores = torch.cat([model(part) for part in test_images.split(500)])
        accuracy = (scores.argmax(1) == test_labels).float().mean().item() * 100
        steps = len(images) // BATCH_SIZE
        curve.append({"train_loss": round(total.item() / steps, 4), "test_percent": round(accuracy, 2)})
        print(variant, seed, curve[-1], flush=True)
    return {
        "variant": variant,
        "seed": seed,
        "epochs": num_epochs,
        "test_percent": curve[-1]["test_percent"],
        "curve": curve,
        "seconds": round(time.perf_counter() - start),
        "processor_seconds": round(time.process_time() - start_cpu),
        "commit": _commit(),
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def known_runs() -> list[dict[str, Any]]:
    """Those of earlier calls."""
    path = RESULTS / f"{NAME}.json"
    return json.loads(path.read_text())["results"]["runs"] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ.get("MEMTRAIN_DATA_DIR", "data")) / "cifar-10-batches-py"
    train = read(folder, [f"data_batch_{i}" for i in range(1, 6)], 50_000)
    data = (*train, *read(folder, ["test_batch"], 10_000))
    for seed in given.seeds:
        for variant in given.only:
            runs = known_runs()
            wanted = {"variant": variant, "seed": seed, "epochs": given.epochs}
            if any(wanted.items() <= one.items() for one in runs):
                continue
            runs.append(run(variant, seed, data, given.epochs))
            write_results(NAME, {"settings": _SETTINGS, "runs": runs})


_SETTINGS = {
    "network": f"WRN-{DEPTH}-{WIDEN_FACTOR}",
    "image_size": 16,
    "images": 50_000,
    "batch_size": BATCH_SIZE,
    "optimizer": "SGD, Nesterov momentum 0.9, weight decay 5e-4 on all parameters",
    "lr": f"0.1, times {DECAY} after {MILESTONES} of the run",
    "threads": 1,
    "load": "other jobs shared the machine: compare accuracies, not seconds",
}


if __name__ == "__main__":
    main()
