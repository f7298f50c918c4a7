"""A step on CPU tensors without data, where there can be no twin of the GPU: less is known then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import FakeTensorMode
from lightning_memtrain.planning.prediction.twin.twin_run import TwinRun, make_model
from lightning_memtrain.report import MemoryReport, environment
from lightning_memtrain.tracing.step.fake_step import FakeStep

#: What such a prediction does not know.
NOT_KNOWN = (
    "Counted on CPU tensors without data: not known are what the GPU's kernels hold (masks of dropout, "
    "scores of attention), autocast, what callbacks and plugins of the trainer change, workspaces of "
    "libraries, and what torch's allocator makes of it: what is reserved is what tensors hold"
)


def run_without_twin(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    data: Any,
) -> TwinRun:
    """Count one training step without data. Call it in a process of its own.

    Args:
        model: what is trained, or what makes it.
        data: a loader of batches, or a data module; ``None`` for the model's own loader.

    Returns:
        What was counted.
    """
    if not isinstance(model, pl.LightningModule):
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = make_model(model)
    batch = next(iter(_loader(model, data)))
    model.log = model.log_dict = lambda *args, **kwargs: None  # type: ignore[method-assign, assignment]
    optimizers = list(_optimizers(model.configure_optimizers()))
    step = FakeStep(model, model.training_step, (batch, 0), optimizers)
    with step.watched() as ledger:
        step.run()
    breakdown = ledger.breakdown()
    report = MemoryReport(
        model=type(model).__name__,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        created="",
        environment=environment(torch.device("cpu")),
        stages={"fit": breakdown},
    )
    peak_bytes = breakdown.ledger_peak_bytes
    return TwinRun(report, peak_bytes, peak_bytes, 0, {})


def _loader(model: pl.LightningModule, data: Any) -> Iterable[Any]:
    if isinstance(data, pl.LightningDataModule):
        data.prepare_data()
        data.setup("fit")
    loader: Iterable[Any] = (
        model.train_dataloader() if data is None else getattr(data, "train_dataloader", lambda: data)()
    )
    return loader


def _optimizers(given: Any) -> Iterable[Optimizer]:
    if isinstance(given, Optimizer):
        yield given
    elif isinstance(given, Mapping):
        yield from _optimizers(given["optimizer"])
    elif isinstance(given, (list, tuple)):
        # Pairs of lists are optimizers and schedulers.
        first = given[0] if len(given) == 2 and isinstance(given[0], (list, tuple)) else given
        for one in first:
            yield from _optimizers(one)
