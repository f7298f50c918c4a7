"""Trainers for tests: on the CPU, silent, and leaving nothing outside of the test's folder."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import lightning.pytorch
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.report import MemoryProfiler
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors

# Lightning 2.6 with torch 2.13, and Lightning's hints on performance.
LIGHTNING_WARNINGS = (
    "ignore:.*does not have many workers",
    "ignore:.*LeafSpec",
    "ignore:The number of training batches",
)


try:
    import pytorch_lightning
except ImportError:  # as with the lowest versions
    pytorch_lightning = None
#: Lightning under both of its names.
PACKAGES = {"lightning": lightning.pytorch} | (
    {} if pytorch_lightning is None else {"pytorch_lightning": pytorch_lightning}
)


def of(code: type, base: type) -> Any:
    """What somebody has written, who imports Lightning under this name."""
    return _class_of(code, base)()


@functools.cache
def _class_of(code: type, base: type) -> type:
    return type(code.__name__, (code, base), {"__doc__": code.__doc__})


def quiet_trainer(folder: Path, *callbacks: Any, package: Any = lightning.pytorch, **options: Any) -> Trainer:
    options = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    } | options
    trainer: Trainer = package.Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)
    return trainer


def fit(model: LightningModule, callback: MemoryProfiler, folder: Path, **options: Any) -> Trainer:
    trainer = quiet_trainer(folder, callback, **options)
    trainer.fit(model)
    return trainer


def assert_torch_is_as_found(model: torch.nn.Module) -> None:
    """No dispatch mode, saved-tensor hook, module hook or optimizer hook is left behind."""
    assert _get_current_dispatch_mode_stack() == []
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not torch._C._autograd._profiler_enabled()
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    for parameter in model.parameters():
        assert not parameter._post_accumulate_grad_hooks


def assert_training_loop_is_as_found(trainer: Trainer) -> None:
    """No method of the loop that steps the optimizer is replaced."""
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    assert not [name for name, value in vars(loop).items() if callable(value) and name.startswith("_")]


class LedgerPeaks(Callback):
    """By a ledger of its own, which knows of no probes: the most of each batch, with what was beside it."""

    def __init__(self, *, with_held: bool = True) -> None:
        self.peaks: list[int] = []
        self.with_held = with_held

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        held = HeldTensors().beside_steps(trainer, pl_module) if self.with_held else ()
        self.ledger = MemoryLedger(pl_module, trainer.optimizers, batch, held=held).__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.ledger.__exit__(None, None, None)
        self.peaks.append(self.ledger.breakdown().ledger_peak_bytes)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.ledger.__exit__(None, None, None)
