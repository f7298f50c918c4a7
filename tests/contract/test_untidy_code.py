"""Every technique and pair on code as people write it: the same training as without, or a refusal by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_memtrain as mt
from lightning_memtrain.tracing import UserState
from tests.contract.test_techniques import CASES, INEXACT, PAIRS
from tests.helpers.trainers import LIGHTNING_WARNINGS, PACKAGES, of, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings(*LIGHTNING_WARNINGS),
    pytest.mark.filterwarnings("ignore::lightning_memtrain.core.NoEffectWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

WIDTH, ROWS, CLASSES, NUM_BATCHES = 8, 12, 4, 4
SKIPPED = 2
PRIORS = torch.linspace(0.5, 1.5, CLASSES, dtype=torch.float64)


@dataclasses.dataclass
class Batch:
    """What a collate function of somebody's own makes."""

    x: Tensor
    labels: Tensor
    scale: dataclasses.InitVar[float]
    name: str = "train"
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self, scale: float) -> None:
        self.x = self.x * scale


class Meter:
    """Averages in an object."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: Tensor) -> None:
        self.total = self.total + value
        self.count += 1


class Following(torch.optim.SGD):
    """Counts in a dictionary, and its rate follows the count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history = {"steps": 0, "rates": [[]]}

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.history["steps"] += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.history["steps"]
        self.history["rates"][0].append(self.param_groups[0]["lr"])
        return loss


class Citizen:
    """A backbone that thaws, tied weights, a module that is called twice, and state of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.shared.weight
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()
        self.class_weights = torch.rand(CLASSES, generator=torch.Generator().manual_seed(1)).double()
        self.meter, self.nested, self.outputs = Meter(), {"seen": [[]]}, []

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        if batch_idx == SKIPPED and self.current_epoch == 0:
            return None
        x = self.backbone(batch.x)
        x = self.tied(self.shared(self.shared(x)).relu())
        logits = self.head(x)
        noise = torch.distributions.Normal(logits, 1.0)
        loss = F.cross_entropy(logits, batch.labels, reduction="none") * (self.class_weights * PRIORS)[0]
        loss = loss.mean() - 1e-3 * noise.log_prob(torch.zeros_like(logits)).mean()
        if torch.isnan(loss).any() or loss.sum() == 0:
            raise ValueError("the loss is no number")
        self.meter.update(loss.detach())
        self.nested["seen"][0].append(batch.name)
        self.outputs.append(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        return Following([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        rows = torch.randn(NUM_BATCHES * ROWS, WIDTH, generator=generator).double()
        labels = torch.randint(CLASSES, (NUM_BATCHES * ROWS,), generator=generator)

        def collate(items: list[tuple[Tensor, Tensor]]) -> Batch:
            x, y = (torch.stack(part) for part in zip(*items, strict=True))
            return Batch(x, y, 0.5)

        return DataLoader([*zip(rows, labels, strict=True)], batch_size=ROWS, collate_fn=collate)


class Thaw:
    """Freezes the backbone for the first epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


def fit(folder: Path, package: Any, *techniques: Any) -> tuple[Any, Trainer]:
    seed_everything(1, verbose=False)
    model = of(Citizen, package.LightningModule)
    thaw = of(Thaw, package.callbacks.BaseFinetuning)
    callbacks = [one for one in techniques if not isinstance(one, mt.LowPrecision)]
    plugins = [one for one in techniques if isinstance(one, mt.LowPrecision)]
    trainer = quiet_trainer(folder, thaw, *callbacks, package=package, plugins=plugins, max_epochs=2)
    trainer.fit(model)
    return model, trainer


MORE = {
    "ActivationCheckpointing, limited": lambda: mt.ActivationCheckpointing(
        mt.checkpointing.MemoryBudget("1MiB")
    ),
    "Microbatching, auto": lambda: mt.Microbatching(microbatch_size="auto", limit="1GiB"),
}
ALL = {
    **CASES,
    **MORE,
    # Tied weights are refused by name; the other layers become sparse.
    "SparseTraining": lambda: mt.SparseTraining(
        mt.sparsity.RigL(0.5, drop=0.5),
        mt.sparsity.UpdateEvery(2, stop=1.0),
        mt.sparsity.Select(dense=["tied", "shared"]),
    ),
}
RUNS = [(name,) for name in ALL] + PAIRS + [(first, second) for first in MORE for second in CASES]


REFUSED = {
    ("Microbatching, auto", "OptimizerInBackward"): "each batch is run once",
    ("OptimizerInBackward",): "Following",  # its rate would follow the parameters
}


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("names", RUNS, ids=" + ".join)
def test_untidy_code_trains_as_without(names: tuple[str, ...], package: str, tmp_path: Path) -> None:
    if names[0].partition(",")[0] == names[-1].partition(",")[0] and len(names) == 2:
        pytest.skip("the same technique twice")
    lightning = PACKAGES[package]
    plain, plain_trainer = fit(tmp_path, lightning)
    refusal = next((text for pair, text in REFUSED.items() if {*pair} <= {*names}), None)
    if refusal is not None:
        with pytest.raises(MisconfigurationException, match=refusal):
            fit(tmp_path, lightning, *(ALL[name]() for name in names))
        return
    model, trainer = fit(tmp_path, lightning, *(ALL[name]() for name in names))
    assert trainer.global_step == plain_trainer.global_step
    assert trainer.optimizers[0].history["steps"] == plain_trainer.optimizers[0].history["steps"]
    assert trainer.optimizers[0].history["rates"] == plain_trainer.optimizers[0].history["rates"]
    chunks = 3 if "Microbatching" in names else 1
    assert model.meter.count == chunks * plain.meter.count
    assert model.nested["seen"] == [plain.nested["seen"][0] * chunks]
    held = (*UserState(model, trainer.optimizers).tensors, model.meter.total)
    assert {type(tensor).__name__ for tensor in held} <= {"Tensor", "Parameter", "SparseWeight"}
    if not INEXACT.intersection(names):
        for (name, tensor), twin in zip(plain.state_dict().items(), model.state_dict().values(), strict=True):
            torch.testing.assert_close(tensor, twin, rtol=1e-10, atol=1e-12, msg=name)
        torch.testing.assert_close(
            model.meter.total / model.meter.count, plain.meter.total / plain.meter.count
        )
