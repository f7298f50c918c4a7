"""Plans beside what they lead to: peaks of the allocator, times of steps, and the best of a grid.

    python -m benchmarks.planning [--models NAME...] [--limits SHARE...] [--grid] [--write NAME]

Each plan is made within a share of the plain peak, and for 0 within its own floor. The chosen way is run for
real, on the CPU with one thread; seconds are those of the processor. With ``--grid`` microbatch sizes and
recomputation policies are run for real as well, and the fastest that keeps the limit is named.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.results_file import write_results
from lightning_memtrain import ActivationCheckpointing, MemoryProfiler, Microbatching
from lightning_memtrain.core import MIB
from lightning_memtrain.planning.fit.search import search
from lightning_memtrain.planning.fit.way import TechniqueSettings, Way
from lightning_memtrain.planning.prediction.forked import call_in_copy
from lightning_memtrain.tracing.device import Device

_STEPS = 5
_ALLOWED = ("batchnorm-statistics",)


class _Step(pl.LightningModule):
    """A network with its loss and its optimizer."""

    def __init__(
        self, net: nn.Module, loss: Callable[..., Any], optimizer: Callable[..., Any], **options: Any
    ) -> None:
        super().__init__()
        self.net, self._loss, self._optimizer, self._options = net, loss, optimizer, options

    def training_step(self, batch: Any, index: int) -> Any:
        """The loss."""
        return self._loss(self.net, *batch)

    def configure_optimizers(self) -> Any:
        """As it was given."""
        return self._optimizer(self.parameters(), **self._options)


def _classify(net: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(inputs), labels)


def _next_token(net: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def _wide_resnet() -> tuple[pl.LightningModule, Any]:
    from lightning_memtrain.recipes.cifar10_wrn28_2.model import WideResNet

    net = WideResNet(depth=28, widen_factor=2, num_classes=10)
    batch = torch.randn(100, 3, 32, 32), torch.randint(0, 10, (100,))
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    return _Step(net, _classify, torch.optim.SGD, **options), batch


class _LanguageModel(nn.Module):
    def __init__(self, width: int, num_layers: int, num_words: int) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.embed = nn.Embedding(num_words, width)
        self.encoder = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_words)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.encoder(self.embed(tokens)))


def _language_model(width: int, num_layers: int, num_words: int, shape: tuple[int, int]) -> Any:
    net = _LanguageModel(width, num_layers, num_words)
    return _Step(net, _next_token, torch.optim.AdamW), (torch.randint(num_words, shape),)


def _layers() -> tuple[pl.LightningModule, Any]:
    blocks = (nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.LayerNorm(128)) for _ in range(8))
    batch = torch.randn(256, 128), torch.randint(0, 128, (256,))
    return _Step(nn.Sequential(*blocks), _classify, torch.optim.SGD, lr=0.1), batch


MODELS: dict[str, Callable[[], tuple[pl.LightningModule, Any]]] = {
    "chain of layers, batch 256": _layers,
    "language model 0.9 M, 16 x 64": lambda: _language_model(128, 4, 500, (16, 65)),
    "GPT 4.8 M, 32 x 128": lambda: _language_model(256, 6, 256, (32, 129)),
    "WRN-28-2, batch 100": _wide_resnet,
}


def made(one: Any) -> Any:
    """The object that a technique's settings, or a nested ``class_path``, name."""
    if isinstance(one, TechniqueSettings):
        one = {"class_path": one.class_path, "init_args": one.init_args}
    if not isinstance(one, dict) or "class_path" not in one:
        return one
    module, _, name = one["class_path"].rpartition(".")
    arguments = one.get("init_args") or {}
    return getattr(importlib.import_module(module), name)(
        **{key: made(value) for key, value in arguments.items()}
    )


class _Clock(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self._start = time.process_time()

    def on_train_batch_end(self, *args: Any) -> None:
        self.seconds.append(time.process_time() - self._start)


class _Repeated(torch.utils.data.IterableDataset[Any]):
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __iter__(self) -> Any:
        return itertools.repeat(self._batch, _STEPS)


def run(name: str, make_callbacks: Callable[[], Sequence[pl.Callback]], measures_bytes: bool) -> float:
    """Train for real, in a copy of this process.

    Args:
        name: of the model.
        make_callbacks: makes the techniques.
        measures_bytes: whether the allocator's peak is wanted, or the seconds of the fastest step.

    Returns:
        That.
    """

    def train() -> float:
        torch.manual_seed(0)
        model, batch = MODELS[name]()
        with tempfile.TemporaryDirectory() as folder:
            watch = MemoryProfiler(every_n_steps=1, report_dir=folder) if measures_bytes else _Clock()
            trainer = pl.Trainer(
                max_steps=3 if measures_bytes else _STEPS,
                accelerator="cpu",
                logger=False,
                callbacks=[*make_callbacks(), watch],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(model, DataLoader(_Repeated(batch), batch_size=None))
            if isinstance(watch, _Clock):
                return min(watch.seconds[1:])
            assert watch.report is not None
            return float(watch.report.stages["fit"].allocator_peak_bytes or 0)

    return call_in_copy(train)


def grid(name: str, batch_size: int) -> list[dict[str, Any]]:
    """Microbatch sizes and policies, each run for real."""
    rows = []
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= batch_size]
    for count, policy in itertools.product(counts, (None, "full", "sqrt")):

        def callbacks(count: int = count, policy: str | None = policy) -> list[pl.Callback]:
            found: list[pl.Callback] = [] if count == 1 else [Microbatching(num_microbatches=count)]
            return found if policy is None else [*found, ActivationCheckpointing(policy)]

        rows.append(
            {
                "num_microbatches": count,
                "policy": policy,
                "peak_bytes": run(name, callbacks, True),
                "seconds": run(name, callbacks, False),
            }
        )
    return rows


def measure(name: str, shares: Sequence[float], with_grid: bool) -> list[dict[str, Any]]:
    """All limits of a model."""
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    cpu = Device.named("cpu")
    plain_bytes, plain_seconds = run(name, list, True), run(name, list, False)
    others = grid(name, len(batch[0])) if with_grid else []
    rows = []
    for share in shares:
        limit_bytes = int(plain_bytes * share)
        found = search(model, batch, device=cpu, limit_bytes=limit_bytes, allow=_ALLOWED)
        row: dict[str, Any] = {
            "model": name,
            "plain_mib": round(plain_bytes / MIB, 2),
            "limit_mib": round(limit_bytes / MIB, 2),
            "plan_seconds": round(found.seconds, 1),
            "way": None if found.chosen is None else str(found.chosen),
        }
        if found.chosen is not None:
            row |= _beside_truth(name, found.chosen, limit_bytes, plain_seconds)
        fitting = [one for one in others if one["peak_bytes"] <= limit_bytes]
        if fitting:
            best = min(fitting, key=lambda one: one["seconds"])
            row["best_of_grid"] = {**best, "time": round(best["seconds"] / plain_seconds, 3)}
        rows.append(row)
        print(row, flush=True)
    return rows


def _beside_truth(name: str, way: Way, limit_bytes: int, plain_seconds: float) -> dict[str, Any]:
    def callbacks() -> list[pl.Callback]:
        return [made(one) for one in way.techniques]

    peak_bytes = run(name, callbacks, True)
    predicted_bytes, ratio = way.allocated_bytes, way.time_ratio
    assert predicted_bytes is not None
    assert ratio is not None
    return {
        "predicted_mib": round(predicted_bytes / MIB, 2),
        "real_mib": round(peak_bytes / MIB, 2),
        "keeps_limit": peak_bytes <= limit_bytes,
        "off_percent": round(100 * (predicted_bytes / peak_bytes - 1), 2),
        "predicted_time": round(ratio, 3),
        "real_time": round(run(name, callbacks, False) / plain_seconds, 3),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument("--limits", nargs="+", type=float, default=[0.8, 0.6, 0.4, 0.25, 0.15])
    parser.add_argument("--grid", action="store_true", help="run a grid for real, too")
    parser.add_argument("--write", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in arguments.models for row in measure(name, arguments.limits, arguments.grid)]
    if arguments.write:
        write_results(arguments.write, rows)


if __name__ == "__main__":
    main()
