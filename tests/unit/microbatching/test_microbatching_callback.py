from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_memtrain.core import TechniqueRecord, is_technique
from lightning_memtrain.microbatching import Microbatching, training_loop
from lightning_memtrain.microbatching.automatic_size.chunk_trials import ChunkTrials
from lightning_memtrain.microbatching.automatic_size.size_search import Peak
from tests.helpers.trainers import assert_torch_is_as_found, assert_training_loop_is_as_found, quiet_trainer
from tests.helpers.twin_runs import assert_same_run, train

NUM_SAMPLES = 8


def count_samples(batch: Tensor) -> int:
    return len(batch)


class Net(LightningModule):
    def __init__(self, batchnorm: bool = False) -> None:
        super().__init__()
        middle = nn.BatchNorm1d(4) if batchnorm else nn.Tanh()
        self.net = nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 2)).double()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("loss", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithState(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def batches(num: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(NUM_SAMPLES, 3, generator=generator, dtype=torch.float64) for _ in range(num)]


def loader(num: int = 3) -> DataLoader:
    return DataLoader(batches(num), batch_size=None)


def auto(**given: Any) -> Microbatching:
    return Microbatching(**{"microbatch_size": "auto", "limit": "1GiB"} | given)


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps in which probes were run; each sample seems to take a megabyte."""
    steps: list[int] = []

    def measure(self: Any, num_chunks: int) -> Peak:
        steps.append(self._trainer.global_step)
        size = -(-NUM_SAMPLES // num_chunks)
        return Peak(size, size * 10**6)

    monkeypatch.setattr(ChunkTrials, "measure", measure)
    return steps


# ---------------------------------------------------------------------- one chunk is plain Lightning


@pytest.mark.parametrize(
    "make", [lambda: Microbatching(num_microbatches=1), lambda: Microbatching(microbatch_size=NUM_SAMPLES)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_chunk_is_plain_lightning_to_the_bit(make: Any, accumulate: int, tmp_path: Path):
    plain = train(Net, batches(), tmp_path, accumulate_grad_batches=accumulate)
    single = train(Net, batches(), tmp_path, make(), accumulate_grad_batches=accumulate)
    assert_same_run(plain, single, rtol=0, atol=0)


# ---------------------------------------------------------------------- what is left behind


class Breaks(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 1:
            raise ZeroDivisionError("in the step")
        return loss


@pytest.mark.parametrize("technique", [lambda: Microbatching(microbatch_size=3), auto])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_lightning_and_torch_are_left_as_found(technique: Any, batchnorm: bool, tmp_path: Path):
    model = Net(batchnorm)
    trainer = quiet_trainer(tmp_path, technique())
    trainer.fit(model, loader())
    assert trainer.global_step == 3
    assert_training_loop_is_as_found(trainer)
    assert_torch_is_as_found(model)


@pytest.mark.parametrize("technique", [lambda: Microbatching(microbatch_size=3), auto])
@pytest.mark.parametrize("batchnorm", [False, True])
def test_they_are_after_an_error_too(technique: Any, batchnorm: bool, tmp_path: Path):
    model = Breaks(batchnorm)
    trainer = quiet_trainer(tmp_path, technique())
    with pytest.raises(ZeroDivisionError, match="in the step"):
        trainer.fit(model, loader())
    assert_training_loop_is_as_found(trainer)
    assert_torch_is_as_found(model)
    assert "loss" not in trainer.fit_loop.epoch_loop._results  # not the recorder of the chunk that failed
    assert type(trainer.fit_loop.epoch_loop._results) is training_loop.ResultCollection


def test_a_second_fit_works(tmp_path: Path):
    microbatching = Microbatching(num_microbatches=2)
    for _ in range(2):
        trainer = quiet_trainer(tmp_path, microbatching)
        trainer.fit(Net(), loader())
        assert trainer.global_step == 3
        assert_training_loop_is_as_found(trainer)


# ---------------------------------------------------------------------- checkpoints


def test_a_resumed_run_goes_on_with_the_size_that_was_found(tmp_path: Path, probes: list[int]):
    first = auto(limit="2.1MB")
    trainer = quiet_trainer(tmp_path, first)
    trainer.fit(WithState(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert first.microbatch_size == 2
    assert set(probes) == {0}
    num_probes = len(probes)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]["Microbatching"]
    assert saved == first.state_dict()

    resumed = auto()  # a probe would find that all samples fit
    trainer = quiet_trainer(tmp_path, resumed, max_epochs=2)
    trainer.fit(WithState(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 6
    assert len(probes) == num_probes
    assert resumed.microbatch_size == 2
    assert resumed.state_dict() == first.state_dict() | {"num_clean_batches": 6}


def test_a_resumed_run_with_less_room_chooses_again(tmp_path: Path, probes: list[int]):
    first = auto(limit="2.1MB")
    trainer = quiet_trainer(tmp_path, first, max_steps=1)
    trainer.fit(WithState(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert first.microbatch_size == 2
    resumed = auto(limit="1.1MB")
    trainer = quiet_trainer(tmp_path, resumed, max_epochs=2)
    trainer.fit(WithState(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert set(probes) == {0, 1}
    assert resumed.microbatch_size == 1


def test_what_an_older_version_saved_is_probed_again(tmp_path: Path, probes: list[int]):
    microbatching = auto(limit="2.1MB")
    microbatching.load_state_dict(
        {
            "microbatch_size": 1,
            "ceiling": 1,
            "grow_after_batches": 200,
            "num_clean_batches": 3,
            "num_retries": 0,
            "probed_size": NUM_SAMPLES,
            "lacks_optimizer_state": False,
        }
    )
    quiet_trainer(tmp_path, microbatching).fit(WithState(), loader())
    assert set(probes) == {0}
    assert microbatching.microbatch_size == 2
    assert microbatching.state_dict()["grow_after_batches"] == 200


def test_a_second_trainer_or_another_model_begins_anew(tmp_path: Path, probes: list[int]):
    microbatching, model = auto(limit="2.1MB", grow_after_batches=7), Net()
    trainer = quiet_trainer(tmp_path, microbatching, max_epochs=-1, max_steps=3)
    trainer.fit(model, loader())
    once = len(probes)
    microbatching.load_state_dict(microbatching.state_dict() | {"grow_after_batches": 14})
    trainer.fit_loop.epoch_loop.max_steps = 6
    trainer.fit(model, loader())  # the same run goes on
    assert trainer.global_step == 6
    assert len(probes) == once
    assert microbatching.state_dict()["grow_after_batches"] == 14
    for other, num_probes in ((model, 2), (Net(), 3)):
        again = quiet_trainer(tmp_path, microbatching)
        again.fit(other, loader())
        assert len(probes) == num_probes * once
        assert len(microbatching.technique_record().events) == 1
        assert microbatching.state_dict()["grow_after_batches"] == 7


def test_a_fixed_split_has_no_state():
    microbatching = Microbatching(num_microbatches=2)
    assert microbatching.state_dict() == {}
    microbatching.load_state_dict(auto().state_dict())
    assert microbatching.state_dict() == {}


# ---------------------------------------------------------------------- what it says of itself


def test_the_record_of_a_fixed_split(tmp_path: Path):
    assert is_technique(Microbatching(num_microbatches=2))
    counted = Microbatching(num_microbatches=2, loss_reduction="sum")
    assert counted.microbatch_size is None
    settings = {"num_microbatches": 2, "loss_reduction": "sum"}
    assert counted.technique_record() == TechniqueRecord("Microbatching", settings)
    sized = Microbatching(microbatch_size=3)
    assert sized.microbatch_size == 3
    quiet_trainer(tmp_path, sized).fit(Net(batchnorm=True), loader())
    settings = {"microbatch_size": 3, "loss_reduction": "mean", "batchnorm": "pooled"}
    assert sized.technique_record() == TechniqueRecord("Microbatching", settings)


def test_the_record_of_auto_has_its_choice(tmp_path: Path, probes: list[int]):
    microbatching = auto(limit="1.1MB")
    assert microbatching.technique_record().settings == {"microbatch_size": None, "loss_reduction": "mean"}
    trainer = quiet_trainer(tmp_path, microbatching)
    trainer.fit(Net(), loader())
    record = microbatching.technique_record()
    assert record.settings == {"microbatch_size": 1, "loss_reduction": "mean"}
    (event,) = record.events
    assert event.startswith("step 0: microbatch_size=1 of 8 samples: ")
    assert trainer.callback_metrics["microbatching/microbatch_size"] == 1.0


def test_it_is_exact_unless_there_is_batch_normalisation(tmp_path: Path):
    microbatching = Microbatching(num_microbatches=2)
    for batchnorm in (False, True, False):
        quiet_trainer(tmp_path, microbatching).fit(Net(batchnorm), loader())
        assert microbatching.exact is not batchnorm


def test_batch_normalisation_is_pointed_out_once(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    told = (
        "Microbatching: batch normalisation normalises each microbatch by its own statistics (running "
        'statistics are pooled over the batch). Microbatching(batchnorm="synchronized") normalises by '
        "those of the whole batch; replace_batchnorm(model, GroupNorm()) does without batch statistics."
    )
    for batchnorm, mode in ((True, "pooled"), (True, "chunk"), (False, "pooled")):
        caplog.clear()
        microbatching = Microbatching(num_microbatches=2, batchnorm=mode)
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            quiet_trainer(tmp_path, microbatching).fit(Net(batchnorm), loader())
        assert sum(message.endswith(told) for message in caplog.messages) == (batchnorm and mode == "pooled")


# ---------------------------------------------------------------------- copies and configuration


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
@pytest.mark.parametrize("fitted", [False, True])
def test_copies_work_alone(copied: Any, fitted: bool, tmp_path: Path, probes: list[int]):
    original = auto(limit="1.1MB", weight_fn=count_samples)
    if fitted:
        quiet_trainer(tmp_path, original).fit(Net(), loader())
    other = copied(original)
    assert other.technique_record() == original.technique_record()
    trainer = quiet_trainer(tmp_path, other)
    trainer.fit(Net(), loader())
    assert other.microbatch_size == 1
    assert original.microbatch_size == (1 if fitted else None)


# LightningCLI 2.6 under jsonargparse 4.53.
JSONARGPARSE = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def read_configuration(config: dict[str, Any], folder: Path) -> Trainer:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with patch.object(sys, "argv", ["train.py", "--config", str(folder / "config.yaml")]):
        return LightningCLI(
            BoringModel, run=False, save_config_callback=None, seed_everything_default=0
        ).trainer


@JSONARGPARSE
def test_a_configuration_file_can_name_it(tmp_path: Path):
    config = {
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            "callbacks": [
                {
                    "class_path": "lightning_memtrain.microbatching.Microbatching",
                    "init_args": {
                        "microbatch_size": "auto",
                        "limit": "2GiB",
                        "weight_fn": f"{__name__}.count_samples",
                        "batchnorm": "chunk",
                        "grow_after_batches": 7,
                    },
                },
            ],
        },
    }
    callbacks = read_configuration(config, tmp_path).callbacks
    (microbatching,) = (callback for callback in callbacks if isinstance(callback, Microbatching))
    assert microbatching._splitter.weight_fn is count_samples
    assert microbatching._size.limit_bytes == 2 * 2**30
    assert microbatching._batchnorm == "chunk"
    assert microbatching.state_dict()["grow_after_batches"] == 7
