"""On a device that is too small for the whole batch, automatic sizes are those that its GPU would lead to."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

import lightning_memtrain as mt
from lightning_memtrain.core import MIB
from lightning_memtrain.planning import Device, Prediction, predict
from lightning_memtrain.tracing.cuda_twin import why_no_twin

pytestmark = pytest.mark.skipif(bool(why_no_twin()), reason="torch cannot make a device in Python")

CONTEXT = 64 * MIB
BATCH = torch.zeros(32, 128, 256)


def tight(mib: int) -> Device:
    return Device(f"{mib} MiB", mib * MIB, context_bytes=CONTEXT, compute_capability=(8, 0))


class Net(pl.LightningModule):
    """Layers whose activations outweigh their weights."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))  # noqa: E731
        self.layers = nn.Sequential(*(layer() for _ in range(4)))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.layers(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters())


def predicted(device: Device, callback: pl.Callback) -> Prediction:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False
        )
        return predict(Net(), BATCH, device=device, trainer=trainer)


def setting(prediction: Prediction, name: str) -> Any:
    (record,) = prediction.report.techniques
    return record.settings[name]


def test_the_size_is_the_largest_that_fits() -> None:
    device = tight(220)
    found = predicted(device, mt.Microbatching(microbatch_size="auto"))
    assert found.fits
    (record,) = found.report.techniques
    assert record.events[0].startswith("step 0: microbatch_size=16 of 32 samples: ")
    # What is free goes back to the device then, as it would there, and so the next batches take less.
    assert "the allocator had to retry in two batches running" in record.events[1]
    assert predicted(device, mt.Microbatching(microbatch_size=16)).fits
    assert not predicted(device, mt.Microbatching(microbatch_size=32)).fits


def test_a_given_size_that_recovers_is_halved_as_on_the_device() -> None:
    found = predicted(tight(220), mt.Microbatching(microbatch_size=len(BATCH), recover=True))
    assert found.fits
    (record,) = found.report.techniques
    assert record.events[0].startswith("step 0: out of memory at microbatch_size=32; microbatch_size=16 ")


def test_what_no_size_would_fit_is_told_and_not_raised() -> None:
    found = predicted(tight(100), mt.Microbatching(microbatch_size="auto"))
    assert setting(found, "microbatch_size") == 1
    assert not found.fits


@pytest.mark.parametrize(
    ("technique", "name"),
    [
        (lambda limit: mt.Microbatching(microbatch_size="auto", limit=limit), "microbatch_size"),
        (lambda limit: mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget(limit)), "num_modules"),
    ],
    ids=["microbatching", "checkpointing"],
)
def test_a_share_of_the_device_is_so_many_bytes(technique: Any, name: str) -> None:
    device = tight(512)
    share, size = predicted(device, technique(0.25)), predicted(device, technique(128 * MIB))
    assert setting(share, name) == setting(size, name)
    assert share.allocated_bytes == size.allocated_bytes
    assert share.breakdown.ledger_peak_bytes <= 128 * MIB < share.allocated_bytes + CONTEXT
