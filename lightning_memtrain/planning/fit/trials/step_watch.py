"""The callback that watches one step of a trial: bytes, operators, module calls of its last chunk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_memtrain.checkpointing.existing_checkpoints import ExistingCheckpoints, is_backward
from lightning_memtrain.checkpointing.selection.call_profiler import CallProfiler
from lightning_memtrain.checkpointing.selection.held_beside import HeldBeside
from lightning_memtrain.compat import wrap_training_step
from lightning_memtrain.compat.lightning_private import should_accumulate
from lightning_memtrain.compat.torch_private import BatchNorm
from lightning_memtrain.core import Category, is_technique
from lightning_memtrain.ledger import MemoryLedger, OpWorkspace
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts, StepOperators, StepTrace, WatchedCalls
from lightning_memtrain.tracing.user_state.held_tensors import HeldTensors

# The first step makes the optimizer's state, and shows what the model recomputes by itself.
_WATCHED_STEP = 1
_GRADIENTS = frozenset((Category.GRADIENTS,))
_STATE = _GRADIENTS | {Category.PARAMETERS, Category.BUFFERS, Category.OPTIMIZER_STATE}
# A module that steps by itself may do so by turns, as a GAN that trains its generator in every fifth batch.
_STEPS_BY_ITSELF = 6


class StepWatch(pl.Callback):
    """Watches the second step of a run; of a module that steps by itself also some after it.

    Args:
        num_chunks: calls of ``training_step`` in it.
        workspace: rounds bytes as the allocator does; ``None`` where that is not asked for.
        with_calls: whether module calls are followed, which nothing may recompute then.
    """

    def __init__(self, num_chunks: int, workspace: OpWorkspace | None, with_calls: bool) -> None:
        self._num_chunks = num_chunks
        self._workspace = workspace
        self._with_calls = with_calls
        self._undo = ExitStack()
        self._step_undo = ExitStack()
        self._calls_undo = ExitStack()
        self._own: ExistingCheckpoints | None = None
        self._ledger: MemoryLedger | None = None
        self._calls: CallProfiler | None = None
        self._operators = StepOperators()
        self._mode = OperatorMode()  # type: ignore[no-untyped-call]
        self._begins: list[int] = []
        self._ticks: list[tuple[int, OpCall]] = []
        self._steps = 0
        self._held_bytes = 0
        self._was_backward = False
        self._host_bytes = 0
        self._update_begin: int | None = None

    def num_steps(self, model: pl.LightningModule) -> int:
        """How many steps it wants to see.

        Args:
            model: what is trained.

        Returns:
            The first one among them.
        """
        return _WATCHED_STEP + 1 if model.automatic_optimization else _STEPS_BY_ITSELF

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go around ``training_step``."""
        self._undo.callback(wrap_training_step(pl_module, self._around))
        self._model = pl_module
        self._trainer = trainer

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to watch."""
        if self._steps < _WATCHED_STEP and self._with_calls and self._own is None:
            self._own = ExistingCheckpoints(pl_module)
            self._step_undo.enter_context(self._own)
        if self._steps != _WATCHED_STEP or self._ledger is not None:
            return
        optimizers = [one for one in trainer.optimizers if isinstance(one, Optimizer)]
        self._ledger = MemoryLedger(
            pl_module,
            optimizers,
            batch,
            device=trainer.strategy.root_device,
            workspace=self._workspace,
            held=HeldTensors().beside_steps(trainer, pl_module),
        )
        self._step_undo.enter_context(self._ledger)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End it, unless gradients are still to be accumulated."""
        if should_accumulate(trainer):
            return
        self._steps += 1
        self._held_bytes = HeldBeside(trainer, pl_module).num_bytes_beside_model(find_tensors(batch))
        self._calls_undo.close()
        if self._steps in (_WATCHED_STEP, self.num_steps(pl_module)):
            self._step_undo.close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave everything as it was."""
        self._calls_undo.close()
        self._step_undo.close()
        self._undo.close()

    def _around(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._ledger is None or self._steps < _WATCHED_STEP:
            return step(*args, **kwargs)
        self._begins.append(self._ledger.tick)
        if len(self._begins) == self._num_chunks:
            if self._with_calls:
                left_out = self._own.names if self._own is not None else frozenset()
                self._calls = CallProfiler(self._model, self._ledger, left_out)
                self._calls_undo.enter_context(self._calls)
            self._mode.begin(self._on_operator, lambda operator, results: None)
            self._step_undo.callback(self._mode.end)
        return step(*args, **kwargs)

    def _on_operator(self, operator: OperatorTraits, args: Any, kwargs: Any) -> None:
        if operator.makes_views or operator.func.namespace == "prim":  # which tensors without data ask for
            return
        backward = is_backward()
        self._was_backward = self._was_backward or backward
        calls = self._operators.backward if backward else self._operators.forward
        if self._was_backward and not backward:
            calls = self._operators.update
        call = op_call(operator.func, args, kwargs)
        calls.append(call)
        if calls is self._operators.update:
            if self._update_begin is None and self._ledger is not None:
                self._update_begin = self._ledger.tick
        else:
            self._host_bytes += _between_devices(args, kwargs)
        if self._with_calls and self._ledger is not None:
            self._ticks.append((self._ledger.tick, call))

    def trace(self) -> StepTrace:
        """What was seen.

        Returns:
            All of it, without what only the device's allocator knows.

        Raises:
            RuntimeError: if no second step ran.
        """
        ledger, calls = self._ledger, self._calls
        if ledger is None:
            raise RuntimeError(
                "a trial needs two steps to see the second one, but the run ended before: no batch came, or "
                "`training_step` returned None for each"
            )
        breakdown = ledger.breakdown(per_module=False, timeline=False)
        growth_bytes = 0
        if len(self._begins) > 2:  # from the second chunk on, gradients are there
            last, before = self._begins[-1], self._begins[-2]
            growth_bytes = max(0, ledger.bytes_at(last) - ledger.bytes_at(before))
        return StepTrace(
            ledger_bytes=breakdown.peak_bytes,
            moments=ledger.peak_moments,
            allocated_bytes=0,
            reserved_bytes=0,
            workspace_bytes=0,
            at_peak=dict(breakdown.at_peak),
            growth_bytes=growth_bytes,
            operators=replace(self._operators, host_bytes=self._host_bytes),
            facts=self._facts(),
            calls=None
            if calls is None
            else WatchedCalls(
                calls.root, calls.op_calls, calls.saves, calls.forward_end, ledger.records, self._ticks
            ),
            state_bytes=self._state_bytes(ledger),
        )

    def _state_bytes(self, ledger: MemoryLedger) -> int:
        """What is there when the update begins, or after it; one that steps by itself may do so in parts."""
        if not self._model.automatic_optimization:
            return 0
        begin, end = self._update_begin, ledger.tick
        held = [one for one in ledger.records if one.category in _STATE]
        kept = sum(one.num_bytes for one in held if one.category not in _GRADIENTS and one.live_at(end))
        return max(kept, 0 if begin is None else sum(one.num_bytes for one in held if one.live_at(begin)))

    def _facts(self) -> RunFacts:
        trainer = self._trainer
        candidates = [*trainer.callbacks, trainer.strategy, trainer.precision_plugin]  # type: ignore[attr-defined]
        optimizers = [one for one in trainer.optimizers if isinstance(one, Optimizer)]
        return RunFacts(
            automatic_optimization=self._model.automatic_optimization,
            has_batchnorm=any(isinstance(module, BatchNorm) for module in self._model.modules()),
            optimizers=tuple(
                (
                    tuple(kind.__name__ for kind in type(one).__mro__),
                    {
                        key: value
                        for key, value in one.defaults.items()
                        if isinstance(value, (bool, float, int))
                    },
                )
                for one in optimizers
            ),
            exact={type(one).__name__: one.exact for one in candidates if is_technique(one)},
            on_gpu=trainer.strategy.root_device.type != "cpu",
            has_float32=any(one.dtype == torch.float32 for one in self._model.parameters()),
            precision=str(trainer.precision),
            takes_all_at_once=any(map(self._takes_all_at_once, optimizers)),
            stateful=tuple(len(one.state) for one in optimizers),
            held_bytes=self._held_bytes,
            networks=tuple(
                (name, tuple(f"{name}.{inner}" for inner, _ in child.named_children()))
                for name, child in self._model.named_children()
                if any(True for _ in child.parameters())
            ),
        )

    def _takes_all_at_once(self, optimizer: Optimizer) -> bool:
        by_default = self._trainer.strategy.root_device.type != "cpu"
        return any(
            group.get("foreach") or (by_default and group.get("foreach", True) is None)
            for group in optimizer.param_groups
            if not group.get("fused")
        )


def _between_devices(args: Any, kwargs: Any) -> int:
    """Bytes that a copy between devices moves; 0 for all else."""
    tensors = [one for one in args if isinstance(one, Tensor)]
    if not tensors:
        return 0
    target = kwargs.get("device")
    kinds = {one.device.type for one in tensors if one.dim() > 0}
    if target is not None:
        kinds.add(torch.device(target).type)
    return tensors[-1].nbytes if len(kinds) > 1 else 0
