"""Recomputing activations beside other parts of Lightning: averages, manual optimisation, copies, reports."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler, Microbatching
from tests.helpers.recomputed import assert_identical, recomputations
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

WIDTH = 6
POLICIES = ["full", "sqrt", "nested", "selective"]


class _Block(nn.Module):
    """Has running statistics, a counter and a metric of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.size = MeanMetric()
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += self.training
        x = x + self.drop(self.norm(self.linear(x)).tanh())
        self.size.update(x.detach().abs())
        return x


def _blocks(num: int) -> nn.Module:
    return nn.Sequential(*(_Block() for _ in range(num)))


class _Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = _blocks(4), nn.Linear(WIDTH, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.head(self.blocks(batch)).square().mean()
        self.log("loss", loss)
        for index, block in enumerate(self.blocks):
            self.log(f"size_{index}", block.size, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val", self.head(self.blocks(batch)).square().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class _Adversaries(_Net):
    """Two optimizers by hand, gradient penalty, and forwards that share the judge."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()
        fake = self.blocks(torch.randn_like(batch))
        real = batch.requires_grad_()
        score = self.judge(real).mean()
        (slope,) = torch.autograd.grad(score, real, create_graph=True)
        second.zero_grad()
        self.manual_backward(self.judge(fake.detach()).mean() - score + (slope.norm() - 1) ** 2)
        second.step()
        self.toggle_optimizer(first)
        loss = -self.judge(fake).mean() + self.head(fake).square().mean()
        first.zero_grad()
        self.manual_backward(loss)
        first.step()
        self.untoggle_optimizer(first)
        self.log("loss", loss)

    def configure_optimizers(self) -> Any:
        own = [*self.blocks.parameters(), *self.head.parameters()]
        return torch.optim.SGD(own, lr=0.05), torch.optim.SGD(self.judge.parameters(), lr=0.05)


def _fit(folder: Path, *callbacks: Any, model: Any = _Net, **options: Any) -> tuple[Any, Trainer]:
    seed_everything(3, verbose=False)
    net = model()
    rows = DataLoader(torch.randn(24, WIDTH), batch_size=8)
    trainer = quiet_trainer(folder, *callbacks, **({"max_epochs": 2} | options))
    trainer.fit(net, rows, rows)
    return net, trainer


def _state(run: tuple[Any, Trainer]) -> list[Any]:
    net, trainer = run
    return [
        dict(net.state_dict()),
        [block.num_calls for block in net.blocks],
        {name: value for name, value in trainer.callback_metrics.items() if "/" not in name},
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_blocks_that_count_and_measure_do_so_once(policy: str, tmp_path: Path) -> None:
    with recomputations() as recomputed:
        run = _fit(tmp_path, ActivationCheckpointing(policy))
    assert len(recomputed) >= 6 * 4
    assert_identical(_state(_fit(tmp_path)), _state(run))


@pytest.mark.parametrize("policy", POLICIES)
def test_adversaries_train_as_without(policy: str, tmp_path: Path) -> None:
    plain = _fit(tmp_path, model=_Adversaries)
    recomputed = _fit(tmp_path, ActivationCheckpointing(policy), model=_Adversaries)
    assert_identical(_state(plain), _state(recomputed))


def test_moving_averages_are_those_without(tmp_path: Path) -> None:
    runs = [
        _fit(tmp_path, EMAWeightAveraging(decay=0.8), *callbacks)
        for callbacks in ([], [ActivationCheckpointing("full")])
    ]
    assert_identical(*map(_state, runs))


def test_microbatches_are_recomputed_as_without(tmp_path: Path) -> None:
    plain = _fit(tmp_path, Microbatching(num_microbatches=2))
    with recomputations() as recomputed:
        both = _fit(tmp_path, Microbatching(num_microbatches=2), ActivationCheckpointing("full"))
    assert len(recomputed) == 6 * 2 * 4
    assert_identical(_state(plain), _state(both))


class _Copies(Callback):
    """Copies the model in the middle of a fit, and trains the copy."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            twin = copy.deepcopy(pl_module.blocks)
            twin(torch.randn(5, WIDTH)).square().sum().backward()
        self.gradients += [parameter.grad for parameter in twin.parameters()]


def test_copies_in_the_middle_of_a_fit_work(tmp_path: Path) -> None:
    plain, recomputed = _Copies(), _Copies()
    runs = [_fit(tmp_path, plain), _fit(tmp_path, ActivationCheckpointing("full"), recomputed)]
    assert_identical(*map(_state, runs))
    assert_identical(plain.gradients, recomputed.gradients)


def test_what_is_saved_in_the_middle_of_a_fit_loads_without(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "saved", save_top_k=-1, every_n_train_steps=2)
    net, _ = _fit(tmp_path, ActivationCheckpointing("nested"), saved, enable_checkpointing=True)
    states = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "saved").iterdir())]
    assert len(states) == 3
    assert_identical(dict(states[-1]["state_dict"]), dict(net.state_dict()))


def test_the_profiler_sees_the_bytes_that_are_recomputed(tmp_path: Path) -> None:
    profiler = MemoryProfiler(every_n_steps=1, report_dir=tmp_path)
    plain = _fit(tmp_path)
    run = _fit(tmp_path, profiler, ActivationCheckpointing("full"))
    assert_identical(_state(plain), _state(run))
    # Of one block: what it has from its input on - linear layer, hyperbolic tangent and mask, each for 8
    # rows, and mean and deviation of batch norm.
    assert profiler.report.stages["fit"].recomputed_max_bytes == 4 * (3 * 8 * WIDTH + 2 * WIDTH)
    (record,) = profiler.report.techniques
    assert record.name == "ActivationCheckpointing"
    assert record.settings == {"policy": "Full()", "num_modules": 4}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_lightning_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MisconfigurationException, match=r"cannot change 'blocks.0', which is part of a compiled module"
    ):
        _fit(tmp_path, ActivationCheckpointing("full"), model=lambda: torch.compile(_Net(), backend="eager"))


def test_a_model_is_as_before_after_a_fit(tmp_path: Path) -> None:
    net = _Net()
    before = [set(module.__dict__) for module in net.modules()]
    run = _fit(tmp_path, ActivationCheckpointing("nested"), model=lambda: net, max_steps=1)
    after = [set(module.__dict__) for module in net.modules()]
    assert before[1:] == after[1:]
    assert "training_step" not in net.__dict__
    seed_everything(3, verbose=False)
    with recomputations() as recomputed:
        run[0].blocks(torch.randn(4, WIDTH)).sum().backward()
    assert recomputed == []


class _AsksForItsLoss(LightningModule):
    """Keeps a running sum of numbers, as meters do."""

    total = 0.0

    def __init__(self) -> None:
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(4))
        self.net = nn.Sequential(*blocks)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.total += float(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class _GradientsOfTheFirstStep(Callback):
    """Sees whether they are gone when the second step has zeroed them, without Python's collector."""

    def __init__(self) -> None:
        self.first: list[weakref.ref[Tensor]] = []
        self.num_left = -1

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            found = [p.grad for p in pl_module.parameters() if p.grad is not None]
            self.first = [weakref.ref(gradient) for gradient in found]
        else:
            self.num_left = sum(one() is not None for one in self.first)


def test_choosing_what_to_recompute_keeps_no_gradients_alive(tmp_path: Path) -> None:
    seen = _GradientsOfTheFirstStep()
    gc.collect()
    gc.disable()
    try:
        data = DataLoader([torch.ones(256, 64)] * 3, batch_size=None)  # type: ignore[arg-type]
        quiet_trainer(tmp_path, ActivationCheckpointing("3.5MiB"), seen).fit(_AsksForItsLoss(), data)
    finally:
        gc.enable()
    assert len(seen.first) > 2
    assert seen.num_left == 0
