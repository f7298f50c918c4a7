"""The probe of a batch: chunks of it are tried until the largest that fits is known."""

from __future__ import annotations

from typing import Any

from lightning_memtrain.coordination import aside
from lightning_memtrain.core.devices.device_memory import free_device_bytes
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.microbatching import rank_agreement
from lightning_memtrain.microbatching.automatic_size import size_choice
from lightning_memtrain.microbatching.automatic_size.chunk_trials import ChunkTrials
from lightning_memtrain.microbatching.automatic_size.fitting_size import (
    BatchConditions,
    FittingSize,
    trained_parameters,
)
from lightning_memtrain.microbatching.automatic_size.limit_errors import (
    limit_error,
    other_limit_error,
    update_limit_error,
)
from lightning_memtrain.microbatching.automatic_size.size_search import largest_fitting
from lightning_memtrain.microbatching.automatic_size.update_forecast import update_signature
from lightning_memtrain.microbatching.automatic_size.update_guard import UpdateGuard
from lightning_memtrain.microbatching.batch_snapshot import BatchSnapshot, restore
from lightning_memtrain.microbatching.chunk_runner import ChunkRunner
from lightning_memtrain.microbatching.training_loop import Backward
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors


class SizeProbe:
    """Finds sizes for batches, on all ranks when one of them has to.

    Args:
        runner: runs the chunks.
        size: told what is found.
        guard: told which steps of the optimizer cannot be foretold.
    """

    def __init__(self, runner: ChunkRunner, size: size_choice.AutoSize, guard: UpdateGuard) -> None:
        self._runner = runner
        self._trainer = runner.trainer
        self._device = self._trainer.strategy.root_device
        self._size = size
        self._guard = guard
        self._held = HeldTensors()
        self._ledger: MemoryLedger | None = None
        self._unknown_bytes: int | None = None  # within reach before the first batch, but used in no step

    @property
    def is_watching(self) -> bool:
        """Whether the batch at hand is watched."""
        return self._ledger is not None

    def watch(self, batch: Any) -> None:
        """Watch a batch from now on.

        Args:
            batch: the whole batch.
        """
        model, optimizers = self._runner.model, self._trainer.optimizers
        held = self._held.beside_steps(self._trainer, model)
        ledger = MemoryLedger(model, optimizers, batch, device=self._device, held=held)
        self._ledger = ledger.__enter__()

    def stop(self) -> None:
        """Stop watching the batch at hand; nothing happens if none is watched."""
        if self._ledger is not None:
            self._ledger.__exit__(None, None, None)
            self._ledger = None

    def conditions(self, batch: Any, held_bytes: int) -> BatchConditions:
        """What the memory of a batch depends on.

        Args:
            batch: the whole batch.
            held_bytes: what is held from batch to batch.

        Returns:
            All of it.
        """
        runner = self._runner
        tensors = [tensor for tensor in tensors_in(batch) if tensor.device.type == self._device.type]
        # Only the default way of splitting is known to split along the first axis.
        first = 1 if runner.splitter.split_fn is None else 0
        return BatchConditions(
            num_samples=runner.splitter.batch_size(batch),
            shapes=tuple(tuple(tensor.shape[first:]) for tensor in tensors),
            batch_bytes=sum(tensor.nbytes for tensor in tensors),
            trained=trained_parameters(runner.model),
            accumulating=self.accumulates,
            held_bytes=held_bytes,
            update=update_signature(self._trainer.optimizers),
        )

    @property
    def accumulates(self) -> bool:
        """Whether gradients of earlier batches may be there."""
        return self._trainer.accumulate_grad_batches > 1

    def find(self, kwargs: Any, backward: Backward, snapshot: BatchSnapshot, now: BatchConditions) -> None:
        """Find the size to start from. Leaves no trace but the size.

        Args:
            kwargs: arguments of ``training_step`` by name.
            backward: backward of a loss; ``None`` to skip it.
            snapshot: of the state before the batch.
            now: the batch.

        Raises:
            MisconfigurationException: on all ranks, if a single sample is too much on one of them.
        """
        trainer, limit_bytes = self._trainer, self._limit_bytes()
        # A rank whose batch fits as a whole may be asked for chunks, which find gradients of others.
        finds_gradients = now.accumulating or trainer.world_size > 1
        assert self._ledger is not None
        unknown_bytes = snapshot.bytes_unknown_to(self._ledger)
        if self._unknown_bytes is None:
            self._unknown_bytes = unknown_bytes
        spared_bytes = 0 if finds_gradients else sum(p.nbytes for p in self._runner.model.parameters())
        with aside("probe"):
            trials = ChunkTrials(
                self._runner,
                kwargs,
                backward,
                snapshot,
                self._ledger,
                self._guard,
                limit_bytes,
                max(0, unknown_bytes - self._unknown_bytes),
                accumulating=now.accumulating,
                finds_gradients=finds_gradients,
            )
            try:
                peak = largest_fitting(trials.measure, now.num_samples, limit_bytes, spared_bytes)
            finally:
                restore(snapshot)
        refusal = self._refusal(trials, limit_bytes) if peak.size == 1 else None
        said = 0 if refusal is None else 2 if refusal is trials.out_of_reach.get(1) else 1
        if rank_agreement.highest_of_ranks(trainer, said) == 2:
            raise refusal if said == 2 and refusal is not None else other_limit_error()
        rank_agreement.raise_on_all_ranks(trainer, refusal)
        measured = trials.measured.get(peak.size)
        # Ranks meet when such a step is over, so all watch it or none.
        is_unknown = trials.forecast is not None and bool(trials.forecast.unknown)
        if rank_agreement.highest_of_ranks(trainer, int(is_unknown)):
            self._guard.follow(now.update)
        self._size.start(
            trainer.global_step,
            FittingSize(
                size=peak.size,
                peak_bytes=peak.num_bytes,
                limit_bytes=limit_bytes,
                growing_bytes=0 if measured is None else measured.growing_bytes,
                kept_bytes=0 if measured is None else measured.kept_bytes,
                coming_bytes=trials.coming_bytes,
                updates=(now.update,) if trials.forecast is None else trials.forecast.signatures,
                made_for=now,
            ),
        )

    def _refusal(self, trials: ChunkTrials, limit_bytes: int) -> Exception | None:
        """The reason why a single sample at a time does not fit into a limit that was given."""
        if 1 in trials.out_of_reach:
            return trials.out_of_reach[1]
        if self._size.limit_bytes is None:
            return None
        single, at_least = trials.measured.get(1), False
        if single is None:
            needed_bytes = trials.needed_bytes.get(1)
            if needed_bytes is None:
                return None  # whatever else broke it off, such as the device itself, speaks for itself
            at_least, single = True, trials.least()._replace(chunks_bytes=needed_bytes, held=trials.held)
        if not at_least and single.peak_bytes <= limit_bytes:
            return None
        if single.update_bytes <= max(limit_bytes, single.chunks_bytes) or trials.forecast is None:
            return limit_error(
                limit_bytes,
                single.chunks_bytes,
                single.held,
                trials.coming_bytes,
                trials.unseen,
                at_least=at_least,
            )
        return update_limit_error(
            limit_bytes,
            single.update_bytes,
            single.left,
            trials.forecast.kept_bytes,
            trials.forecast.over_bytes,
            trials.unseen_before_update,
        )

    def _limit_bytes(self) -> int:
        if self._size.limit_bytes is not None:
            return self._size.limit_bytes
        free_bytes = free_device_bytes(self._device)
        assert free_bytes is not None
        return free_bytes
