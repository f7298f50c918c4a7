"""When an automatic choice is made again, and what happens where none can be made."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.checkpointing.selection.step_conditions import FittingShapes
from lightning_memtrain.core import KIB
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

WIDTH, ROWS = 32, 64


class Blocks(LightningModule):
    """Blocks that can be recomputed."""

    def __init__(self) -> None:
        super().__init__()
        block = lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH))  # noqa: E731
        self.backbone = nn.Sequential(*(block() for _ in range(6)))
        self.head = nn.Linear(WIDTH, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.head(self.backbone(batch)).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.01)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(4 * ROWS, WIDTH, generator=torch.Generator().manual_seed(1)), ROWS)


def fit(
    kind: type[LightningModule], *callbacks: Callback, **options: Any
) -> tuple[LightningModule, list[int], Trainer]:
    """The trained model, and the allocator's peak of every step."""
    seed_everything(3, verbose=False)
    profiler = mt.MemoryProfiler(every_n_steps=1, report_dir=tempfile.mkdtemp())
    model = kind()
    trainer = quiet_trainer(Path(tempfile.mkdtemp()), *callbacks, profiler, max_epochs=2, **options)
    trainer.fit(model, ckpt_path=options.pop("ckpt_path", None))
    steps = [step.peak_bytes for step in profiler.report.steps if step.stage == "fit"]
    return model, steps, trainer


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


class Thaw(BaseFinetuning):
    """A backbone that is trained from the second epoch on."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def test_thawed_parameters_are_chosen_for_before_they_break_the_limit() -> None:
    plain, plain_steps, _ = fit(Blocks, Thaw())
    frozen, thawed = max(plain_steps[:4]), max(plain_steps[4:])
    assert thawed > 2 * frozen
    limit = (frozen + 4 * thawed) // 5
    callback = mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget(limit))
    model, steps, _ = fit(Blocks, Thaw(), callback)
    assert max(steps) <= limit
    assert_equal(plain, model)
    events = callback.technique_record().events
    assert any(event.startswith("step 4, with more parameters that are trained: ") for event in events)


class Varied(Blocks):
    """Batches of many sizes, the largest last."""

    def train_dataloader(self) -> Any:
        return DataLoader([torch.randn(rows, WIDTH) for rows in (48, 50, 47, 52, 96)], batch_size=None)


def test_every_larger_batch_is_kept_within_the_limit() -> None:
    _, plain_steps, _ = fit(Varied)
    limit = max(plain_steps[:4]) + 4 * KIB
    assert max(plain_steps) > limit
    callback = mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget(limit))
    _, steps, _ = fit(Varied, callback)
    assert max(steps) <= limit
    assert "for a larger batch" in " ".join(callback.technique_record().events)


def test_shapes_that_fit_tell_of_others() -> None:
    shapes = FittingShapes()
    assert shapes.growth(((4, 8),)) == float("inf")
    shapes.add(((4, 8), (4,)))
    assert shapes.contains(((4, 8), (4,)))
    assert shapes.contains(((3, 8), (3,)))
    assert not shapes.contains(((2, 16), (2,)))
    assert shapes.growth(((2, 16), (2,))) == 4  # attention grows with the square
    assert shapes.growth(((8, 8), (8,))) == 4
    assert shapes.growth(((8, 8),)) == float("inf")
    shapes.add(((4, 16), (4,)))
    assert shapes.growth(((2, 16), (2,))) == 1


class Adamic(Blocks):
    """Its optimizer's step holds most of all."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 2048)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), weight_decay=1e-8)

    def train_dataloader(self) -> Any:
        return DataLoader(torch.randn(64, WIDTH), batch_size=4)


def test_a_resumed_optimizer_counts_from_the_first_step(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(Adamic())
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    _, plain_steps, _ = fit(Adamic)
    limit = max(plain_steps) - 8 * KIB
    found = []
    for checkpoint in (None, tmp_path / "two.ckpt"):
        trainer = quiet_trainer(
            tmp_path, mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget(limit)), max_epochs=4
        )
        with pytest.raises(
            MisconfigurationException, match=r"`MemoryBudget\(limit\)` must be at least"
        ) as caught:
            trainer.fit(Adamic(), ckpt_path=checkpoint)
        found.append(str(caught.value).partition(" for this model")[0])
    assert found[0] == found[1]


# ---------------------------------------------------------------------- where no choice can be made


class Opaque(Blocks):
    """Looks at memory addresses, which only real tensors have."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        out = self.head(self.backbone(batch))
        if out.data_ptr() == 0:
            raise ValueError("no address")
        return out.square().mean()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_the_default_policy_warns_once_and_trains_as_without() -> None:
    plain, _, _ = fit(Opaque)
    callback = mt.ActivationCheckpointing()
    with pytest.warns(mt.core.NoEffectWarning, match="recomputes nothing") as caught:
        model, _, _ = fit(Opaque, callback)
    assert_equal(plain, model)
    (message,) = [str(one.message) for one in caught if isinstance(one.message, mt.core.NoEffectWarning)]
    assert "test_automatic_selection.py:" in message
    assert message.startswith("`ActivationCheckpointing()` recomputes nothing: it runs `training_step`")
    assert callback.technique_record().settings["num_modules"] == 0
    assert callback.technique_record().events == (
        "step 0: recomputes nothing, since no step can run without data",
    )


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_limit_that_cannot_be_told_is_refused_by_the_users_own_line() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"ended at .*test_automatic_selection.py:\d+ with "
    ) as caught:
        fit(Opaque, mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget("1MiB")))
    assert str(caught.value).startswith("`MemoryBudget(limit='1MiB')` runs `training_step` without data")
    assert str(caught.value).endswith("e.g. ActivationCheckpointing('full').")


class ByHand(Blocks):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def test_the_default_policy_leaves_manual_optimization_alone() -> None:
    plain, _, _ = fit(ByHand)
    with pytest.warns(mt.core.NoEffectWarning, match="recomputes nothing: it needs a LightningModule with"):
        model, _, _ = fit(ByHand, mt.ActivationCheckpointing())
    assert_equal(plain, model)


def test_what_the_device_has_is_a_limit_where_it_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="must be a size on cpu, which does not tell"):
        fit(Blocks, mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget("device")))
    _, plain_steps, _ = fit(Blocks)
    limit = max(plain_steps) * 5 // 6
    module = "lightning_memtrain.checkpointing.memory_budget.free_device_bytes"
    monkeypatch.setattr(module, lambda device: limit)
    _, steps, _ = fit(Blocks, mt.ActivationCheckpointing(mt.checkpointing.MemoryBudget("device")))
    assert max(steps) <= limit


class Fails(Blocks):
    """Has a mistake of its own."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        raise KeyError("a mistake")


@pytest.mark.filterwarnings("ignore::lightning_memtrain.core.NoEffectWarning")
def test_a_mistake_of_the_users_is_told_as_without() -> None:
    with pytest.raises(KeyError, match="a mistake"):
        fit(Fails, mt.ActivationCheckpointing())
