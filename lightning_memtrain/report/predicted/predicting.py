"""Asking for a prediction of the run that is about to begin."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from lightning_memtrain.compat.lightning_private import training_data
from lightning_memtrain.core import ReportWarning
from lightning_memtrain.report.predicted.predicted_step import PredictedStep, Predictor


class _Loaders(LightningDataModule):
    """What was given to ``fit`` in the place of a data module."""

    def __init__(self, loaders: Any) -> None:
        super().__init__()
        self._loaders = loaders

    def train_dataloader(self) -> Any:
        """As they were given."""
        return self._loaders


def predict_run(predict: Predictor, trainer: Trainer, model: LightningModule) -> PredictedStep:
    """Predict the training steps of a run, whose model is not on its device yet.

    Args:
        predict: predicts.
        trainer: that is about to fit.
        model: its module.

    Returns:
        What was predicted; or why nothing was, which a warning says as well: the run goes on.
    """
    device = trainer.strategy.root_device
    try:
        found = predict(
            model,
            datamodule=_data_of(trainer, model),
            trainer=trainer,
            device=None if device.type == "cuda" else device.type,
        )
        return PredictedStep.of(found)
    except Exception as error:  # of any kind: what cannot be predicted must not stop what can be run
        failure = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"`MemoryProfiler(predict)` has nothing to compare with, since nothing was predicted for {device}: "
        f"{failure} Training goes on.",
        ReportWarning,
        stacklevel=2,
    )
    return PredictedStep(failure=failure)


def _data_of(trainer: Trainer, model: LightningModule) -> Any:
    source = training_data(trainer)
    if source is None or source is model:
        return None
    return source if isinstance(source, LightningDataModule) else _Loaders(source)
