"""The callback that trains a model sparsely from the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.compat.lightning_private import batches_that_stepped
from lightning_memtrain.coordination import on_gradient_sync
from lightning_memtrain.core import TechniqueRecord
from lightning_memtrain.sparsity import distributed, sharding
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.methods.update_schedules import RunLength, UpdateEvery, UpdateSchedule
from lightning_memtrain.sparsity.pattern_updater import PatternUpdater
from lightning_memtrain.sparsity.run.argument_validation import refuse_arguments, warn_of_update
from lightning_memtrain.sparsity.run.checkpoint_validation import (
    identity,
    refuse_checkpoint,
    refuse_layers_of,
)
from lightning_memtrain.sparsity.run.converted_model import ConvertedModel
from lightning_memtrain.sparsity.run.dense_checkpoints import Leave, make_dense, make_sparse, patterns_of
from lightning_memtrain.sparsity.run.model_hooks import around_checkpoints, around_configure_model
from lightning_memtrain.sparsity.run.run_optimizers import (
    leading_optimizer,
    refuse_optimizers,
    stepped_paths,
    warn_of_groups,
)
from lightning_memtrain.sparsity.run.run_validation import (
    refuse_run,
    run_length,
    validate_update_steps,
    warn_of_recompiling,
)
from lightning_memtrain.sparsity.run.statistics import SparsityStatistics
from lightning_memtrain.sparsity.run.update_timer import UpdateTimer
from lightning_memtrain.sparsity.selection.layer_copies import followers
from lightning_memtrain.sparsity.selection.select import Select, has_selectable_layers
from lightning_memtrain.sparsity.storage.checkpoint_key import with_checkpoint_key
from lightning_memtrain.sparsity.storage.patterns import Storage
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, weights_by_path
from lightning_memtrain.sparsity.storage.sparsify import densify_
from lightning_memtrain.sparsity.unfinished_update import UpdateResult

_VERSION = 1


class SparseTraining(Callback):
    r"""Trains with few nonzero weights, and stores only these: values, gradients and optimizer state.

    Layers are converted when a Trainer first sees the model, before checkpoints are loaded and optimizers
    made; they stay sparse after the run. The pattern changes after optimizer steps, as the method says.
    :func:`export_dense` gives a plain ``state_dict``.

    Works with gradient accumulation, microbatches, checkpointing, low precision, ``ddp`` and manual
    optimization. Steps are those of the first optimizer that holds sparse weights; a step that a gradient
    scaler leaves out does not count. The pattern changes at the end of the batch in which a step was due.
    With manual optimization, a fraction of the run takes one step per batch.

    Works with ``fully_shard`` if the method keeps the number of weights of each layer. There, layers are
    converted before ``configure_model``; see :meth:`convert` for those that are made in it.

    Args:
        method: how sparse, and what changes, e.g. ``RigL(0.9)``.
        update: after which steps; by default as in the method's paper.
        layers: which become sparse; by default :class:`Select` without arguments.
        storage: form of the pattern: ``"bitmask"``, ``"int32"``, ``"block16"``, or ``"auto"`` for the fewest
            bytes.
        chunk_bytes: most bytes of a dense weight that a linear layer makes at a time, e.g. ``"1MiB"``;
            ``None`` for the whole.
        seed: of the pattern and of what grows. No other random numbers are used.
        track_exploration: keep a bit per weight in host memory, to say how many positions were ever active.
        leave: what the model is after a run: ``"sparse"``, as small as it was in training, or ``"dense"``,
            for code that knows of no sparse layers. Then checkpoints hold dense weights as well.

    Raises:
        ArgumentError: if an argument is out of its range.
        MisconfigurationException: before the run, with strategies that shard otherwise, with averages of
            weights, with tied weights, or if the run has no end that a schedule or a fraction needs; when
            resuming, if the checkpoint has another sparsity of layers.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_memtrain.sparsity import RigL, UpdateEvery
        >>> model = BoringModel()
        >>> trainer = L.Trainer(
        ...     max_steps=4, callbacks=[SparseTraining(RigL(0.75), UpdateEvery(2))], accelerator="cpu",
        ...     logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(model)
        >>> model.layer
        SparseLinear(in_features=32, out_features=2, bias=True, nnz=16, storage='bitmask')
    """

    def __init__(
        self,
        method: SparseMethod,
        update: UpdateSchedule | None = None,
        layers: Select | None = None,
        storage: Storage = "auto",
        chunk_bytes: int | str | None = None,
        seed: int = 0,
        track_exploration: bool = False,
        leave: Leave = "sparse",
    ) -> None:
        super().__init__()
        refuse_arguments(method, update, layers, storage, chunk_bytes, seed, track_exploration, leave)
        self.method = method
        self.select = layers or Select()
        self.update_schedule = update or method.default_update
        self._seed = seed
        self._tracks = track_exploration
        self._leaves_dense = leave == "dense"
        warn_of_update(method, update)
        self._undo: list[Callable[[], None]] = []
        self._end_of_loading: Callable[[], None] | None = None
        self._converted = ConvertedModel(method, self.select, seed, storage, chunk_bytes)
        self._reset()

    def _reset(self) -> None:
        self._statistics = SparsityStatistics(self.method)
        self._left: TechniqueRecord | None = None
        self._with_gradient: set[str] = set()
        self._updater: PatternUpdater | None = None
        self._timer = UpdateTimer(self.method, self._seed)
        self._watched_at = -1  # the global step; any other means that the step was left out
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and convert the model as soon as it is complete."""
        self._remove_hooks()
        refuse_mix("SparseTraining", trainer)
        num_given = sum(isinstance(one, SparseTraining) for one in trainer.callbacks)  # type: ignore[attr-defined]
        refuse_run(trainer, num_given, self.method, "dense" if self._leaves_dense else "sparse")
        if stage == "fit":
            self._left = None
            if trainer.global_step == 0:  # else the same trainer goes on
                self._reset()
            self._restored = None
            self._statistics.begin_run()

        def before() -> None:
            self._converted.begin()
            if sharding.divides_parameters(trainer.strategy) and has_selectable_layers(pl_module):
                self.convert(pl_module)

        # By then the model is complete, neither loaded nor known to an optimizer; what it shards is not.
        self._undo += [
            around_configure_model(pl_module, before, lambda: self._adopt(trainer, pl_module, stage)),
            around_checkpoints(
                pl_module,
                on_save=self._make_dense,
                on_load=lambda checkpoint: make_sparse(checkpoint, self.state_key, self._weights),
            ),
        ]

    def rehearse(self) -> None:
        """Change the pattern after step 2, if ever, for a run of three that is to show what all take."""
        if self.update_schedule is not None:
            self.update_schedule = UpdateEvery(2, stop=1.0)

    def convert(self, model: nn.Module) -> None:
        """Make layers sparse now, for a ``configure_model`` that makes layers and shards them.

        Call this after the layers are made and before ``fully_shard``; otherwise there is no need to::

            next(one for one in self.trainer.callbacks if isinstance(one, SparseTraining)).convert(self)

        Args:
            model: becomes sparse in place, unless it is already.

        Raises:
            MisconfigurationException: if a weight is tied or has no data yet.
        """
        self._converted.convert(model)

    def _adopt(self, trainer: Trainer, model: LightningModule, stage: str) -> None:
        is_divided = sharding.divides_parameters(trainer.strategy)
        if self._converted.adopt(model, is_divided=is_divided):
            self._reset()  # the same trainer goes on with another model
        self._statistics.measure_share(model, self._weights)
        if is_divided:
            sharding.refuse_other_shards(self._weights, trainer.world_size)
        if self._weights and distributed.is_replicated(trainer.strategy):
            if stage == "fit":
                distributed.refuse_nothing_left(model, self._weights)
            weights = {weight.name: weight for weight in self._weights.values()}
            self._undo.append(distributed.hide_from_ddp(model, weights))
        expected = frozenset(weight.module_path for weight in self._weights.values())
        handle = model.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            lambda _, state, *rest: refuse_layers_of(state, expected)
        )
        self._end_of_loading = handle.remove

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the steps of the optimizer that holds sparse weights; the checkpoint has been loaded."""
        if self._end_of_loading is not None:
            self._end_of_loading()
        sharding.reshard(pl_module)  # whole parameters are others than those that optimizers have
        values = self._values()
        warn_of_groups(trainer.optimizers, values)
        warn_of_recompiling(pl_module, self.method)
        if self.update_schedule is not None:
            refuse_optimizers(trainer.optimizers, values)
        if trainer.global_step == 0 and self._restored is None:
            self._converted.follow_trained(pl_module, trainer.optimizers)
        self._converted.note_training()
        if distributed.is_replicated(trainer.strategy):
            distributed.broadcast_values(self._weights)
            self._undo.append(on_gradient_sync(self._average_gradients))
        leading = leading_optimizer(trainer.optimizers, values)
        if leading is not None:
            self._undo.append(leading.register_step_post_hook(self._timer.count_step).remove)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count in steps when the pattern changes; the length of the run is known by now."""
        run = run_length(trainer)
        if self.update_schedule is not None and self._weights:
            self._timer.update_steps = self.update_schedule.in_steps(run)
            # By hand there may be any number of steps per batch.
            known = run if pl_module.automatic_optimization else RunLength()
            nnz = {name: weight.nnz for name, weight in self._weights.items()}
            validate_update_steps(self._timer.update_steps, known, self.method, nnz)
        if self._updater is None:
            self._updater = PatternUpdater(self._weights, self.method, trainer.world_size)
        self._updater.weights = dict(self._weights)  # others, if the run before has left dense ones
        if self._restored is not None:
            self._updater.load_state_dict(self._restored)
        if self._tracks and not self._statistics.explored:
            self._statistics.track_exploration(self._weights, (self._restored or {}).get("explored") or {})
        self._restored = None
        self._statistics.log_start(self._timer.num_steps, self._weights, self._converted.copies)
        if self._updater.unfinished is not None:
            everything = weights_by_path(pl_module)
            self._report(trainer, self._updater.finish(everything, trainer.optimizers))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the gradient if the pattern changes after this step; the first of its batches begins."""
        assert self._updater is not None
        due = self._timer.next_due()
        if due and (not self._updater.is_watching or self._watched_at != trainer.global_step):
            freed = any(getattr(one, "frees_gradients", False) for one in trainer.callbacks)  # type: ignore[attr-defined]
            self._updater.watch(self._timer.time_of(due), gradients_stay=not freed)
            self._watched_at = trainer.global_step
        self._timer.begin_batch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Average the gradients of values over ranks, before anything looks at them."""
        if distributed.is_replicated(trainer.strategy) and distributed.synchronizes(trainer.strategy):
            self._average_gradients()
        elif self._updater is not None:
            self._updater.record_gradients()
        self._with_gradient |= {path for path, one in self._values().items() if one.grad is not None}
        if self._updater is not None:
            self._with_gradient |= set(self._updater.seen)

    def _average_gradients(self) -> None:
        distributed.average_gradients(self._weights)
        if self._updater is not None:
            self._updater.record_gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Change the pattern if a step was due."""
        assert self._updater is not None
        self._timer.end_batch()
        if not self._statistics.is_measured and self._timer.num_steps:
            if self.update_schedule is not None:  # what has state by now, long before an update
                refuse_optimizers(trainer.optimizers, self._values())
            self._statistics.measure_bytes(self._weights, trainer.optimizers)
        if not self._timer.pending:
            return
        now = self._timer.time_of(self._timer.pending)
        if self._updater.lacks_candidates(now):
            return
        sharding.reshard(pl_module)
        self._updater.followers = self._followers(trainer, pl_module)
        self._report(trainer, self._updater.update(now, trainer.optimizers))

    def _report(self, trainer: Trainer, moved: UpdateResult) -> None:
        assert self._updater is not None
        self._timer.pending = 0
        self._statistics.add_update(moved)
        self._statistics.measure_bytes(self._weights, trainer.optimizers)
        self._statistics.record_positions(self._weights)
        metrics = self._statistics.metrics(self._weights, moved, self._updater.state)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=batches_that_stepped(trainer))

    def _followers(self, trainer: Trainer, model: LightningModule) -> dict[str, list[SparseWeight]]:
        """Layers that are never stepped, such as a teacher's, by the layer whose copies they are."""
        weights = weights_by_path(model)
        trained = stepped_paths(trainer.optimizers, self._values(), self._with_gradient)
        return followers(weights, trained, self._converted.copies, self._weights)

    @property
    def _weights(self) -> dict[str, SparseWeight]:
        return self._converted.weights

    def _values(self) -> dict[str, nn.Parameter]:
        return {path: weight.values for path, weight in self._weights.items()}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take all hooks away: after an error Lightning calls no ``teardown``.

        Layers stay sparse in any case, so that a checkpoint that is saved now can be resumed.
        """
        self._remove_hooks()
        self._converted.forget_conversion()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave dense weights, if that was asked for: the last checkpoint has been saved."""
        self._leave(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take all hooks away; the layers stay sparse unless dense ones were asked for."""
        self._leave(trainer, pl_module)
        self._remove_hooks()

    def _leave(self, trainer: Trainer, model: LightningModule) -> None:
        if self._leaves_dense and self._weights:
            self._left = self._left or self.technique_record()
            densify_(model, trainer.optimizers)
            self._converted.weights = {}

    def _remove_hooks(self) -> None:
        if self._updater is not None:
            self._updater.close()
        for undo in (self._end_of_loading, *self._undo):
            if undo is not None:
                undo()
        self._undo, self._end_of_loading = [], None

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say among the weights how they are loaded, or make them dense."""
        self._make_dense(checkpoint)
        # Those of shards are read name by name.
        if self._weights and not self._leaves_dense and not sharding.divides_parameters(trainer.strategy):
            checkpoint["state_dict"] = with_checkpoint_key(checkpoint["state_dict"])

    def _make_dense(self, checkpoint: dict[str, Any]) -> None:
        if self._leaves_dense:
            make_dense(checkpoint, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides values and patterns, which are in the model's own."""
        if not self._weights or self._updater is None:
            return {}
        return {
            **identity(self.method, self.select.overrides, self._seed, _VERSION),
            "steps": self._timer.num_steps,
            "pending": self._timer.pending,
            **self._updater.state_dict(),
            **self._statistics.state_dict(),
            "patterns": {
                name: distributed.pattern_fingerprint(w.positions()) for name, w in self._weights.items()
            },
            "stored": patterns_of(self._weights) if self._leaves_dense else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was saved.

        Args:
            state_dict: of :meth:`state_dict`.

        Raises:
            MisconfigurationException: if it was saved at another sparsity, by a later version of this
                library, or with other patterns than those that the model has.
        """
        if not state_dict:
            return
        found = {name: distributed.pattern_fingerprint(w.positions()) for name, w in self._weights.items()}
        refuse_checkpoint(state_dict, self.method, self.select.overrides, self._seed, _VERSION, found)
        self._timer.num_steps, self._timer.pending = state_dict["steps"], state_dict["pending"]
        self._statistics.load_counts(state_dict)
        self._restored = state_dict

    @property
    def exact(self) -> bool:
        """A sparse model is another model."""
        return False

    def technique_record(self) -> TechniqueRecord:
        """How sparse the model is, what changed, and the bytes of a dense one."""
        if self._left is not None:
            return self._left
        return self._statistics.technique_record(self._weights, self._updater.state if self._updater else {})
