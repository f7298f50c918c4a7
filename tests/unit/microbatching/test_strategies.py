from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, StrategyRegistry
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_memtrain.microbatching import (
    MemtrainDDPStrategy,
    MemtrainFSDPStrategy,
    Microbatching,
    training_loop,
)
from lightning_memtrain.report import MemoryProfiler
from tests.helpers.trainers import quiet_trainer


@pytest.fixture(autouse=True)
def _no_process_group_is_left() -> Any:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Seen(Callback):
    """Notes what is in place while training."""

    num_given: int
    replaced: bool

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.num_given = sum(isinstance(callback, Microbatching) for callback in trainer.callbacks)
        self.replaced = training_loop.closure_replaced(trainer)


def test_they_are_registered_by_name():
    assert StrategyRegistry["memtrain_ddp"]["strategy"] is MemtrainDDPStrategy
    assert StrategyRegistry["memtrain_ddp"]["description"] == "DDPStrategy with Microbatching"
    assert StrategyRegistry["memtrain_fsdp"]["strategy"] is MemtrainFSDPStrategy
    assert StrategyRegistry["memtrain_fsdp"]["description"] == "FSDPStrategy with Microbatching"
    assert isinstance(StrategyRegistry.get("memtrain_ddp"), DDPStrategy)


def test_by_default_ddp_finds_its_size_and_fsdp_counts():
    assert MemtrainDDPStrategy()._microbatching.technique_record().settings == {
        "microbatch_size": None,
        "loss_reduction": "mean",
    }
    assert isinstance(
        MemtrainDDPStrategy()._microbatching._size, type(Microbatching(microbatch_size="auto")._size)
    )
    fsdp = MemtrainFSDPStrategy(limit_all_gathers=False)
    assert isinstance(fsdp, FSDPStrategy)
    assert fsdp._microbatching.technique_record().settings["num_microbatches"] == 2


def test_the_callback_is_added_once_and_undoes_what_it_did(tmp_path: Path):
    seen, given = Seen(), Microbatching(num_microbatches=2)
    trainer = quiet_trainer(tmp_path, seen, strategy=MemtrainDDPStrategy(given), limit_train_batches=1)
    for num_epochs in (1, 2):
        trainer.fit_loop.max_epochs = num_epochs
        trainer.fit(BoringModel())
        assert (seen.num_given, seen.replaced) == (1, True)
        assert trainer.callbacks.count(given) == 1
        assert not training_loop.closure_replaced(trainer)
    assert trainer.global_step == 2


def test_the_memory_report_names_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    profiler = MemoryProfiler()
    strategy = MemtrainDDPStrategy(Microbatching(num_microbatches=2))
    quiet_trainer(tmp_path, profiler, strategy=strategy, limit_train_batches=1).fit(BoringModel())
    assert profiler.report.techniques == (strategy._microbatching.technique_record(),)
    assert "Technique: Microbatching(num_microbatches=2, loss_reduction='mean')\n" in capsys.readouterr().out


def test_it_undoes_what_it_did_after_an_error_too(tmp_path: Path):
    class Breaks(BoringModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            raise ZeroDivisionError

    trainer = quiet_trainer(tmp_path, strategy=MemtrainDDPStrategy(Microbatching(num_microbatches=2)))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Breaks())
    assert not training_loop.closure_replaced(trainer)


def test_beside_a_callback_it_is_one_too_many(tmp_path: Path):
    strategy = MemtrainDDPStrategy(Microbatching(num_microbatches=2))
    trainer = quiet_trainer(tmp_path, Microbatching(num_microbatches=2), strategy=strategy)
    with pytest.raises(MisconfigurationException, match="must be given once, but got it twice"):
        trainer.fit(BoringModel())


def test_its_name_on_the_cpu_asks_for_a_limit(tmp_path: Path):
    trainer = quiet_trainer(tmp_path, strategy="memtrain_ddp")
    with pytest.raises(MisconfigurationException, match="needs a limit on cpu"):
        trainer.fit(BoringModel())


def test_other_stages_need_no_limit(tmp_path: Path):
    trainer = quiet_trainer(tmp_path, strategy="memtrain_ddp", limit_val_batches=1)
    trainer.validate(BoringModel(), verbose=False)
    assert not training_loop.closure_replaced(trainer)
