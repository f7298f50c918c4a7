"""`ActivationCheckpointing("auto")` and budgets in a real run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from lightning_memtrain import ActivationCheckpointing, MemoryProfiler, Microbatching
from lightning_memtrain.checkpointing import MemoryBudget
from lightning_memtrain.core import KIB
from lightning_memtrain.tracing.step.fake_step import FakeStep
from tests.helpers.trainers import LIGHTNING_WARNINGS, quiet_trainer

pytestmark = pytest.mark.filterwarnings(*LIGHTNING_WARNINGS)

ROWS = 64
WIDTH = 32


class DeepModel(LightningModule):
    """Blocks with dropout and batch norm; logs, counts and keeps a metric as users do."""

    def __init__(self, asks_for_a_value: bool = False) -> None:
        super().__init__()
        block = lambda: nn.Sequential(  # noqa: E731
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.BatchNorm1d(4 * WIDTH),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4 * WIDTH, WIDTH),
        )
        self.blocks = nn.ModuleList(block() for _ in range(6))
        self.mean = MeanMetric()
        self.losses: list[float] = []
        self.num_steps = 0
        self.asks_for_a_value = asks_for_a_value

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        self.num_steps += 1
        x = batch
        for block in self.blocks:
            x = x + block(x)
        loss = x.square().mean()
        if self.asks_for_a_value:
            self.losses.append(loss.item())
        else:
            self.losses.append(loss.detach())
        self.mean(loss)
        self.log("loss", loss)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        return {"loss": loss, "more": x.detach().sum()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            torch.randn(4 * ROWS, WIDTH, generator=torch.Generator().manual_seed(0)), batch_size=ROWS
        )


def fit(
    folder: Path, *callbacks: Any, model: DeepModel | type[DeepModel] = DeepModel, **options: Any
) -> tuple[DeepModel, Trainer]:
    seed_everything(7, verbose=False)
    model = model() if isinstance(model, type) else model
    trainer = quiet_trainer(folder, *callbacks, max_epochs=2, **options)
    trainer.fit(model)
    return model, trainer


def assert_equal(one: DeepModel, other: DeepModel) -> None:
    for (name, tensor), twin in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name
    assert torch.equal(torch.stack(one.losses), torch.stack(other.losses))  # type: ignore[arg-type]
    assert one.num_steps == other.num_steps


@pytest.mark.parametrize("policy", ["auto", MemoryBudget(), MemoryBudget("1300KiB")])
def test_a_run_with_a_budget_is_the_run_without(policy: Any, tmp_path: Path) -> None:
    plain, plain_trainer = fit(tmp_path)
    callback = ActivationCheckpointing(policy)
    model, trainer = fit(tmp_path, callback)
    assert_equal(plain, model)
    assert trainer.logged_metrics == plain_trainer.logged_metrics
    assert "training_step" not in model.__dict__
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_limit_is_kept_and_the_report_says_what_was_chosen(tmp_path: Path) -> None:
    plain_profiler = MemoryProfiler(every_n_steps=1, report_dir=tmp_path / "plain")
    fit(tmp_path, plain_profiler)
    plain_bytes = plain_profiler.report.stages["fit"].ledger_peak_bytes
    limit = plain_bytes * 3 // 4
    profiler = MemoryProfiler(every_n_steps=1, report_dir=tmp_path / "limited")
    fit(tmp_path, profiler, ActivationCheckpointing(MemoryBudget(limit)))
    report = profiler.report
    assert report.stages["fit"].ledger_peak_bytes <= limit < plain_bytes
    assert report.stages["fit"].recomputed_max_bytes > 0
    (record,) = report.techniques
    assert record.name == "ActivationCheckpointing"
    assert record.settings["policy"] == f"MemoryBudget(limit={limit})"
    assert record.settings["num_modules"] > 0
    assert all(event.startswith("step ") and "recomputed: peak " in event for event in record.events)


@pytest.mark.parametrize("batchnorm", ["pooled", "chunk", "synchronized"])
def test_microbatches_are_the_same_with_a_choice(batchnorm: Any, tmp_path: Path) -> None:
    plain, _ = fit(tmp_path, Microbatching(num_microbatches=2, batchnorm=batchnorm))
    callback = ActivationCheckpointing(MemoryBudget("1100KiB"))
    model, _ = fit(tmp_path, Microbatching(num_microbatches=2, batchnorm=batchnorm), callback)
    assert callback.technique_record().settings["num_modules"] > 0
    for (name, tensor), twin in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(tensor, twin), name


def test_a_larger_batch_is_chosen_for_anew(tmp_path: Path) -> None:
    class Growing(DeepModel):
        def train_dataloader(self) -> Any:
            return DataLoader([torch.randn(rows, WIDTH) for rows in (16, 16, 128, 64)], batch_size=None)

    callback = ActivationCheckpointing("auto")
    fit(tmp_path, callback, model=Growing())
    steps = [event.split(":")[0] for event in callback.technique_record().events]
    assert steps == [
        "step 0",
        "step 2, for a larger batch",
    ]


def test_a_batch_without_tensors_is_chosen_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnNames(DeepModel):
        def training_step(self, batch: str, batch_idx: int) -> dict[str, Any]:  # type: ignore[override]
            return super().training_step(torch.full((ROWS, WIDTH), float(len(batch))), batch_idx)

        def train_dataloader(self) -> Any:
            return DataLoader(["a", "bc", "def", "gh"], batch_size=None)

    fakes: list[FakeStep] = []
    make = FakeStep.__init__

    def counted(fake: FakeStep, *args: Any, **kwargs: Any) -> None:
        fakes.append(fake)
        make(fake, *args, **kwargs)

    monkeypatch.setattr(FakeStep, "__init__", counted)
    fit(tmp_path, ActivationCheckpointing("auto"), model=OnNames)
    assert len(fakes) == 1


class Writing(DeepModel):
    """Keeps its losses as numbers."""

    def __init__(self) -> None:
        super().__init__(asks_for_a_value=True)


def test_a_step_that_asks_for_a_value_gets_that_of_a_step_with_data(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path, model=Writing)
    callback = ActivationCheckpointing(MemoryBudget("1300KiB"))
    model, _ = fit(tmp_path, callback, model=Writing)
    assert callback.technique_record().settings["num_modules"] > 0
    assert model.losses == plain.losses
    assert model.num_steps == plain.num_steps
    assert all(map(torch.equal, plain.state_dict().values(), model.state_dict().values()))


class ByHand(DeepModel):
    """Steps its optimizer and its scheduler itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx)["loss"])
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class ByHandLate(ByHand):
    """Says so in `setup` only."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def setup(self, stage: str) -> None:
        self.automatic_optimization = False


@pytest.mark.parametrize("kind", [ByHand, ByHandLate])
def test_a_budget_is_refused_under_manual_optimization(kind: type[ByHand], tmp_path: Path) -> None:
    model = kind()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(MisconfigurationException) as caught:
        fit(tmp_path, ActivationCheckpointing(MemoryBudget("1300KiB")), model=model)
    assert str(caught.value) == (
        "`ActivationCheckpointing(policy=MemoryBudget(limit='1300KiB'))` needs a LightningModule with "
        "automatic_optimization=True, since it runs `training_step` once without data, but got "
        "automatic_optimization=False, whose `training_step` steps optimizers and schedulers itself. Say "
        "what to recompute, e.g. policy='full'."
    )
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert "training_step" not in model.__dict__
    fit(tmp_path, ActivationCheckpointing("full"), model=kind)


def test_a_limit_out_of_reach_ends_the_run_and_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = DeepModel()
    with pytest.raises(MisconfigurationException, match=r"`MemoryBudget\(limit\)` must be at least "):
        fit(tmp_path, ActivationCheckpointing(MemoryBudget(100 * KIB)), model=model)
    assert "training_step" not in model.__dict__
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert model.losses == []


class OnFeatures(DeepModel):
    """Trains on what frozen blocks make in inference mode, whose tensors have no version."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(inplace=True))
        self.features.requires_grad_(False)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        with torch.inference_mode():
            features = self.features(batch)
        return super().training_step(features.clone(), batch_idx)


def test_features_in_inference_mode_are_seen(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path, model=OnFeatures)
    callback = ActivationCheckpointing(MemoryBudget("1300KiB"))
    model, _ = fit(tmp_path, callback, model=OnFeatures)
    assert callback.technique_record().settings["num_modules"] > 0
    assert_equal(plain, model)


def test_autocast_is_seen(tmp_path: Path) -> None:
    plain, _ = fit(tmp_path, precision="bf16-mixed")
    model, _ = fit(tmp_path, ActivationCheckpointing("auto"), precision="bf16-mixed")
    assert_equal(plain, model)


def test_an_optimizer_with_attributes_of_its_own_and_a_scheduler(tmp_path: Path) -> None:
    class Scaled(torch.optim.SGD):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.scale = 0.5

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.mul_(self.scale)
            return super().step(closure)

    def run(*callbacks: Any) -> DeepModel:
        seed_everything(0, verbose=False)
        model = DeepModel()
        optimizer = Scaled(model.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        model.configure_optimizers = lambda: {  # type: ignore[method-assign,return-value]
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }
        quiet_trainer(tmp_path, *callbacks).fit(model)
        return model

    for one, other in zip(
        run().parameters(), run(ActivationCheckpointing(MemoryBudget("1TiB"))).parameters(), strict=True
    ):
        assert torch.equal(one, other)


class Asking(torch.optim.Optimizer):
    """Like Adam, but divides by the norm of all gradients, for whose value it asks."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt().item()
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["first"], state["second"] = (torch.zeros_like(parameter) for _ in range(2))
            state["first"].lerp_(parameter.grad, 0.1)
            state["second"].lerp_(parameter.grad.square(), 0.1)
            parameter.sub_(state["first"] / (state["second"].sqrt() + 1e-8) / max(norm, 1.0), alpha=1e-3)
        return loss


class WithoutGradients(DeepModel):
    """Its gradients are gone when forward begins, so they are no reason to choose anew."""

    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), **({} if self.optimizer is Asking else {"lr": 1e-3}))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.zero_grad()


class WithAsking(WithoutGradients):
    optimizer = Asking


def _events(folder: Path, kind: type[DeepModel], **options: Any) -> tuple[list[str], int]:
    profiler = MemoryProfiler(every_n_steps=1, report_dir=folder / "report")
    callback = ActivationCheckpointing(MemoryBudget("1500KiB"))
    fit(folder, profiler, callback, model=kind, **options)
    return list(callback.technique_record().events), profiler.report.stages["fit"].ledger_peak_bytes


def test_an_optimizer_that_asks_for_values_is_named_and_counted_once_it_stepped(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="cannot run the step of") as caught:
        events, peak_bytes = _events(tmp_path, WithAsking)
    (message,) = [str(one.message) for one in caught if "cannot run the step of" in str(one.message)]
    line = inspect.getsourcelines(Asking.step)[1] + 4
    assert message == (
        "`ActivationCheckpointing(policy=MemoryBudget(limit='1500KiB'))` cannot run the step of Asking "
        "without data (it asks for the value of a tensor (aten._local_scalar_dense.default) at "
        f"{__file__}:{line}), so its bytes are not in the limit: its state is once it has stepped, what its "
        "step holds beside is not. Set a limit that leaves room for that."
    )
    assert [event.split(":")[0] for event in events] == ["step 0", "step 1, with more optimizer state"]
    assert peak_bytes <= 1500 * KIB


def test_an_optimizer_that_can_step_is_chosen_for_once(tmp_path: Path) -> None:
    events, peak_bytes = _events(tmp_path, WithoutGradients)
    assert [event.split(":")[0] for event in events] == ["step 0"]
    assert peak_bytes <= 1500 * KIB


def test_an_optimizer_that_calls_the_model_is_named(tmp_path: Path) -> None:
    class WithClosures(DeepModel):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=2)

    with pytest.warns(UserWarning, match="cannot run the step of LBFGS without data") as caught:
        fit(tmp_path, ActivationCheckpointing("auto"), model=WithClosures)
    assert len([one for one in caught if "LBFGS" in str(one.message)]) == 1


def _peaks(callback: ActivationCheckpointing) -> list[str]:
    """What was chosen, without the time, which is measured."""
    return [event.partition(", about")[0] for event in callback.technique_record().events]


def test_a_second_trainer_begins_anew(tmp_path: Path) -> None:
    fresh, used = (ActivationCheckpointing(MemoryBudget("1300KiB")) for _ in range(2))
    fit(tmp_path, fresh)
    # The gradients of the step before are not there in forward, unlike in the next run.
    fit(tmp_path, used, Microbatching(num_microbatches=1))
    early = _peaks(used)
    fit(tmp_path, used)
    assert _peaks(used) == _peaks(fresh) != early
