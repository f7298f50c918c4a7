"""The callback that makes a run keep a limit."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]

from lightning_memtrain.checkpointing.selection.held_beside import HeldBeside
from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.core import ArgumentError, TechniqueRecord, format_bytes, is_out_of_memory
from lightning_memtrain.core.arguments.value_checks import check_kinds
from lightning_memtrain.core.devices.device_memory import free_device_bytes
from lightning_memtrain.planning.fit.allowed import checked_allow
from lightning_memtrain.planning.fit.find_ways import find_ways
from lightning_memtrain.planning.fit.holding.circumstances import Circumstances
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint
from lightning_memtrain.planning.fit.holding.plan_guard import refuse_other_run, unplanned_bytes
from lightning_memtrain.planning.fit.limits import (
    Limit,
    check_limit,
    limit_in_bytes,
    refuse_less_than_weights,
)
from lightning_memtrain.planning.fit.plan import Plan
from lightning_memtrain.planning.fit.refusals import (
    is_fsdp2,
    refusal_of_own,
    refusal_within_fsdp2,
    strategy_refusal,
)
from lightning_memtrain.planning.fit.running.agreement import (
    any_rank,
    plan_of_largest,
    without_planners,
)
from lightning_memtrain.planning.fit.running.applied_way import AppliedWay
from lightning_memtrain.planning.fit.running.begun_run_validation import refuse_what_needs_a_trainer
from lightning_memtrain.planning.fit.running.device_in_use import device_of, reserved_on
from lightning_memtrain.planning.fit.running.known_plans import KnownPlans
from lightning_memtrain.planning.fit.running.one_rank import beside_buckets, bucket_bytes, one_rank
from lightning_memtrain.planning.fit.running.plan_words import cure, in_words
from lightning_memtrain.planning.fit.showing.plan_loggers import log_plan
from lightning_memtrain.planning.fit.showing.plan_table import floor_lines


class FitMemory(pl.Callback):
    """Makes a run keep a limit of memory, in the least time, and leaves its result as it is.

    Before the first step it finds out, on tensors without data, what the run needs as it is and by which
    techniques it needs less, and applies the fastest way that keeps the limit: microbatches, recomputation,
    stepping in backward. A run that fits is left alone. One that cannot fit is refused before it trains, with
    the least that it needs.

    The plan is looked at again before each batch: larger batches, parameters that are thawed or added to an
    optimizer have it made anew. It is saved in checkpoints. If memory runs out all the same, the batch is run
    again in smaller parts, and the plan keeps to these.

    Args:
        limit: the most memory to use: bytes, ``"11GiB"``, or a fraction of what the GPU has, such as
            ``0.9``. On a GPU what torch reserves and CUDA's context, on the CPU what is allocated. ``None``
            for all that the GPU has; the CPU needs a limit.
        allow: what may change the result: ``"batchnorm-statistics"``, ``"compressed-activations"``. What
            else :func:`~lightning_memtrain.plan` knows has to be given to Trainer when it is made, which
            :meth:`.Plan.trainer_kwargs` does.
        plan: a plan, or the file of one, to follow in the place of a new one.

    Raises:
        ArgumentError: if an argument makes no sense.
        MisconfigurationException: before the first step, if the limit cannot be kept, or strategy or model
            cannot be planned; later, if it can no longer be kept.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[FitMemory("11GiB")], logger=False, enable_checkpointing=False)
        >>> print(trainer.callbacks[0].technique_record())
        FitMemory(limit='11GiB', way=None)
    """

    #: Left out of what is predicted.
    plans_memory = True

    def __init__(
        self,
        limit: Limit = None,
        allow: str | Iterable[str] = (),
        plan: Plan | str | Path | None = None,
    ) -> None:
        super().__init__()
        try:
            check_limit(limit, "FitMemory(limit)")
            self.allow = checked_allow(allow, "FitMemory(allow)")
            self._given = Plan.load(plan) if isinstance(plan, (str, Path)) else plan
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise ArgumentError(str(error)) from error
        check_kinds(
            "FitMemory", (Plan, type(None)), "a Plan or the file of one", "Leave it out.", plan=self._given
        )
        refuse_what_needs_a_trainer(self.allow, self._given)
        self.limit = limit
        self._forget()

    def _forget(self) -> None:
        self._known = KnownPlans()
        self._applied: AppliedWay | None = None
        self._in_force: Plan | None = None
        self._events: list[str] = []
        self._states: Mapping[str, Any] = {}
        self._resumed: dict[str, Any] | None = None
        self._held: HeldBeside | None = None
        self._limit_bytes = 0
        self._missing_bytes = 0
        self._run: tuple[weakref.ref[Any], weakref.ref[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Sent to other processes and copied by tuners; what is applied belongs to the run that goes on here.
        nothing = dict.fromkeys(("_run", "_applied", "_in_force", "_held"))
        state = {**self.__dict__, **nothing, "_known": KnownPlans()}
        return {**state, "_states": {}, "_resumed": None}

    @property
    def plan(self) -> Plan | None:
        """The plan in force; ``None`` before the first batch."""
        return self._in_force

    # ------------------------------------------------------------------ begin

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot be planned, and come first, so that nobody watches while a step is planned."""
        if stage != "fit":
            return
        refuse_mix("FitMemory", trainer)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if self._applied is not None:
            self._applied.leave(trainer)
        strategy = trainer.strategy
        without_plan = refusal_within_fsdp2(strategy, self._given is not None)
        for refused in (strategy_refusal(strategy), without_plan, refusal_of_own(callbacks)):
            if refused:
                raise MisconfigurationException(f"`FitMemory` {refused}")
        # Lightning walks along this list: what comes before this callback has had its turn.
        callbacks.remove(self)
        callbacks.insert(0, self)
        before = self._run
        if before is not None and not (before[0]() is trainer and before[1]() is pl_module):
            self._forget()
        self._applied, self._in_force, self._states = None, None, {}
        self._run = weakref.ref(trainer), weakref.ref(pl_module)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Follow the plan that is there already: one that was given, or one of a checkpoint."""
        self._held = HeldBeside(trainer, pl_module)
        device = device_of(trainer.strategy.root_device)
        try:
            available_bytes = free_device_bytes(trainer.strategy.root_device)
            if available_bytes is not None:
                available_bytes += device.context_bytes
            given = self._given.limit_bytes if self._given is not None and self.limit is None else self.limit
            self._limit_bytes = limit_in_bytes(given, device, "FitMemory(limit)", available_bytes)
            if not is_fsdp2(trainer.strategy):
                refuse_less_than_weights(
                    given, self._limit_bytes, pl_module, self.allow, device, "FitMemory(limit)"
                )
        except ValueError as error:
            raise MisconfigurationException(str(error)) from error
        if self._resumed is not None:
            self._take_resumed(trainer, pl_module)
        if self._given is not None and self._in_force is None:
            refuse_other_run(self._given.fingerprint, pl_module)
            self._follow(self._given, trainer, pl_module, in_training=False)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Plan, or see that the plan holds for this batch."""
        if self._resumed is not None:  # a strategy that restores late
            self._take_resumed(trainer, pl_module, in_training=True)
        now = Circumstances.of(trainer, pl_module, batch, self._held)
        held = self._known.plan_for(now, self._limit_bytes, self._in_force)
        if (
            held is None
            and self._given is not None
            and not self._known
            and self._is_for(self._given, now, batch)
        ):
            held = self._known.add(now.with_steps_of(self._given.found), self._given)
        if any_rank(trainer, held is None):
            if is_fsdp2(trainer.strategy):
                lacks = f": {self._known.lacks(now)}" if held is None and self._known else ""
                raise MisconfigurationException(
                    f"`FitMemory(plan)` was made for less than step {trainer.global_step} needs on some rank"
                    f"{lacks}. FSDP2 has sharded the model, so that it cannot be planned again. Plan with "
                    "the largest batch of the run and all parameters that it will train."
                )
            self._plan(trainer, pl_module, batch, now)
        elif held is not self._in_force and held is not None:
            self._follow(held, trainer, pl_module, in_training=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Learn from what the step needed more than was planned."""
        self._learn_smaller_size(trainer)
        reserved_bytes = reserved_on(trainer.strategy.root_device)
        plan, way = self._in_force, self._applied.way if self._applied else None
        if reserved_bytes is None or plan is None or way is None or way.reserved_bytes is None:
            return
        over_bytes = reserved_bytes + plan.device.context_bytes - self._limit_bytes
        if over_bytes > 0 and reserved_bytes > way.reserved_bytes:
            self._missing_bytes += reserved_bytes - way.reserved_bytes
            self._known.forget()
            self._say(
                trainer,
                f"{format_bytes(reserved_bytes)} are reserved where {format_bytes(way.reserved_bytes)} were "
                "predicted; planned again with so much less",
            )

    # ------------------------------------------------------------------ planning

    def _plan(self, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, now: Circumstances) -> None:
        if self._applied is not None:
            self._applied.end(trainer, model)
            self._applied = None

        def make() -> tuple[Plan, Circumstances]:
            source = trainer.datamodule if batch is None else None  # type: ignore[attr-defined]
            buckets = bucket_bytes(trainer, model)
            with without_planners(trainer):
                found = find_ways(
                    model,
                    batch,
                    datamodule=source,
                    trainer=one_rank(trainer),
                    device=device_of(trainer.strategy.root_device),
                    limit_bytes=self._limit_bytes - self._missing_bytes - buckets,
                    allow=self.allow,
                )
            # The model is about to change, so that nothing more can be predicted of it.
            found = replace(
                beside_buckets(found, buckets),
                batch_size=now.batch_size,
                batch_shapes=now.shapes,
                predict_way=None,
            )
            known = Fingerprint.of(model, now.batch_size)
            device = device_of(trainer.strategy.root_device)
            return Plan(found, device, self._limit_bytes, self.allow, known), now.with_steps_of(found)

        try:
            plan, planned = plan_of_largest(trainer, now.batch_bytes, make)
        except ValueError as error:
            raise MisconfigurationException(f"`FitMemory` cannot plan this run: {error}") from error
        why = self._known.lacks(planned)
        self._known.add(planned, plan)
        if plan.chosen is None:
            reasons = floor_lines(plan.floor, plan.plain, plan.device, self._limit_bytes)
            again = f" (planned again: {why})" if why else ""
            raise MisconfigurationException(
                f"`FitMemory(limit)` of {format_bytes(self._limit_bytes)} cannot be kept{again}. "
                f"{' '.join(line.strip() for line in reasons)} {cure(plan)}"
            )
        for logger in trainer.loggers:
            log_plan(logger, plan.model_name, plan.found, plan.device, plan.limit_bytes)
        self._follow(plan, trainer, model, in_training=True, why=why)

    def _follow(
        self,
        plan: Plan,
        trainer: pl.Trainer,
        model: pl.LightningModule,
        in_training: bool,
        why: str = "",
    ) -> None:
        """Apply the chosen way of a plan in the place of what is applied."""
        assert plan.chosen is not None, "refused before"
        if self._applied is not None and self._applied.way != plan.chosen:
            self._applied.end(trainer, model)
            self._applied = None
        is_new = self._applied is None
        if self._applied is None:
            self._applied = AppliedWay(plan.chosen, trainer, model)
            self._applied.begin(trainer, model, self, self._states, in_training)
            self._states = {}
        self._in_force = plan
        if is_new or why:
            self._say(trainer, f"{in_words(plan)}{f' (planned again: {why})' if why else ''}")

    def _is_for(self, plan: Plan, now: Circumstances, batch: Any) -> bool:
        planned = plan.fingerprint.batch_size
        held_bytes = unplanned_bytes(self._held, batch, plan.found.held_bytes)
        return (planned is None or (now.batch_size or 0) <= planned) and plan.has_room_for(held_bytes)

    def _learn_smaller_size(self, trainer: pl.Trainer) -> None:
        applied, plan = self._applied, self._in_force
        splitting = applied.microbatching if applied is not None else None
        if applied is None or plan is None or splitting is None or not splitting.microbatch_size:
            return
        size = splitting.microbatch_size
        techniques = tuple(
            replace(one, init_args={**one.init_args, "microbatch_size": size})
            if one.name == "Microbatching" and one.init_args.get("microbatch_size", 0) != size
            else one
            for one in applied.way.techniques
        )
        if techniques == applied.way.techniques:
            return
        applied.way = replace(
            applied.way, techniques=techniques, allocated_bytes=None, reserved_bytes=None, time_ratio=None
        )
        note = f"Memory ran out at step {trainer.global_step}: microbatches of {size} from there."
        learned = replace(
            plan, found=replace(plan.found, chosen=applied.way, notes=(*plan.found.notes, note))
        )
        self._known.replace(plan, learned)
        self._in_force = learned
        self._say(trainer, f"memory ran out; microbatches of {size} from here")

    # ------------------------------------------------------------------ end

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Note what ran out of memory, so that the next fit is planned with less."""
        plan, way = self._in_force, self._applied.way if self._applied else None
        if not is_out_of_memory(exception) or plan is None or way is None:
            return
        needed_bytes = plan.needed_bytes(way) or self._limit_bytes
        self._missing_bytes += max(0, self._limit_bytes - self._missing_bytes - needed_bytes) + 1
        self._known.forget()
        self._say(trainer, f"memory ran out where {format_bytes(needed_bytes)} were predicted")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep what the planned callbacks save among this callback's own state.

        A run that is resumed has not got them yet when Lightning looks for those that a checkpoint is of.
        """
        states = checkpoint.get("callbacks", {})
        keys = [one.state_key for one in self._applied.callbacks] if self._applied else []
        kept = {key: states.pop(key) for key in keys if key in states}
        if self.state_key in states:
            states[self.state_key] = {**states[self.state_key], "callbacks": kept}

    def state_dict(self) -> dict[str, Any]:
        """The plans, so that a resumed run follows them from its first step."""
        if self._in_force is None:
            return {}
        return {
            "known": self._known.to_list(),
            "in_force": self._in_force.to_dict(),
            "missing_bytes": self._missing_bytes,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Follow the plan of a checkpoint, once fit starts."""
        self._resumed = dict(state_dict) or None

    def _take_resumed(
        self, trainer: pl.Trainer, model: pl.LightningModule, in_training: bool = False
    ) -> None:
        assert self._resumed is not None, "asked only where there is something"
        state, self._resumed = self._resumed, None
        plan = Plan.from_dict(state["in_force"])
        now = Fingerprint.of(model, plan.fingerprint.batch_size)
        different = plan.fingerprint.differences(now)
        if plan.limit_bytes != self._limit_bytes:
            different.append(f"the limit is {format_bytes(self._limit_bytes)}")
        if different or plan.allow != self.allow:
            self._say(
                trainer, f"the checkpoint's plan is not used: {'; '.join(different) or 'allow differs'}"
            )
            return
        self._known = KnownPlans.from_list(state["known"])
        self._missing_bytes = state["missing_bytes"]
        self._states = state.get("callbacks", {})
        self._follow(self._known.same(plan), trainer, model, in_training)

    @property
    def exact(self) -> bool:
        """Whether the result is that of the plain run in exact arithmetic, by the plan in force."""
        return self._in_force is None or self._in_force.chosen is None or self._in_force.chosen.exact

    def technique_record(self) -> TechniqueRecord:
        """The limit, the way that is taken, and how it changed."""
        way = self._in_force.chosen if self._in_force is not None else None
        settings: dict[str, Any] = {"limit": self.limit, "way": None if way is None else str(way)}
        if self.allow:
            settings["allow"] = ", ".join(self.allow)
        return TechniqueRecord("FitMemory", settings, tuple(self._events))

    def _say(self, trainer: pl.Trainer, what: str) -> None:
        self._events.append(f"step {trainer.global_step}: {what}")
        rank_zero_info(f"FitMemory, {what}")
