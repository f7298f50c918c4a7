"""Zero the gradients before the forward, so that they do not occupy memory during it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]

from lightning_memtrain.compat.lightning_names import refuse_mix
from lightning_memtrain.core import NoEffectWarning, TechniqueRecord
from lightning_memtrain.microbatching import training_loop
from lightning_memtrain.microbatching.past_gradients import zero_grad_hooks


class EarlyZeroGrad(Callback):
    """Zeroes gradients before the forward of a batch instead of after it.

    Lightning runs ``training_step``, then ``zero_grad``, then ``backward``, so the gradients of the last step
    are kept through the next forward. Zeroed first, their bytes are free while activations are made. Loss and
    gradients stay equal to the bit.

    It lowers the peak where the peak is at the end of the forward, by at most the bytes of the gradients.
    :class:`Microbatching` does the same by itself. It has no effect, and warns, if the model or a callback
    does something in ``on_before_zero_grad``: what is averaged there, or looked at, would be another in the
    forward.

    Raises:
        MisconfigurationException: at ``setup``, with manual optimization.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[EarlyZeroGrad()], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step
        2
    """

    def __init__(self) -> None:
        super().__init__()
        self._undo: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change the order of the training loop."""
        if stage != "fit":
            return
        refuse_mix("EarlyZeroGrad", trainer)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`EarlyZeroGrad` needs automatic optimization, but got a model with "
                "automatic_optimization=False. "
                "Call `optimizer.zero_grad()` early in your `training_step` instead."
            )
        training_loop.check(trainer)
        if training_loop.closure_replaced(trainer):
            return  # `Microbatching`, which says so
        if hooks := zero_grad_hooks(trainer, pl_module):
            rank_zero_warn(
                "`EarlyZeroGrad` has no effect beside an `on_before_zero_grad` (here of "
                f"{', '.join(hooks)}), which must see weights and gradients after the forward. Use "
                "`on_train_batch_end` for what needs no gradients and may come before the next forward, or "
                "leave out `EarlyZeroGrad`.",
                category=NoEffectWarning,
            )
            return

        def make_closure(kwargs: Any, optimizer: Any, batch_idx: int) -> training_loop.Closure:
            return _ZeroFirst(
                lambda: training_loop.training_step(trainer, kwargs),
                training_loop.backward_fn(trainer, optimizer),
                training_loop.zero_grad_fn(trainer, batch_idx, optimizer),
            )

        self._undo = training_loop.install_closure(trainer, make_closure)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the training loop as it was found."""
        if self._undo is not None:
            self._undo()
            self._undo = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the training loop as it was found: after an error Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    @property
    def exact(self) -> bool:
        """The result is the same to the bit."""
        return True

    def technique_record(self) -> TechniqueRecord:
        """What the memory report says of it."""
        return TechniqueRecord(name="EarlyZeroGrad")


class _ZeroFirst(training_loop.Closure):
    @torch.enable_grad()
    def closure(self, *args: Any, **kwargs: Any) -> training_loop.ClosureResult:
        zero_grad, self._zero_grad_fn = self._zero_grad_fn, None
        if zero_grad is not None:
            zero_grad()
        try:
            return super().closure(*args, **kwargs)
        finally:
            self._zero_grad_fn = zero_grad
