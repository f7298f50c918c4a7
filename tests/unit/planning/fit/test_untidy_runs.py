"""Plans for code as people write it, by the real search: GANs, phases, odd batches, resumed runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.planning.fit import search
from tests.helpers.trainers import (
    LIGHTNING_WARNINGS,
    PACKAGES,
    LedgerPeaks,
    assert_torch_is_as_found,
    of,
    quiet_trainer,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in LIGHTNING_WARNINGS]

MIB = 2**20


@dataclass
class Pictures:
    """A batch of somebody's own."""

    pixels: Tensor
    name: str = "train"


class Meter:
    """Not known to torch."""

    def __init__(self) -> None:
        self.values: list[float] = []


class GAN(pl.LightningModule):
    """Two networks with an optimizer each, an average of one of them, and a meter; it steps by itself.

    The generator is trained from the second epoch on.
    """

    def __init__(self, width: int = 64, first_epoch: int = 1, toggles_late: bool = False) -> None:
        super().__init__()
        self.toggles_late = toggles_late
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.g = nn.Sequential(
            *(m for _ in range(3) for m in (nn.Linear(width, width), nn.ReLU())), nn.Linear(width, 16)
        )
        self.d = nn.Sequential(
            nn.Linear(16, width),
            *(m for _ in range(3) for m in (nn.ReLU(), nn.Linear(width, width))),
            nn.Linear(width, 1),
        )
        self.average = {name: one.detach().clone() for name, one in self.g.named_parameters()}
        self.meter, self.first_epoch, self.num_calls = Meter(), first_epoch, 0

    def training_step(self, batch: Pictures, index: int) -> None:
        self.num_calls += 1
        of_g, of_d = self.optimizers()  # type: ignore[attr-defined]
        noise = torch.randn(len(batch.pixels), self.g[0].in_features)
        loss = self._step(of_d, lambda: self.d(self.g(noise).detach()).mean() - self.d(batch.pixels).mean())
        self.meter.values.append(loss.item())
        if self.current_epoch < self.first_epoch:
            return
        self._step(of_g, lambda: -self.d(self.g(noise)).mean())
        for name, one in self.g.named_parameters():
            self.average[name].lerp_(one.detach(), 0.1)

    def _step(self, optimizer: Any, loss_of: Any) -> Tensor:
        if not self.toggles_late:
            self.toggle_optimizer(optimizer)
        loss: Tensor = loss_of()
        if self.toggles_late:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(one.parameters(), lr=1e-3) for one in (self.g, self.d)]


def pictures(num_batches: int, samples: int = 256) -> Any:
    made = [Pictures(torch.ones(samples, 16)) for _ in range(num_batches)]
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def test_another_phase_of_a_gan_is_planned_for_when_its_optimizer_begins_to_step(tmp_path: Path) -> None:
    model, callback = GAN(), mt.FitMemory("1GiB")
    quiet_trainer(tmp_path, callback, max_epochs=3).fit(model, pictures(2))
    first, again = callback.technique_record().events
    assert "the run fits as it is" in first
    assert again.endswith("(planned again: optimizer 0 steps parameters that it did not step before)")
    assert again.startswith("step 4: ")  # two optimizers; it was new in the batch before
    assert model.num_calls == len(model.meter.values) == 6  # of trials nothing is left


def test_a_gan_is_planned_in_the_phase_in_which_it_is(tmp_path: Path) -> None:
    plans = [
        mt.plan(GAN(first_epoch=epoch), Pictures(torch.ones(256, 16)), limit="1GiB", device="cpu")
        for epoch in (0, 9)
    ]
    both, one = (plan.plain.reserved_bytes or 0 for plan in plans)
    state_of_g = 2 * 4 * sum(one.numel() for one in GAN().g.parameters())
    assert both >= one + state_of_g
    assert [plan.found.stateful for plan in plans] == [(8, 10), (0, 10)]


def test_networks_of_a_gan_are_recomputed_and_the_limit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "SWITCHES", ())
    samples = 4096
    model, peaks = GAN(first_epoch=0), LedgerPeaks()
    plain = mt.plan(model, Pictures(torch.ones(samples, 16)), limit="1GiB", device="cpu").plain.reserved_bytes
    assert plain is not None
    limit = int(0.8 * plain)
    callback = mt.FitMemory(limit)
    quiet_trainer(tmp_path, callback, peaks).fit(model, pictures(3, samples))
    assert callback.plan is not None
    assert callback.plan.chosen is not None
    assert [one.name for one in callback.plan.chosen.techniques] == ["ActivationCheckpointing"]
    # By its ledger it is within what the allocator was predicted to hold.
    assert max(peaks.peaks[1:]) <= (callback.plan.chosen.reserved_bytes or 0) <= limit < plain
    assert model.num_calls == 3
    assert_torch_is_as_found(model)


def test_what_cannot_be_recomputed_is_said_and_the_rest_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "SWITCHES", ())
    # Which parameters ask for gradients is another matter in backward than it was in forward.
    model = GAN(first_epoch=0, toggles_late=True)
    plan = mt.plan(model, Pictures(torch.ones(1024, 16)), limit="500KiB", device="cpu")
    assert plan.chosen is None
    (refused,) = plan.found.refused
    assert refused.what == "ActivationCheckpointing"
    assert "recomputed 'd' and got something else than in forward" in refused.why
    assert plan.floor.way.is_plain


class Two:
    """It has a batch of each of two loaders, and an optimizer that is stepped by hand of a scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 3)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return sum(self.layer(one).square().mean() for one in batch.values())  # type: ignore[return-value]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.layer.parameters(), lr=0.1)
        assert self.trainer.estimated_stepping_batches > 0  # type: ignore[attr-defined]
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@pytest.mark.parametrize("package", PACKAGES)
def test_several_loaders_and_a_resumed_optimizer_in_both_packages(package: str, tmp_path: Path) -> None:
    library = PACKAGES[package]

    def loaders() -> Any:
        return library.utilities.CombinedLoader(
            {n: DataLoader(torch.ones(8, 16), batch_size=n) for n in (2, 4)}, "min_size"
        )

    before = quiet_trainer(tmp_path, package=library)
    before.fit(of(Two, library.LightningModule), loaders())
    before.save_checkpoint(tmp_path / "one.ckpt")
    callback = mt.FitMemory("1GiB")
    trainer = quiet_trainer(tmp_path, callback, package=library, max_epochs=2)
    trainer.fit(of(Two, library.LightningModule), loaders(), ckpt_path=tmp_path / "one.ckpt")
    assert callback.plan is not None
    # Two moments and the number of steps of each parameter, which the checkpoint has brought.
    assert (callback.plan.plain.reserved_bytes or 0) >= 4 * 4 * (16 * 3 + 3)
    (event,) = callback.technique_record().events
    assert "the run fits as it is" in event


def test_what_is_edited_is_predicted_while_the_model_is_at_hand() -> None:
    class Net(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layers(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    plan = mt.plan(Net(), torch.ones(512, 64), limit="1GiB", device="cpu")
    smaller = plan.edit(Microbatching={"num_microbatches": 8}).chosen
    assert smaller is not None
    assert smaller.exact
    assert (smaller.reserved_bytes or 0) < 0.7 * (plan.plain.reserved_bytes or 0)
    assert smaller.time_ratio is not None
    lossy = plan.edit(CompressedActivations={}).chosen
    assert lossy is not None
    assert (lossy.exact, lossy.changes) == (False, ("CompressedActivations changes the result",))
    with pytest.raises(
        mt.ArgumentError, match=r"`Plan.edit\(changes\)` must make a way that can run, but got"
    ):
        plan.edit(ActivationCheckpointing={"policy": ["nowhere"]})
    with pytest.raises(mt.ArgumentError, match=r"`Plan.edit\(Microbatching\)` must have a number of samples"):
        plan.edit(Microbatching={"microbatch_size": "auto"})
