from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAccuracy

from lightning_memtrain.core import MIB
from lightning_memtrain.report import MemoryProfiler
from tests.helpers.boring_models import BATCH_SIZE, WIDTH, BoringModel, LossHoarder, OutputHoarder
from tests.helpers.trainers import LIGHTNING_WARNINGS, fit, quiet_trainer

pytestmark = [pytest.mark.filterwarnings(warning) for warning in LIGHTNING_WARNINGS]

FLOAT = 4


def _growth(profiler: MemoryProfiler, stage: str = "fit") -> dict[str, tuple[int, int]]:
    assert profiler.report is not None
    return {row.module: (row.num_bytes, row.num_storages) for row in profiler.report.growth[stage]}


class WithMetrics(BoringModel):
    """Everything that lives on from step to step in a model without a leak."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accuracy = MetricCollection({"accuracy": BinaryAccuracy(), "mean": MeanMetric()})
        self.previous: torch.Tensor | None = None

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.previous = loss.detach() + 1
        if batch_idx in (0, 2):
            self.log("now_and_then", loss.detach() * 2, on_step=True, on_epoch=True)
        return {"loss": loss, "extra": batch * 2}

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> Any:
        outputs = self(batch).squeeze(1)
        self.accuracy.update(outputs.sigmoid(), torch.ones_like(outputs, dtype=torch.long))
        self.log_dict(self.accuracy)
        return outputs


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"log_every_n_steps": 1}], ids=str)
def test_a_clean_model_grows_by_nothing(options: dict[str, Any], tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=1)
    model = WithMetrics(num_batches=6, num_val_batches=3)
    trainer = fit(model, profiler, tmp_path, max_epochs=3, **options)
    assert profiler.report is not None
    assert profiler.report.growth == {"fit": (), "validate": ()}
    assert profiler.report.stages["fit"].growth == ()
    assert float(trainer.callback_metrics["memory/growth_mib"]) == 0.0
    assert float(trainer.callback_metrics["memory/validate/growth_mib"]) == 0.0


class Hoarder(BoringModel):
    """Keeps the loss with its graph; logs nothing else."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.losses: list[torch.Tensor] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.head(self.body(batch).relu()) * 3).exp().mean()
        self.losses.append(loss)
        return loss


# Lightning warns of it once per process.
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_kept_loss_without_backward_keeps_its_graph(tmp_path: Path):
    class Forgets(Hoarder):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)  # the graph is never run backward, so never freed

    profiler = MemoryProfiler(every_n_steps=1)
    fit(Forgets(num_batches=5), profiler, tmp_path, limit_val_batches=0)
    # Four of five steps have outlived the step after their own. Of each there are: what relu returned, which
    # head saved (as the module outside, relu is a function), what exp returned, and the loss itself.
    steps = 4
    relu, exp, loss = FLOAT * BATCH_SIZE * WIDTH, FLOAT * BATCH_SIZE, FLOAT
    assert _growth(profiler) == {"": (steps * (relu + exp + loss), steps * 3)}


def test_a_leak_is_charged_to_the_module_that_made_it(tmp_path: Path):
    class KeepsHidden(BoringModel):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.hidden: list[torch.Tensor] = []

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            hidden = self.body(batch)
            self.hidden.append(hidden)
            return self.head(hidden).mean()

    profiler = MemoryProfiler(every_n_steps=2)
    trainer = fit(KeepsHidden(num_batches=8), profiler, tmp_path, limit_val_batches=0)
    # Watched are 0, 1, 2, 4 and 6; step 7 shows that 6 is kept as well. What other steps leave is not seen.
    one = FLOAT * BATCH_SIZE * WIDTH
    assert _growth(profiler) == {"body": (5 * one, 5)}
    # The last watched step was logged at its own end: by then those of 0, 1, 2 and 4 were growth.
    assert float(trainer.callback_metrics["memory/growth_mib"]) * MIB == 4 * one


def test_logged_and_kept_losses_are_growth(tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=1)
    fit(LossHoarder(num_batches=6), profiler, tmp_path, limit_val_batches=0)
    # Backward has freed the graphs' saved tensors; a loss keeps itself. The last but one is still held by
    # Lightning as well, as the last logged value, until the last step replaces it.
    assert _growth(profiler) == {"": (5 * FLOAT, 5)}


def test_a_list_of_outputs_in_validation(tmp_path: Path):
    profiler = MemoryProfiler(every_n_steps=1)
    trainer = fit(OutputHoarder(num_batches=2, num_val_batches=4), profiler, tmp_path, max_epochs=2)
    one = FLOAT * BATCH_SIZE * WIDTH
    assert _growth(profiler, "validate") == {"body": (3 * one, 3)}
    assert _growth(profiler, "fit") == {}
    assert float(trainer.callback_metrics["memory/validate/growth_mib"]) * MIB == 3 * one
    # The epoch's end emptied the list, and the training step afterwards has nothing of it.
    assert profiler.breakdowns["fit"].growth == ()


def test_predictions_that_the_trainer_keeps(tmp_path: Path):
    class Predicts(BoringModel):
        def predict_dataloader(self) -> Any:
            return BoringModel(num_batches=5).train_dataloader()

    profiler = MemoryProfiler(every_n_steps=1)
    quiet_trainer(tmp_path, profiler).predict(Predicts(), return_predictions=True)
    assert _growth(profiler, "predict") == {"head": (4 * FLOAT * BATCH_SIZE, 4)}
    quiet_trainer(tmp_path, profiler).predict(Predicts(), return_predictions=False)
    assert _growth(profiler, "predict") == {}


def test_metrics_that_keep_every_sample_are_growth(tmp_path: Path):
    from torchmetrics.classification import BinaryAUROC

    class Ranks(BoringModel):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self.auroc = BinaryAUROC()  # exact: a list of all predictions and targets

        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            outputs = self.head(batch).sigmoid().squeeze(1)
            self.auroc.update(outputs, (batch[:, 0] > 0.3).long())

        def on_validation_epoch_end(self) -> None:
            self.auroc.reset()

    profiler = MemoryProfiler(every_n_steps=1)
    fit(Ranks(num_batches=1, num_val_batches=4), profiler, tmp_path)
    growth = _growth(profiler, "validate")
    # Predictions in float32, targets in int64.
    assert sum(num_bytes for num_bytes, _ in growth.values()) == 3 * BATCH_SIZE * (FLOAT + 8)
