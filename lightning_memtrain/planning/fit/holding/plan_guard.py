"""The callback that stops a run for which a plan was not made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.microbatching.automatic_size.fitting_size import Shapes, shape_growth
from lightning_memtrain.planning.fit.holding.circumstances import Circumstances
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint


class PlanGuard(pl.Callback):
    """Sees that a run is the one that its plan was made for, before each batch.

    :meth:`.Plan.trainer_kwargs` puts it beside the plan's techniques.

    Args:
        fingerprint: of the run that was planned.
        shapes: of the tensors of the batch that was planned for; none if unknown.
    """

    def __init__(self, fingerprint: Fingerprint, shapes: Shapes = ()) -> None:
        super().__init__()
        self._fingerprint = fingerprint
        self._shapes = shapes
        self._begun: Circumstances | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse another model; it is complete by now."""
        self._begun = None
        refuse_other_run(self._fingerprint, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Refuse a batch, or parameters, that the plan does not know."""
        now = Circumstances.of(trainer, pl_module, batch)
        if self._begun is None:
            self._begun = replace(now, stateful=())  # the first steps make what optimizers keep
        planned = self._fingerprint.batch_size
        if self._shapes and len(now.shapes) == len(self._shapes):
            larger = shape_growth(now.shapes, self._shapes) > 1
        else:
            larger = planned is not None and (now.batch_size or 0) > planned
        found = [f"a batch has {now.batch_size} samples of {now.shapes}"] if larger else []
        found += [one for one in now.beyond(self._begun) if "batch" not in one]
        if found:
            known = f"batches of {planned}" if not self._shapes else f"batches of {self._shapes}"
            raise MisconfigurationException(
                f"`Plan` was made for {known}, but step {trainer.global_step} is another: {found[0]}. Nobody "
                "knows whether that keeps the limit. Plan with the largest batch of the run and all "
                "parameters that it will train, or use FitMemory(...), which plans again by itself."
            )


def refuse_other_run(planned: Fingerprint, model: pl.LightningModule) -> None:
    """Refuse a model, or versions of packages, that a plan was not made for.

    Args:
        planned: the fingerprint of the plan.
        model: the module that is about to be trained.

    Raises:
        MisconfigurationException: with what differs.
    """
    different = planned.differences(Fingerprint.of(model, planned.batch_size))
    if different:
        raise MisconfigurationException(
            f"`Plan` was made for another run: {'; '.join(different)}. Plan again for this one, by "
            "`mt.plan(...)` or `memtrain plan`."
        )
