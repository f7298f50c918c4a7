"""Every error of construction and of setup, word by word."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_memtrain.compat.private_names import MissingNameError
from lightning_memtrain.microbatching import Microbatching, training_loop
from lightning_memtrain.microbatching.automatic_size.size_choice import AutoSize
from lightning_memtrain.microbatching.microbatching_validation import validate_run
from lightning_memtrain.microbatching.splitting.chunks import FixedSplit
from tests.helpers.trainers import assert_training_loop_is_as_found, quiet_trainer


def refuses(message: str, error: type[Exception] = MisconfigurationException) -> Any:
    return pytest.raises(error, match=f"^{re.escape(message)}$")


# ---------------------------------------------------------------------- construction


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_microbatches": 2, "microbatch_size": 4},
        {"num_microbatches": "auto", "microbatch_size": 4},
    ],
)
def test_either_a_number_or_a_size_is_needed(given: dict[str, Any]):
    got = {"num_microbatches": None, "microbatch_size": None} | given
    message = (
        "`Microbatching` needs either `num_microbatches` or `microbatch_size`, but got "
        f"num_microbatches={got['num_microbatches']} and microbatch_size={got['microbatch_size']}. "
        'Give one of them; microbatch_size="auto" finds the size by itself.'
    )
    with refuses(message):
        Microbatching(**given)


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "3"])
@pytest.mark.parametrize("name", ["num_microbatches", "microbatch_size", "grow_after_batches"])
def test_counts_are_positive_whole_numbers(name: str, value: Any):
    otherwise = "" if name == "grow_after_batches" else ' or "auto"'
    message = (
        f"`Microbatching({name})` must be an integer of at least 1{otherwise}, but got {name}={value!r}. "
        "Use a positive whole number."
    )
    given = {name: value} if name != "grow_after_batches" else {name: value, "microbatch_size": "auto"}
    with refuses(message):
        Microbatching(**given)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("loss_reduction", "none", "'mean' or 'sum'"),
        ("batchnorm", "frozen", "'pooled' or 'synchronized' or 'chunk'"),
    ],
)
def test_choices_are_listed(name: str, value: str, expected: str):
    message = f"`Microbatching({name})` must be {expected}, but got {name}={value!r}. Use one of them."
    with refuses(message):
        Microbatching(num_microbatches=2, **{name: value})


def test_sums_are_not_weighed():
    message = (
        "`Microbatching(weight_fn)` weighs means, but got loss_reduction='sum', where losses are added "
        "as they are. Leave one of them out."
    )
    with refuses(message):
        Microbatching(num_microbatches=2, loss_reduction="sum", weight_fn=len)


def test_a_limit_is_for_auto():
    message = (
        "`Microbatching(limit)` needs microbatch_size='auto', but got limit='4GiB' with microbatch_size=8. "
        "Leave out the limit, or let it choose the size."
    )
    with refuses(message):
        Microbatching(microbatch_size=8, limit="4GiB")


@pytest.mark.parametrize("limit", ["4 gigs", 0, True, "-1GiB", 1.0])
def test_a_limit_is_a_number_of_bytes(limit: Any):
    message = (
        "`Microbatching(limit)` must be a number of bytes, at least 1, a text such as '4GiB' or '512 MiB', "
        "or a share of the device's memory as a float greater than 0 and less than 1, such as 0.9, but got "
        f"limit={limit!r}. The units are "
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Microbatching(microbatch_size="auto", limit=limit)


# ---------------------------------------------------------------------- setup


class Manual(BoringModel):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class FetchesItself(BoringModel):
    def training_step(self, dataloader_iter: Any) -> Any:
        raise AssertionError("never called")


class SplitsBatches(SingleDeviceStrategy):
    """Accumulates by itself, as DeepSpeed does."""

    @property
    def handles_gradient_accumulation(self) -> bool:
        return True


def refuse_fit(folder: Path, message: str, model: LightningModule, *callbacks: Any, **options: Any) -> None:
    trainer = quiet_trainer(folder, *callbacks, limit_train_batches=1, limit_val_batches=0, **options)
    with refuses(message):
        trainer.fit(model)
    assert trainer.global_step == 0
    assert_training_loop_is_as_found(trainer)


def test_manual_optimization_is_refused(tmp_path: Path):
    message = (
        "`Microbatching` needs automatic optimization, but got a model with automatic_optimization=False, "
        "whose `training_step` calls backward and the optimizer itself. Split the batch in that method, or "
        "return the loss and let Lightning optimize."
    )
    refuse_fit(tmp_path, message, Manual(), Microbatching(num_microbatches=2))


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter` step flavor")
def test_a_step_that_fetches_batches_is_refused(tmp_path: Path):
    message = (
        "`Microbatching` needs `training_step(batch, batch_idx)`, but got `training_step(dataloader_iter)`, "
        "which fetches batches itself so that they cannot be split. Take the batch as an argument."
    )
    refuse_fit(tmp_path, message, FetchesItself(), Microbatching(num_microbatches=2))


def test_a_strategy_that_splits_batches_is_refused(tmp_path: Path):
    message = (
        "`Microbatching` needs a strategy that leaves backward to Lightning, but got SplitsBatches, which "
        "splits batches itself. Use its own setting, e.g. DeepSpeed's train_micro_batch_size_per_gpu."
    )
    strategy = SplitsBatches(device=torch.device("cpu"))
    refuse_fit(tmp_path, message, BoringModel(), Microbatching(num_microbatches=2), strategy=strategy)


def test_it_is_given_once(tmp_path: Path):
    message = "`Microbatching` must be given once, but got 2 callbacks of it. Leave one."
    given = [Microbatching(num_microbatches=2), Microbatching(microbatch_size=2)]
    given[1].__class__ = type("Other", (Microbatching,), {})  # Lightning refuses two of one class by itself
    refuse_fit(tmp_path, message, BoringModel(), *given)


def test_the_cpu_needs_a_limit(tmp_path: Path):
    message = (
        '`Microbatching(microbatch_size="auto")` needs a limit on cpu, which does not tell what it has free, '
        'but got limit=None. Give one, e.g. limit="4GiB".'
    )
    refuse_fit(tmp_path, message, BoringModel(), Microbatching(microbatch_size="auto"))


def test_other_stages_are_not_looked_at(tmp_path: Path):
    trainer = quiet_trainer(tmp_path, Microbatching(microbatch_size="auto"), limit_val_batches=1)
    trainer.validate(Manual(), verbose=False)


# ---------------------------------------------------------------------- several ranks


def faked(strategy: type, **attributes: Any) -> Any:
    """A strategy that was never set up, so that one process is enough."""
    given = {"__init__": lambda self: None, "root_device": torch.device("cpu"), "_ddp_kwargs": {}}
    return type(strategy.__name__, (strategy,), given | attributes)()


def two_ranks(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, world_size=2)


RANKS = {
    "FSDP": (faked(FSDPStrategy), BoringModel(), "FSDPStrategy, which communicates in forward and backward"),
    "static graph": (
        faked(DDPStrategy, _ddp_kwargs={"static_graph": True}),
        BoringModel(),
        "static_graph=True, which communicates in every backward",
    ),
    "SyncBatchNorm": (
        faked(DDPStrategy),
        nn.SyncBatchNorm(3),
        "SyncBatchNorm, which communicates in forward and backward",
    ),
}


@pytest.mark.parametrize(("strategy", "network", "reason"), RANKS.values(), ids=RANKS.keys())
def test_auto_needs_ranks_that_can_stop_alone(strategy: Any, network: nn.Module, reason: str):
    model = BoringModel()
    model.layer = network
    message = (
        '`Microbatching(microbatch_size="auto")` must be able to stop a rank that is out of memory while the '
        f"others go on, but got {reason}: they would wait forever. Give num_microbatches or a size."
    )
    trainer = two_ranks(strategy)
    with refuses(message):
        validate_run(trainer, model, AutoSize(10**9, 100))
    validate_run(trainer, model, FixedSplit(None, 4))
    trainer.world_size = 1
    validate_run(trainer, model, AutoSize(10**9, 100))


def test_auto_accepts_plain_ddp():
    validate_run(two_ranks(faked(DDPStrategy)), BoringModel(), AutoSize(10**9, 100))


# ---------------------------------------------------------------------- another Lightning


def test_a_training_loop_with_other_methods_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_AutomaticOptimization, "_training_step", lambda self, batch: None)
    message = (
        f"lightning {lightning.__version__} has no `lightning.pytorch.Trainer.fit_loop.epoch_loop."
        "automatic_optimization._training_step(kwargs)`, which is needed to run a batch in microbatches. "
    )
    with pytest.raises(MissingNameError, match=f"^{re.escape(message)}"):
        quiet_trainer(tmp_path, Microbatching(num_microbatches=2)).fit(BoringModel())


@pytest.mark.parametrize(
    ("loop", "lacks"),
    [
        (SimpleNamespace(_results={}), "automatic_optimization._make_closure(kwargs, optimizer, batch_idx)"),
        (
            SimpleNamespace(automatic_optimization=_AutomaticOptimization(SimpleNamespace())),
            "_results",
        ),
        (None, "automatic_optimization._make_closure(kwargs, optimizer, batch_idx)"),
    ],
)
def test_a_training_loop_of_another_shape_is_refused(loop: Any, lacks: str):
    with pytest.raises(
        MissingNameError, match=f"Trainer.fit_loop.epoch_loop.{re.escape(lacks)}`, which is needed"
    ):
        training_loop.check(SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=loop)))


def test_waiting_with_reductions_is_a_yes_or_no() -> None:
    message = (
        "`Microbatching(sync_each_chunk)` must be True or False, but got sync_each_chunk='last'. Use one of "
        "them."
    )
    with refuses(message):
        Microbatching(num_microbatches=2, sync_each_chunk="last")  # type: ignore[arg-type]


def test_waiting_with_reductions_needs_sharded_modules(tmp_path: Path) -> None:
    message = (
        "`Microbatching(sync_each_chunk=False)` needs a model that `fully_shard` was applied to (FSDP2, "
        "`ModelParallelStrategy`), but got none with SingleDeviceStrategy. Leave it out: under ddp gradients "
        "are reduced once per batch in any case."
    )
    with refuses(message):
        quiet_trainer(tmp_path, Microbatching(num_microbatches=2, sync_each_chunk=False)).fit(BoringModel())
