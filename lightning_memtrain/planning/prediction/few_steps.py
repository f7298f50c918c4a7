"""A few steps of Lightning's own Trainer on tensors without data: what is the same on every device."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader

from lightning_memtrain.compat.lightning_packages import in_both, namesake
from lightning_memtrain.compat.lightning_private import MockOptimizer
from lightning_memtrain.compat.torch_private import FakeTensor
from lightning_memtrain.core import ArgumentError, is_technique
from lightning_memtrain.core.compiled_modules import is_compiled
from lightning_memtrain.planning.prediction.moving import replace_when_moved
from lightning_memtrain.precision.activations import activation_packing
from lightning_memtrain.report import MemoryReport
from lightning_memtrain.sparsity import SparseTraining, UpdateEvery

#: A model, or what makes it.
Model = pl.LightningModule | Callable[[], pl.LightningModule]

#: The first makes the optimizer's state, the second finds it, the third finds what the second left.
NUM_STEPS = 3
# More steps than any prediction takes.
_NEVER = 2**31
#: What is said where a pattern that changes by values is left as it is.
PATTERNS_LEFT_OUT = (
    "SparseTraining changes its pattern by the values of weights, which nobody knows here: what such a "
    "change takes for a while is not counted"
)


@dataclass(frozen=True)
class FewSteps:
    """What a few steps came to.

    Args:
        report: of the steps.
        allocated_bytes: most bytes in blocks of the allocator.
        reserved_bytes: most bytes that the allocator had from the device.
        workspace_bytes: what libraries keep.
        guessed: numbers that the steps asked for and nobody knows, by the line that asked.
        unmeasured: operators whose workspace is not known, and why; on a CPU.
        process_bytes: what the process has in memory beside model and batch; on a CPU.
        convolution_bytes: see :attr:`.TwinDeviceMode.convolution_bytes`.
        compiled: path of a module that the run would compile, and these steps do not; empty without one.
        left_out: what was not run, since it needs values.
    """

    report: MemoryReport
    allocated_bytes: int
    reserved_bytes: int
    workspace_bytes: int
    guessed: Mapping[str, str]
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    process_bytes: int = 0
    convolution_bytes: int = 0
    compiled: str = ""
    left_out: tuple[str, ...] = ()


def compiled_module(model: pl.LightningModule) -> str:
    """Path of the first module that a run would compile.

    Args:
        model: any.

    Returns:
        The path; empty if there is none.
    """
    return next((name or "(model)" for name, one in model.named_modules() if is_compiled(one)), "")


def needs_values(callback: object) -> bool:
    """Whether a callback changes a pattern by the values of weights.

    Args:
        callback: any.

    Returns:
        ``True`` for sparse training, but for that of a pattern that stays.
    """
    return isinstance(callback, SparseTraining) and callback.update_schedule is not None


@contextlib.contextmanager
def quiet_folder() -> Iterator[str]:
    """A folder for a report that nobody reads, while nothing is printed.

    Yields:
        The folder.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        yield folder


def few_steps_trainer(
    model: pl.LightningModule,
    place: Mapping[str, Any],
    options: Mapping[str, Any],
    watch: pl.Callback,
    num_steps: int = NUM_STEPS,
    max_epochs: int | None = None,
    *,
    knows_values: bool = True,
) -> pl.Trainer:
    """A trainer that trains for a few steps.

    Args:
        model: what it will train; the trainer is of the same package.
        place: arguments of Trainer that say on which device, as which rank.
        options: other arguments of Trainer.
        watch: watches the steps, after all other callbacks.
        num_steps: how many.
        max_epochs: in which they are, at most; ``None`` for as many as there are steps.
        knows_values: whether weights have values.

    Returns:
        The trainer.
    """
    options = dict(options)
    callbacks = [*options.pop("callbacks", ()), watch]
    # A module that steps by itself may do so several times a batch, or never.
    most_steps = num_steps if model.automatic_optimization else -1
    for callback in callbacks:
        rehearse = getattr(callback, "rehearse", None)
        if needs_values(callback) and not knows_values:
            callback.update_schedule = UpdateEvery(_NEVER, stop=1.0)
        elif is_technique(callback) and callable(rehearse):
            rehearse()
    return namesake(pl.Trainer, model)(
        **place,
        max_steps=most_steps,
        # One epoch has too few batches where the loader has.
        max_epochs=num_steps if max_epochs is None else max_epochs,
        limit_train_batches=num_steps * options.get("accumulate_grad_batches", 1),
        logger=namesake(DummyLogger, model)(),
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )


def is_module(model: Model) -> TypeGuard[pl.LightningModule]:
    """Whether it is a LightningModule of either package, not what makes one."""
    return isinstance(model, in_both(pl.LightningModule))


def made_module(factory: Callable[[], Any]) -> pl.LightningModule:
    """What a function makes, if it is what can be trained.

    Args:
        factory: the function.

    Returns:
        The module.

    Raises:
        ArgumentError: if it is something else.
    """
    model = factory()
    if not is_module(model):
        raise ArgumentError(
            "`predict(model)` must be a LightningModule or a function that makes one, but the function "
            f"returned {type(model).__name__}. Return the LightningModule."
        )
    return model


def refuse_no_optimizer(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Refuse a run that trains nothing.

    Args:
        trainer: that has fitted.
        model: what was trained.

    Raises:
        ArgumentError: if the model has no optimizer.
    """
    # Lightning makes one that does nothing where there is none.
    has_optimizer = any(not isinstance(one, MockOptimizer) for one in trainer.optimizers)
    if model.automatic_optimization and not has_optimizer:
        raise ArgumentError(
            f"`predict(model)` needs a model with an optimizer, but `{type(model).__name__}."
            "configure_optimizers` returns none, so that nothing would be trained. Return one from there, "
            "or, with LightningCLI, name one under `optimizer`."
        )


def prepare_process() -> None:
    """What else has to be as in a real run, or silent, for the rest of this process."""
    replace_when_moved()
    _load_in_this_process()
    # Tensors without data keep their bytes as plain ones do.
    packing: Any = activation_packing
    packing.PLAIN_TENSORS = (*packing.PLAIN_TENSORS, FakeTensor)
    torch.autograd.set_multithreading_enabled(False)  # all of a step is watched in this thread
    warnings.simplefilter("ignore")  # the real run gives them
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Torch writes many lines where an operator has no rule for tensors without data.
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)


def _load_in_this_process() -> None:
    """Let data loaders do without workers and pinned memory, for the sake of three batches."""
    loader: Any = DataLoader
    make = loader.__init__

    @functools.wraps(make)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(make).bind(self, *args, **kwargs).arguments
        for name in ("self", "num_workers", "pin_memory", *_OF_WORKERS):
            given.pop(name, None)
        make(self, **given)

    loader.__init__ = made


_OF_WORKERS = ("prefetch_factor", "persistent_workers", "multiprocessing_context", "timeout")
