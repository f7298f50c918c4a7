"""The callback that stops a run for which a plan was not made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.checkpointing.selection.held_beside import HeldBeside
from lightning_memtrain.core import format_bytes
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.microbatching.automatic_size.fitting_size import Shapes, shape_growth
from lightning_memtrain.planning.fit.holding.circumstances import LOGGED_BYTES, Circumstances
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint


class PlanGuard(pl.Callback):
    """Sees that a run is the one that its plan was made for, before each batch.

    :meth:`.Plan.trainer_kwargs` puts it beside the plan's techniques.

    Args:
        fingerprint: of the run that was planned.
        shapes: of the tensors of the batch that was planned for; none if unknown.
        held_bytes: what lived on the device beside the model when it was planned.
        spare_bytes: what the plan leaves of its limit; ``None`` if nobody knows what it needs.
    """

    def __init__(
        self,
        fingerprint: Fingerprint,
        shapes: Shapes = (),
        held_bytes: int = 0,
        spare_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self._fingerprint = fingerprint
        self._shapes = shapes
        self._held_bytes = held_bytes
        self._spare_bytes = spare_bytes
        self._begun: Circumstances | None = None
        self._held: HeldBeside | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": None}  # it is of the run that goes on here

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse another model; it is complete by now."""
        self._begun = None
        self._held = HeldBeside(trainer, pl_module)
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
        self._refuse_more_held(batch, trainer.global_step)

    def _refuse_more_held(self, batch: Any, step: int) -> None:
        more_bytes = unplanned_bytes(self._held, batch, self._held_bytes)
        if self._spare_bytes is not None and more_bytes > self._spare_bytes:
            raise MisconfigurationException(
                f"`Plan` leaves {format_bytes(self._spare_bytes)} of its limit, but step {step} finds "
                f"{format_bytes(more_bytes)} more on the device beside the model than when it was planned, "
                "such as copies of weights that a callback keeps. Plan with the callbacks of the run, "
                "mt.plan(..., trainer=trainer), or use FitMemory(...), which counts what is there."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let go of the run."""
        self._held = None


def unplanned_bytes(held: HeldBeside | None, batch: Any, planned_bytes: int) -> int:
    """What lives on the device beside the model that a plan does not know.

    Args:
        held: looks for it; ``None`` before a run.
        batch: of the step that begins, which does not count.
        planned_bytes: what lived there when it was planned.

    Returns:
        The bytes, but for those of what the first steps log.
    """
    if held is None:
        return 0
    return max(0, held.num_bytes_beside_model(find_tensors(batch)) - planned_bytes - LOGGED_BYTES)


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
