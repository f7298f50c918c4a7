"""The callback that steps each parameter during backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.compat.lightning_private import should_accumulate
from lightning_memtrain.coordination import backward_is_partial
from lightning_memtrain.core import ArgumentError, NoEffectWarning, TechniqueRecord, format_bytes
from lightning_memtrain.core.technique import readable_repr
from lightning_memtrain.optimizer_in_backward.backward_steps import BackwardSteps
from lightning_memtrain.optimizer_in_backward.gradient_accumulation import Accumulation
from lightning_memtrain.optimizer_in_backward.gradient_averages import GradientAverages
from lightning_memtrain.optimizer_in_backward.in_backward_validation import (
    accumulation_error,
    validate_callbacks,
    validate_model,
    validate_no_comm_hook,
    validate_run,
)
from lightning_memtrain.optimizer_in_backward.two_pass_memory import TwoPassMemory, TwoPassPeaks
from lightning_memtrain.optimizer_steps import SupportsParameterStep, step_parameter


class OptimizerInBackward(Callback):
    r"""Steps each parameter as soon as its gradient is complete, and frees the gradient at once.

    The gradients of all parameters never exist together: at most that of one parameter does, beside those
    that backward is just making. The optimizer, its schedulers and its state are those that
    ``configure_optimizers`` returned, and weights are equal to the bit to those without the callback.

    Where gradients of several backwards are to be added up (``accumulate_grad_batches``,
    :class:`~lightning_memtrain.Microbatching`), there must be something to add them to that is no gradient:
    see ``accumulation``.

    Args:
        accumulation: accumulates gradients of several backwards: :class:`ExactMomentum` for SGD with
            momentum, :class:`AdamA` for Adam and AdamW. Without it, accumulation is refused.
        clip_by_norm: ``"two_pass"``: for ``Trainer(gradient_clip_val=...)`` by norm, run backward twice over
            one graph: the first measures the norm, the second steps. Exact. The first keeps all activations,
            also recomputed ones. Without it, clipping by norm is refused. Clipping by value needs nothing.
        hooks_without_gradients: call ``on_after_backward`` and ``on_before_optimizer_step`` of model and
            callbacks though gradients are gone by then; otherwise those who override them are refused.

    Raises:
        ArgumentError: if an argument is out of its range.
        MisconfigurationException: before the first batch, if model, optimizer, strategy, precision or
            callbacks do not go with stepping in backward.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = OptimizerInBackward(hooks_without_gradients=True)
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[callback], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step, print(callback.technique_record().events[0])
        4 steps of single parameters during backward
        (2, None)

    References:
        Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources, 2023,
        arXiv:2306.09782.
    """

    #: For callbacks that need gradients: they must be seen while they are made.
    frees_gradients = True

    def __init__(
        self,
        accumulation: Accumulation | None = None,
        clip_by_norm: Literal["two_pass"] | None = None,
        hooks_without_gradients: bool = False,
    ) -> None:
        super().__init__()
        if accumulation is not None and not isinstance(accumulation, Accumulation):
            raise ArgumentError(
                "`OptimizerInBackward(accumulation)` must be ExactMomentum(), AdamA() or None, but got "
                f"accumulation={accumulation!r}. Use one of them."
            )
        if clip_by_norm not in (None, "two_pass"):
            raise ArgumentError(
                "`OptimizerInBackward(clip_by_norm)` must be 'two_pass' or None, but got "
                f"clip_by_norm={clip_by_norm!r}. Use one of them."
            )
        if not isinstance(hooks_without_gradients, bool):
            raise ArgumentError(
                "`OptimizerInBackward(hooks_without_gradients)` must be True or False, but got "
                f"hooks_without_gradients={hooks_without_gradients!r}. Use one of them."
            )
        self._accumulation = accumulation
        self._clip_by_norm = clip_by_norm
        self._hooks_without_gradients = hooks_without_gradients
        self._steps: BackwardSteps | None = None
        self._averages: GradientAverages | None = None
        self._max_norm: float | None = None
        self._watch: TwoPassMemory | None = None
        self._peaks: TwoPassPeaks | None = None
        self._has_stepped = False
        self._accumulating: dict[int, bool] = {}
        self._events: tuple[str, ...] = ()
        self._undo: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a model that cannot be trained so."""
        if stage != "fit":
            return
        refuse_mix("OptimizerInBackward", trainer)
        self._events, self._accumulating = (), {}  # a checkpoint is restored after this
        options = {"hooks_without_gradients": self._hooks_without_gradients}
        validate_model(pl_module, two_pass=self._clip_by_norm is not None, **options)
        validate_callbacks(trainer, **options)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what else cannot work, now that optimizer and precision are made; nothing has run yet."""
        optimizers: list[Any] = trainer.optimizers
        validate_run(trainer, optimizers, self._accumulation, self._clip_by_norm)
        optimizer: Optimizer = optimizers[0]
        model = trainer.strategy.model
        self._averages = None
        if trainer.world_size > 1 and isinstance(model, DistributedDataParallel):
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._averages = GradientAverages(model, parameters)
        plugin = trainer.precision_plugin
        self._undo = _skip_clipping(plugin)
        clip_value = float(trainer.gradient_clip_val or 0)
        by_value = trainer.gradient_clip_algorithm == "value"
        self._max_norm = clip_value if clip_value > 0 and not by_value else None
        self._peaks, self._has_stepped = None, False
        self._steps = BackwardSteps(
            optimizer,
            plugin.step_parameter if isinstance(plugin, SupportsParameterStep) else step_parameter,
            self._accumulation,
            clip_value if clip_value > 0 and by_value else None,
            self._averages,
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with an accumulation, now that the state of the optimizer is restored."""
        if self._averages is not None:
            validate_no_comm_hook(trainer.strategy)  # that somebody's `on_fit_start` has put on the wrapper
        if self._steps is not None and self._accumulating:
            self._steps.resume_accumulating(self._accumulating)
        self._accumulating = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep DistributedDataParallel from communicating gradients by itself."""
        if self._averages is not None and self._steps is not None and not self._steps.accumulating():
            self._averages.begin_batch()
        if self._max_norm is not None and self._peaks is None and self._has_stepped:
            self._watch = TwoPassMemory(pl_module, trainer.optimizers, batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say so if two passes hold more than one would."""
        self._has_stepped = True  # so that the next batch finds the state of the optimizer
        watch, self._watch = self._watch, None
        if watch is None:
            return
        self._peaks = watch.close()
        if self._peaks is not None and self._peaks.two_passes_bytes > self._peaks.plain_bytes:
            rank_zero_warn(
                'With clip_by_norm="two_pass" `OptimizerInBackward` holds '
                f"{format_bytes(self._peaks.two_passes_bytes)} in a step of this model, where about "
                f"{format_bytes(self._peaks.plain_bytes)} would do without it: the first backward keeps the "
                "whole graph. Clip by value (gradient_clip_algorithm='value'), or leave it out.",
                category=NoEffectWarning,
            )

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Follow the backward that begins now."""
        if self._steps is None:
            return
        amid_batch = backward_is_partial()
        last = not amid_batch and not should_accumulate(trainer)
        if not last and self._accumulation is None:
            optimizers: list[Any] = trainer.optimizers
            raise accumulation_error(
                optimizers[0], "microbatches" if amid_batch else "accumulate_grad_batches above 1"
            )
        self._steps.begin(loss, last=last)
        if self._max_norm is not None:
            if self._watch is not None:
                self._watch.first_begins()
            self._steps.measure(loss, self._max_norm)
            if self._watch is not None:
                self._watch.second_begins()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Step what had to wait for the end of backward."""
        if self._steps is not None:
            self._steps.end()
        if self._watch is not None:
            self._watch.second_ends()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Step what got its last gradient in an earlier backward of the accumulation."""
        if self._steps is not None:
            self._steps.finish()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was stepped."""
        if self._steps is not None and trainer.global_step and not self._steps.num_stepped:
            warnings.warn(
                "`OptimizerInBackward` stepped nothing: no parameter of the optimizer got a gradient. "
                "Give the optimizer parameters that the loss depends on.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to save what the other ranks hold a part of."""
        if self._averages is not None and self._steps is not None and self._steps.accumulating():
            raise MisconfigurationException(
                "`OptimizerInBackward` with several ranks must be saved when no gradients are being "
                f"accumulated, but got a checkpoint amid accumulate_grad_batches="
                f"{trainer.accumulate_grad_batches}. Save after optimizer steps, e.g. "
                "ModelCheckpoint(every_n_train_steps=...)."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take all hooks off: after an error Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take all hooks off."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._undo is not None:
            self._undo()
            self._undo = None
        if self._averages is not None:
            self._averages.close()
        if self._steps is not None:
            self._steps.abandon()
            self._events = self._events_so_far()
        self._steps = self._averages = None

    def state_dict(self) -> dict[str, Any]:
        """Which parameters are accumulating gradients; nothing between accumulations."""
        accumulating = self._steps.accumulating() if self._steps is not None else {}
        return {"accumulating": accumulating} if accumulating else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where a checkpoint was written."""
        self._accumulating = dict(state_dict.get("accumulating", {}))

    @property
    def exact(self) -> bool:
        """Whether the steps are those of the optimizer on all gradients, in exact arithmetic."""
        return self._accumulation is None or self._accumulation.exact

    __repr__ = readable_repr

    def technique_record(self) -> TechniqueRecord:
        """Settings in force, and how many parameters were stepped."""
        settings: dict[str, Any] = {
            "accumulation": None if self._accumulation is None else type(self._accumulation).__name__,
            "clip_by_norm": self._clip_by_norm,
        }
        events = self._events if self._steps is None else self._events_so_far()
        return TechniqueRecord("OptimizerInBackward", settings, events)

    def _events_so_far(self) -> tuple[str, ...]:
        if self._steps is None or not self._steps.num_stepped:
            return ()
        said = f"{self._steps.num_stepped} steps of single parameters during backward"
        deferred = self._steps.num_deferred
        return (said, f"{deferred} of them waited for its end") if deferred else (said,)


def _skip_clipping(plugin: Any) -> Callable[[], None]:
    """Keep a precision plugin from clipping gradients that are gone: torch fails on none.

    Args:
        plugin: the trainer's.

    Returns:
        A function that takes it back.
    """

    def clipped_already(*args: Any, **kwargs: Any) -> None:
        return None

    plugin.clip_gradients = clipped_already

    def undo() -> None:
        vars(plugin).pop("clip_gradients", None)

    return undo
