"""The callback that trains on any batch in the memory of a small one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.core import ArgumentError, ByteLimit, TechniqueRecord
from lightning_memtrain.core.arguments.value_checks import check_flags
from lightning_memtrain.core.technique import readable_repr
from lightning_memtrain.microbatching import training_loop
from lightning_memtrain.microbatching.automatic_size.recovery import Recovery
from lightning_memtrain.microbatching.automatic_size.size_choice import AutoSize, GivenSize
from lightning_memtrain.microbatching.batchnorm.batchnorm_policy import (
    BatchNormMode,
    BatchNormPolicy,
    check_batchnorm,
)
from lightning_memtrain.microbatching.microbatched_closure import ClosureFactory
from lightning_memtrain.microbatching.microbatching_validation import validate_run, validate_sync_each_chunk
from lightning_memtrain.microbatching.splitting.argument_checks import check_count, check_splitting
from lightning_memtrain.microbatching.splitting.chunks import (
    FixedSplit,
    LossReduction,
    SplitFn,
    Splitter,
    WeightFn,
)


class Microbatching(Callback):
    r"""Trains on each batch in chunks: the gradients of the whole batch in the memory of a part of it.

    Each chunk runs forward and backward before the next one, with its loss weighed so that the gradients add
    up to those of the whole batch; the optimizer steps once. What the chunks log and return is merged into
    what the whole batch would have logged and returned. Unlike ``accumulate_grad_batches`` the data loader,
    ``batch_idx``, ``global_step``, schedulers and epoch length stay as they are, and both can be combined.

    Exact up to rounding, unless the model looks across samples: batch normalisation does (see ``batchnorm``),
    dropout and other noise draw different numbers.

    Args:
        num_microbatches: chunks per batch, at least 1. A smaller batch makes as many chunks as it has
            samples. ``"auto"`` is ``microbatch_size="auto"``.
        microbatch_size: most samples per chunk, at least 1; or ``"auto"``: as many as fit into memory, by a
            probe of the first batch, with recovery from out-of-memory errors in forward and backward: the
            same batch is run again from the same state with chunks of half the size.
        loss_reduction: how ``training_step`` reduces its loss over the batch.
        weight_fn: of a chunk, over how many samples or tokens its mean loss is taken, e.g. the number of
            target tokens that are no padding. By default its number of samples.
        split_fn: of a batch and a number, a list of at most so many chunks. By default all tensors are split
            along their first axis.
        batchnorm: ``"pooled"``: each chunk is normalised by its own statistics, as under gradient
            accumulation, but running statistics move once per batch, by what all chunks saw together;
            ``"chunk"``: they move with each chunk, as in plain torch; ``"synchronized"``: chunks are
            normalised by the statistics of the whole batch, which a forward of the whole batch without
            gradients finds first. Losses are then those of the whole batch; gradients are close.
        num_batchnorm_sweeps: for ``"synchronized"``, how often all chunks run. Each time brings gradients
            closer to those of the whole batch; once more than there are batch normalisations in a row, they
            are equal.
        limit: for ``"auto"``, the most memory to use, in bytes, as ``"4GiB"``, or as a share of the device's
            memory: 0.9; counted by the ledger. By default what the device has free. The CPU does not tell
            what it has, so there a size must be given.
        grow_after_batches: where a size is corrected, after how many batches without trouble one that was
            halved is doubled again. Each failure doubles this number.
        sync_each_chunk: whether FSDP2 reduces gradients in the backward of each chunk; with ``False`` only in
            that of the last one, for which every rank holds gradients of all whole weights until then.
        recover: whether a fixed ``microbatch_size`` is halved when memory runs out and the batch run again,
            as with ``"auto"``, which always does so.

    Raises:
        ArgumentError: if not exactly one of ``num_microbatches`` and ``microbatch_size`` is
            given, or an argument is out of its range; at ``setup``, with manual optimization, with
            ``training_step(dataloader_iter)``, or with a strategy that accumulates by itself (DeepSpeed).

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[Microbatching(num_microbatches=2)], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step
        2
    """

    def __init__(
        self,
        num_microbatches: int | Literal["auto"] | None = None,
        microbatch_size: int | Literal["auto"] | None = None,
        loss_reduction: LossReduction = "mean",
        weight_fn: WeightFn | None = None,
        split_fn: SplitFn | None = None,
        batchnorm: BatchNormMode = "pooled",
        num_batchnorm_sweeps: int = 2,
        limit: int | float | str | None = None,
        grow_after_batches: int = 100,
        sync_each_chunk: bool = True,
        recover: bool = False,
    ) -> None:
        super().__init__()
        check_splitting(
            "Microbatching",
            num_microbatches,
            microbatch_size,
            loss_reduction,
            weight_fn,
            split_fn,
            finds_size=True,
        )
        if num_microbatches == "auto":
            num_microbatches, microbatch_size = None, "auto"
        check_batchnorm("Microbatching", batchnorm, num_batchnorm_sweeps)
        check_count("Microbatching", "grow_after_batches", grow_after_batches, optional=False)
        check_flags("Microbatching", sync_each_chunk=sync_each_chunk)
        if batchnorm == "synchronized" and microbatch_size == "auto":
            raise ArgumentError(
                "`Microbatching(batchnorm='synchronized')` needs a fixed size, since its pass over the whole "
                "batch takes memory that no microbatch size changes, but got microbatch_size='auto'. "
                "Give a size, or use batchnorm='pooled'."
            )
        if limit is not None and microbatch_size != "auto":
            raise ArgumentError(
                f"`Microbatching(limit)` needs microbatch_size='auto', but got limit={limit!r} with "
                f"microbatch_size={microbatch_size}. Leave out the limit, or let it choose the size."
            )
        if not isinstance(recover, bool) or (recover and microbatch_size is None):
            raise ArgumentError(
                "`Microbatching(recover)` must be True or False, and needs a microbatch_size to halve, but "
                f"got recover={recover!r} with microbatch_size={microbatch_size}. Give a size in the place "
                "of num_microbatches."
            )
        if recover and batchnorm == "synchronized":
            raise ArgumentError(
                "`Microbatching(recover=True)` does not go with batchnorm='synchronized', whose pass over "
                "the whole batch takes memory that no microbatch size changes. Use batchnorm='pooled'."
            )
        self._splitter = Splitter(loss_reduction, weight_fn, split_fn)
        self._batchnorm: BatchNormMode = batchnorm
        self._num_sweeps = num_batchnorm_sweeps
        self._grow_after_batches = grow_after_batches
        self._sync_each_chunk = sync_each_chunk
        self._size: AutoSize | FixedSplit
        self._limit: ByteLimit | None = None
        if microbatch_size == "auto":
            self._limit = None if limit is None else ByteLimit(limit, "Microbatching(limit)")
            limit_bytes = None if self._limit is None else self._limit.num_bytes
            self._size = AutoSize(limit_bytes, grow_after_batches)
        elif recover and isinstance(microbatch_size, int):
            self._size = GivenSize(microbatch_size, grow_after_batches)
        else:
            self._size = FixedSplit(num_microbatches, microbatch_size)
        self._has_batchnorm = False
        self._num_events_logged = 0
        self._recovery: Recovery | None = None
        self._fits: tuple[weakref.ref[Trainer], weakref.ref[LightningModule]] | None = None
        self._undo: list[Callable[[], None]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything runs."""
        if stage != "fit":
            return
        refuse_mix("Microbatching", trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        num_given = sum(isinstance(callback, Microbatching) for callback in callbacks)
        self.settle_limit(trainer)
        validate_run(trainer, pl_module, self._size, num_given)
        training_loop.check(trainer)
        self._forget_other_runs(trainer, pl_module)

    def settle_limit(self, trainer: Trainer) -> None:
        """Take the limit on the device of a run, which may be a share of what that has.

        Args:
            trainer: fits.
        """
        if isinstance(self._size, AutoSize) and self._limit is not None:
            self._size.limit_bytes = self._limit.on(trainer.strategy.root_device)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of the training loop's closure; the model is complete and on its device by now."""
        policy = BatchNormPolicy(pl_module, self._batchnorm, self._num_sweeps)
        self._has_batchnorm = policy.has_layers
        if policy.has_layers and self._batchnorm == "pooled" and self._splits:
            rank_zero_info(
                "Microbatching: batch normalisation normalises each microbatch by its own statistics "
                "(running statistics are pooled over the batch). "
                'Microbatching(batchnorm="synchronized") normalises by those of the whole batch; '
                "replace_batchnorm(model, GroupNorm()) does without batch statistics."
            )
        if not self._sync_each_chunk:
            validate_sync_each_chunk(trainer, pl_module)
        closures = ClosureFactory(
            trainer, pl_module, self._splitter, self._size, policy, self._sync_each_chunk
        )
        self._recovery = closures.recovery
        self._undo = [training_loop.install_closure(trainer, closures.make)]
        if self._recovery is not None:
            self._undo.append(training_loop.install_around_step(trainer, self._recovery.around_update))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the batch from its beginning if a size is to be found with it."""
        if self._recovery is not None:
            self._recovery.begin_batch(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Watch the step if it is not known what it will hold."""
        if self._recovery is not None:
            self._recovery.before_update()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the size that was chosen or changed."""
        if isinstance(self._size, FixedSplit):
            return
        if self._recovery is not None:
            self._recovery.end_batch()
        for event in self._size.events[self._num_events_logged :]:
            rank_zero_info(f"Microbatching, {event}")
        if len(self._size.events) > self._num_events_logged:
            training_loop.log_scalar(trainer, "microbatching/microbatch_size", float(self._size.size or 0))
        self._num_events_logged = len(self._size.events)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the training loop as it was found: after an error Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the training loop as it was found."""
        if self._recovery is not None:
            self._recovery.end_batch()
            self._recovery = None
        for undo in self._undo:
            undo()
        self._undo = []

    def _forget_other_runs(self, trainer: Trainer, model: LightningModule) -> None:
        """Begin anew, unless the same trainer goes on with the same model."""
        before, self._fits = self._fits, (weakref.ref(trainer), weakref.ref(model))
        if before is None or (before[0]() is trainer and before[1]() is model):
            return
        self._has_batchnorm, self._num_events_logged = False, 0
        if isinstance(self._size, GivenSize):
            self._size = GivenSize(self._size.given, self._grow_after_batches)
        elif isinstance(self._size, AutoSize):
            self._size = AutoSize(self._size.limit_bytes, self._grow_after_batches)

    def __getstate__(self) -> dict[str, Any]:
        # Sent to spawned processes and copied by tuners; which run it was for is not known there.
        return {**self.__dict__, "_fits": None, "_recovery": None}

    def state_dict(self) -> dict[str, Any]:
        """The size that was found, so that a resumed run goes on with it."""
        return self._size.state_dict() if isinstance(self._size, AutoSize) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a size that was found."""
        if isinstance(self._size, AutoSize) and state_dict:
            self._size.load_state_dict(state_dict)

    @property
    def microbatch_size(self) -> int | None:
        """Most samples per chunk; ``None`` before ``"auto"`` chose, or if chunks are counted."""
        return self._size.size if isinstance(self._size, AutoSize) else self._size.microbatch_size

    @property
    def repeats_backward(self) -> bool:
        """Whether a batch may be run again after a part of its backward, from the weights it began with."""
        return isinstance(self._size, AutoSize) or self._batchnorm == "synchronized"

    @property
    def _splits(self) -> bool:
        return not (isinstance(self._size, FixedSplit) and self._size.num_microbatches == 1)

    @property
    def exact(self) -> bool:
        """Whether the result is that of the whole batch in exact arithmetic; known once a fit has begun."""
        return not self._has_batchnorm or not self._splits

    __repr__ = readable_repr

    def technique_record(self) -> TechniqueRecord:
        """Settings in force, and what was chosen or changed during the run."""
        size = self._size
        counted = isinstance(size, FixedSplit) and size.num_microbatches is not None
        settings: dict[str, Any] = (
            {"num_microbatches": size.num_microbatches}
            if isinstance(size, FixedSplit) and counted
            else {"microbatch_size": self.microbatch_size}
        )
        settings["loss_reduction"] = self._splitter.loss_reduction
        if not self._sync_each_chunk:
            settings["sync_each_chunk"] = False
        if self._has_batchnorm:
            settings["batchnorm"] = self._batchnorm
        events = tuple(size.events) if isinstance(size, AutoSize) else ()
        return TechniqueRecord(name="Microbatching", settings=settings, events=events)
