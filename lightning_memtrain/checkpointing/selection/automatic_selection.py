"""What is recomputed under a budget: chosen before the first step, and again before it would be broken."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from torch.optim import Optimizer

from lightning_memtrain.checkpointing.insertion import Checkpoints, insert_checkpoints
from lightning_memtrain.checkpointing.memory_budget import MemoryBudget
from lightning_memtrain.checkpointing.policies import Groups
from lightning_memtrain.checkpointing.selection.counted_step import count_step, predicted_peak_bytes
from lightning_memtrain.checkpointing.selection.held_beside import HeldBeside
from lightning_memtrain.checkpointing.selection.recomputation_plan import BudgetOutOfReach, RecomputationPlan
from lightning_memtrain.checkpointing.selection.step_conditions import (
    FittingShapes,
    StepConditions,
    trained_parameters,
)
from lightning_memtrain.checkpointing.selection.step_curve import StepCurve
from lightning_memtrain.core import Category, NoEffectWarning, is_out_of_memory
from lightning_memtrain.ledger.operators.op_times import OpTimes
from lightning_memtrain.ledger.operators.workspace import OpWorkspace
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.ledger.training_state import state_bytes
from lightning_memtrain.tracing.step.fake_step import FakeStep
from lightning_memtrain.tracing.step.user_code import location_of

_STEADY = (
    *(Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.BUFFERS),
    *(Category.BUCKETS, Category.HELD),
)


class AutomaticSelection:
    """Keeps the steps of one fit within a budget, or at the knee of memory against time.

    Args:
        trainer: fits.
        model: its module.
        policy: the budget.
        say: takes what is to be told to people.
    """

    def __init__(
        self, trainer: Trainer, model: LightningModule, policy: MemoryBudget, say: Callable[[str], None]
    ) -> None:
        device = trainer.strategy.root_device
        self.num_modules = 0
        self._trainer = trainer
        self._model = model
        self._policy = policy
        self._limit_bytes = policy.limit_bytes_on(device)
        self._say = say
        self._times = OpTimes(device)
        self._workspace = None if self._limit_bytes is None else OpWorkspace(device)
        self._held = HeldBeside(trainer, model)
        self._held_bytes: int | None = None
        self._remove: Checkpoints | None = None
        self._groups: Groups = []
        self._plan: RecomputationPlan | None = None
        self._planned_for: StepConditions | None = None
        self._peak_bytes = 0  # the most of batches that were counted with the choice in force
        self._fitting = FittingShapes()
        self._warned_of: set[str] = set()
        self._gave_up = False

    def begin_batch(self) -> None:
        """Another batch begins, before which anything may have come to be held."""
        self._held_bytes = None

    def before_step(
        self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], zeroes: bool
    ) -> None:
        """Choose, where no choice was made for what the step is like.

        Args:
            step: the ``training_step`` that is about to run.
            args: its arguments.
            kwargs: its arguments by name.
            zeroes: whether gradients that are there at first are dropped before backward.

        Raises:
            MisconfigurationException: if there is a limit, and it cannot be kept, or not told whether it can.
        """
        if self._gave_up:
            return
        now = self._conditions((args, kwargs))
        why = ""
        if self._planned_for is not None:
            why = now.beyond(self._planned_for, exactly=self._limit_bytes is not None)
            if not why and self._has_room_for(now):
                return
            now = now.joined(self._planned_for)
        groups = self._groups
        self.close()
        try:
            self._choose(self._fake(step, args, kwargs, zeroes), now, why, groups)
        except Exception as error:
            if self._limit_bytes is None and not isinstance(error, BudgetOutOfReach):
                self._give_up(error, groups)
                return
            # Whoever tries fewer samples now goes on with the choice that was made before.
            self._insert(groups)
            if isinstance(error, BudgetOutOfReach) or is_out_of_memory(error):
                raise
            raise self._cannot_run(error) from error

    @property
    def filling_caches(self) -> list[str]:
        """The recomputed modules that were given a key-value cache in training."""
        return self._remove.filling_caches if self._remove is not None else []

    def close(self) -> None:
        """Recompute nothing any more."""
        if self._remove is not None:
            self._remove()
        self._remove, self._groups, self.num_modules = None, [], 0

    def _choose(self, fake: FakeStep, now: StepConditions, why: str, groups: Groups) -> None:
        limit_bytes = self._limit_bytes
        if limit_bytes is not None and self._plan is not None and not why:  # only batch, or what is held
            fake.prepare(nullcontext)
            ledger = count_step(fake, groups, self._workspace)
            peak_bytes = predicted_peak_bytes(ledger, groups)
            assert self._planned_for is not None
            has_more = now.held_bytes > self._planned_for.held_bytes
            if peak_bytes <= limit_bytes:
                if has_more:
                    self._fitting = FittingShapes()
                self._fitting.add(now.shapes)
                self._peak_bytes = peak_bytes if has_more else max(peak_bytes, self._peak_bytes)
                self._planned_for = replace(self._planned_for, held_bytes=now.held_bytes)
                self._insert(groups)
                return
            why = ", with more that is held beside it" if has_more else ", for a larger batch"
        curve = StepCurve(fake, self._times, self._workspace)
        if not fake.has_backward:  # such as a batch that is left out: it tells nothing of the others
            self._insert(groups)
            return
        plan = curve.knee() if limit_bytes is None else curve.fitting(limit_bytes)
        self._warn_of_uncounted(fake)
        self._fitting = FittingShapes()
        self._fitting.add(now.shapes)
        self._plan, self._peak_bytes = plan, plan.peak_bytes
        now = replace(now, held_bytes=now.held_bytes + fake.logged_bytes)
        self._planned_for = now.at_least(fake.state_bytes, fake.gradient_bytes)
        self._insert(plan.groups)
        self._say(f"step {self._trainer.global_step}{why}: {plan}")

    def _insert(self, groups: Groups) -> None:
        self._remove = insert_checkpoints(self._model, groups)
        self._groups, self.num_modules = groups, sum(len(group) for group in groups)

    def _conditions(self, arguments: Any) -> StepConditions:
        tensors = find_tensors(arguments)
        if self._held_bytes is None:
            self._held_bytes = 0 if self._limit_bytes is None else self._held.num_bytes(tensors)
        return StepConditions(
            shapes=tuple(tuple(tensor.shape) for tensor in tensors),
            batch_bytes=sum(tensor.nbytes for tensor in tensors),
            gradient_bytes=sum(p.grad.nbytes for p in self._model.parameters() if p.grad is not None),
            state_bytes=state_bytes(self._trainer.optimizers),
            trained=trained_parameters(self._model),
            parameter_bytes=sum(parameter.nbytes for parameter in self._model.parameters()),
            held_bytes=self._held_bytes,
        )

    def _has_room_for(self, now: StepConditions) -> bool:
        """Whether a batch cannot break the limit, whatever the model does with it."""
        if self._limit_bytes is None:
            return True
        assert self._plan is not None
        assert self._planned_for is not None
        more_bytes = max(0, now.held_bytes - self._planned_for.held_bytes)
        if self._fitting.contains(now.shapes):
            return self._peak_bytes + more_bytes <= self._limit_bytes
        held = self._plan.breakdown.at_peak
        steady = sum(num for category, num in held.items() if category in _STEADY)
        growing = self._plan.peak_bytes - steady
        return steady + growing * self._fitting.growth(now.shapes) + more_bytes <= self._limit_bytes

    def _fake(self, step: Callable[..., Any], args: Any, kwargs: Any, zeroes: bool) -> FakeStep:
        trainer, model = self._trainer, self._model

        def step_optimizer(optimizer: Optimizer, closure: Callable[[], Any]) -> None:
            # As the run does it: clips gradients, and may hold weights in another precision.
            trainer.precision_plugin.optimizer_step(optimizer, model=model, closure=closure)

        return FakeStep(
            model,
            lambda args, kwargs: step(*args, **kwargs),
            (args, kwargs),
            trainer.optimizers,
            zeroes_after_forward=zeroes,
            is_first=zeroes and not any(parameter.grad is not None for parameter in model.parameters()),
            closure_step=step_optimizer,
            also=(trainer, trainer.lr_scheduler_configs),
            held=() if self._limit_bytes is None else self._held.tensors(),
            logs_first=not trainer.callback_metrics,
            may_keep_graph=self._limit_bytes is None,
        )

    # ------------------------------------------------------------------ what cannot be

    def _cannot_run(self, error: Exception) -> MisconfigurationException:
        return MisconfigurationException(
            f"`{self._policy!r}` runs `training_step` without data, to see what it holds, but that ended "
            f"{_described(error)}. Make this line work on tensors whose values are not known, or say what to "
            "recompute, e.g. ActivationCheckpointing('full')."
        )

    def _give_up(self, error: Exception, groups: Groups) -> None:
        self._gave_up = True
        if groups:
            self._insert(groups)
        kept = "keeps what it recomputes" if groups else "recomputes nothing"
        self._say(f"step {self._trainer.global_step}: {kept}, since no step can run without data")
        rank_zero_warn(
            f"`ActivationCheckpointing()` {kept}: it runs `training_step` without data to see what it holds, "
            f"and that ended {_described(error)}. Training goes on as it would without. Say what to "
            "recompute, e.g. ActivationCheckpointing('full'), or make this line work on tensors whose values "
            "are not known.",
            category=NoEffectWarning,
        )

    def _warn_of_uncounted(self, fake: FakeStep) -> None:
        for name in fake.uncounted.keys() - self._warned_of:
            self._warned_of.add(name)
            rank_zero_warn(
                f"`ActivationCheckpointing(policy={self._policy!r})` cannot run the step of {name} without "
                f"data ({fake.uncounted[name]}), so its bytes are not in the limit: its state is once it has "
                "stepped, what its step holds beside is not. Set a limit that leaves room for that."
            )


def _described(error: Exception) -> str:
    site = location_of(error)
    where = f"at {site} " if site is not None else ""
    what = str(error).splitlines()[0] if str(error) else ""
    return f"{where}with {type(error).__name__}: {what}".rstrip(": .")
