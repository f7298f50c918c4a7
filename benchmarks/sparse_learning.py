"""What a method of sparse training is worth: test accuracy on CIFAR-10 at the same number of weights.

    python -m benchmarks.sparse_learning [--only static rigl dsr] [--seeds 3] [--epochs 15] [--images 20000]

A small wide residual network, whose 3x3 convolutions inside blocks are sparse, learns images that are
averaged to 16x16 pixels, so that a run takes minutes on one CPU core. All methods begin with the same weights
and the same pattern and see the same batches, by seed. `dense` is the network with all its weights.

The methods move masks on dense weights here, which is the same arithmetic as compact layers and faster in so
small a network. Only differences between methods mean something: networks, images and time are far below
what the papers use. CIFAR-10 is looked for in the folder that MEMTRAIN_DATA_DIR names.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results_file import write_results
from lightning_memtrain.recipes.cifar10_wrn28_2.batches import read_batch
from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet
from lightning_memtrain.sparsity.methods.dsr import DSR
from lightning_memtrain.sparsity.methods.rigl import RigL
from lightning_memtrain.sparsity.methods.rules.layer_updates import LayerView, UpdateTime
from lightning_memtrain.sparsity.methods.rules.random_positions import sample_free_positions
from lightning_memtrain.sparsity.methods.set import SET
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.methods.static_sparse import StaticSparse
from lightning_memtrain.sparsity.methods.update_schedules import RunLength, UpdateEvery

SPARSITY, DEPTH, BATCH_SIZE, UPDATE_STEPS = 0.9, 16, 100, 50
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
METHODS: dict[str, SparseMethod | None] = {
    "dense": None,
    "static": StaticSparse(SPARSITY),
    "set": SET(SPARSITY),
    "rigl": RigL(SPARSITY),
    "dsr": DSR(SPARSITY),
}


class Masked:
    """Dense weights whose inactive entries are kept at zero, moved by a method.

    Args:
        model: its 3x3 convolutions inside blocks become sparse.
        method: moves them.
        seed: of the pattern.
        num_steps: of the run.
    """

    def __init__(self, model: nn.Module, method: SparseMethod, seed: int, num_steps: int) -> None:
        self.weights = {
            name: module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and "groups." in name and "shortcut" not in name
        }
        counts = method.counts({name: weight.shape for name, weight in self.weights.items()}, {})
        start = UpdateTime(step=0, elapsed=0, total=0, seed=seed)
        empty = torch.empty(0, dtype=torch.int64)
        self.positions = {
            name: sample_free_positions(weight.numel(), empty, counts[name], start.generator(name))
            for name, weight in self.weights.items()
        }
        self.method, self.seed = method, seed
        self.state = method.initial_state(sum(counts.values()))
        stop = 0.75 if method.default_update is None else method.default_update.stop  # type: ignore[attr-defined]
        self.ticks = UpdateEvery(UPDATE_STEPS, stop=stop).in_steps(RunLength(num_steps))
        self.dense_gradients: dict[str, Tensor] = {}
        self.zero()

    @torch.no_grad()
    def zero(self) -> None:
        """Zeros where there is no weight."""
        for name, weight in self.weights.items():
            self._active(name, weight)

    def _active(self, name: str, tensor: Tensor) -> None:
        flat, positions = tensor.view(-1), self.positions[name]
        values = flat[positions]
        flat.zero_()
        flat[positions] = values

    def before_step(self, step: int) -> None:
        """Gradients of weights only; those of all entries are kept where the method asks for them."""
        if self.method.num_candidates({"": 100}, self.method.update_time(step, self.ticks)):
            self.dense_gradients = {name: weight.grad.flatten() for name, weight in self.weights.items()}
        for name, weight in self.weights.items():
            weight.grad = weight.grad.clone()
            self._active(name, weight.grad)

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Move weights if it is time; those that went have no momentum, those that came begin at 0."""
        if not self.ticks.is_due(step):
            return
        moment = self.method.update_time(step, self.ticks, self.seed)
        layers = {name: self._layer(name, weight) for name, weight in self.weights.items()}
        update = self.method.update(layers, moment, self.state)
        self.state = update.state
        for name, change in update.changes.items():
            kept = self.positions[name][change.kept]
            momentum = optimizer.state[self.weights[name]]["momentum_buffer"]
            self.positions[name] = kept
            self._active(name, self.weights[name])
            self._active(name, momentum)
            self.positions[name] = torch.cat([kept, change.grown]).sort().values

    def _layer(self, name: str, weight: Tensor) -> LayerView:
        positions = self.positions[name]
        inactive = gradients = active_gradients = None
        if self.dense_gradients:
            is_inactive = torch.ones(weight.numel(), dtype=torch.bool)
            is_inactive[positions] = False
            inactive = is_inactive.nonzero().flatten()
            gradients, active_gradients = (self.dense_gradients[name][at] for at in (inactive, positions))
        values = weight.flatten()[positions]
        return LayerView(name, weight.shape, lambda: positions, values, inactive, gradients, active_gradients)


def read(folder: Path, files: list[str], num_images: int) -> tuple[Tensor, Tensor]:
    """The first images, averaged to 16x16 and normalised, and their labels."""
    parts = [read_batch(folder / file) for file in files]
    images = torch.cat([torch.tensor(images) for images, _ in parts])[:num_images]
    labels = torch.cat([torch.tensor(labels) for _, labels in parts])[:num_images]
    mean, std = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (MEAN, STD))
    return F.avg_pool2d((images.view(-1, 3, 32, 32) / 255 - mean) / std, 2), labels


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to two pixels, and mirrored half of the time."""
    count, _, height, width = images.shape
    shifts = torch.randint(0, 5, (2, count, 1), generator=generator)
    flip = torch.randint(0, 2, (count, 1), generator=generator).bool()
    columns = torch.arange(width).expand(count, -1)
    columns = shifts[1] + torch.where(flip, columns.flip(1), columns)
    rows = shifts[0] + torch.arange(height)
    padded = F.pad(images, [2] * 4)
    at = torch.arange(count)[:, None, None]
    return padded[at, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def run(name: str, seed: int, data: tuple[Tensor, ...], num_epochs: int) -> dict[str, Any]:
    """Train, and test once at the end."""
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    model = WideResNet(DEPTH, 1)
    num_steps = num_epochs * (len(images) // BATCH_SIZE)
    method = METHODS[name]
    masked = None if method is None else Masked(model, method, seed, num_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    generator, step, start = torch.Generator().manual_seed(seed), 0, time.perf_counter()
    for _ in range(num_epochs):
        model.train()
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            loss = F.cross_entropy(model(augmented(images[chosen], generator)), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            step += 1
            if masked is not None:
                masked.before_step(step)
            optimizer.step()
            schedule.step()
            if masked is not None:
                masked.zero()
                masked.after_step(step, optimizer)
    model.eval()
    with torch.no_grad():
        scores = torch.cat([model(part) for part in test_images.split(500)])
    accuracy = (scores.argmax(1) == test_labels).float().mean().item() * 100
    row = {"test_percent": round(accuracy, 2), "seconds": round(time.perf_counter() - start)}
    if masked is not None:
        row["nnz"] = {layer: positions.numel() for layer, positions in masked.positions.items()}
    print(name, seed, row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, default=20_000)
    given = parser.parse_args()
    if given.seeds < 2:
        parser.error(
            f"--seeds must be at least 2, since results are compared with their spread: {given.seeds}"
        )
    folder = Path(os.environ.get("MEMTRAIN_DATA_DIR", "data")) / "cifar-10-batches-py"
    train = read(folder, [f"data_batch_{i}" for i in range(1, 6)], given.images)
    data = (*train, *read(folder, ["test_batch"], 10_000))
    # One seed of all methods after the other, so that whatever is finished can be compared.
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in given.only}
    for seed in range(given.seeds):
        for name in given.only:
            rows[name].append(run(name, seed, data, given.epochs))
        if seed > 0:
            write_results("sparse_learning", summary(rows, vars(given)))


def summary(rows: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> dict[str, Any]:
    """Means, spreads, and whether dynamic methods are above the static pattern by more than the spread."""
    accuracies = {name: [row["test_percent"] for row in runs] for name, runs in rows.items()}
    means = {name: statistics.mean(values) for name, values in accuracies.items()}
    spread = {name: statistics.stdev(values) for name, values in accuracies.items()}
    result: dict[str, Any] = {
        "settings": settings | {"sparsity": SPARSITY, "network": f"WRN-{DEPTH}-1", "image_size": 16},
        "test_percent": accuracies,
        "mean": {name: round(value, 2) for name, value in means.items()},
        "standard_deviation": {name: round(value, 2) for name, value in spread.items()},
        "seconds": {name: [row["seconds"] for row in runs] for name, runs in rows.items()},
        "nnz_of_seed_0": {name: runs[0]["nnz"] for name, runs in rows.items() if "nnz" in runs[0]},
    }
    if "static" in rows:
        result["above_static"] = {
            name: {
                "by_percent_points": round(means[name] - means["static"], 2),
                "more_than_spread": means[name] - means["static"] > spread[name] + spread["static"],
            }
            for name in rows
            if name not in ("dense", "static")
        }
    return result


if __name__ == "__main__":
    main()
