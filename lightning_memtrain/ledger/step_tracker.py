"""What a ledger does while a step runs: it tells the storage tracker what shows up, and what it is for."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import fsdp_parameters, skip_in_dynamo
from lightning_memtrain.coordination import dry_run_depth, watch_annotations, watch_asides
from lightning_memtrain.core import Category
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits
from lightning_memtrain.ledger.observers.module_tracker import (
    NOT_IN_BACKWARD,
    ModuleTracker,
    RunningModule,
    current_graph_task,
)
from lightning_memtrain.ledger.observers.saved_tensors import SAVED_TENSOR_HOOKS
from lightning_memtrain.ledger.observers.storage_resizes import RESIZE_HOOKS
from lightning_memtrain.ledger.observers.torch_compile import COMPILER_HOOKS, MODE_HIDER, CompilerListener
from lightning_memtrain.ledger.operators.allocation_limit import AllocationLimit
from lightning_memtrain.ledger.operators.workspace import PeakEstimator
from lightning_memtrain.ledger.storage_records import TRANSIENT, StorageRecord
from lightning_memtrain.ledger.storage_tracker import StorageTracker
from lightning_memtrain.ledger.submodules import named_submodules
from lightning_memtrain.ledger.tensors.distributed_tensors import ddp_around
from lightning_memtrain.ledger.tensors.storages import PLAIN_TENSORS, storages_of, tensors_in
from lightning_memtrain.ledger.training_state import classify_buckets, classify_training_state
from lightning_memtrain.optimizer_steps.accumulation_hooks import AccumulationHooks

_LIFT_FRESH = torch.ops.aten.lift_fresh.default


class StepTracker:
    """Follows operators, modules, gradients and optimizers, and tells the storage tracker what they do.

    Args:
        model: the module that is trained; gives names to bytes.
        optimizers: whose state is told from activations.
        tracker: is told of all storages that are seen.
        estimate: told of each operator, if given.
        limit: asked before each operator, and may break the step off.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        tracker: StorageTracker,
        estimate: PeakEstimator | None,
        limit: AllocationLimit | None,
    ) -> None:
        self._model = model
        self._optimizers = optimizers
        self._storages = tracker
        self._estimate = estimate
        self._limit = limit
        self._late_before = 0
        self._is_sharded = False  # by FSDP2
        self.operators = OperatorMode()  # type: ignore[no-untyped-call]
        """Where operators are seen."""
        self.modules = ModuleTracker(_Forwards(model, tracker), self.operators.in_force)
        """Which module is at work."""
        self._num_scanned = 0
        self._recomputed: list[StorageRecord] = []
        self._backward_module: str | None = None
        self._last_followed: RunningModule | None = None  # which need not be followed again
        self._thread: int | None = None
        self._num_graphs = 0  # compiled ones that are running

    def begin(
        self, inputs: Sequence[torch.Tensor], undo: ExitStack, held: Sequence[torch.Tensor] = ()
    ) -> None:
        """Look at what is there, and follow what comes.

        Args:
            inputs: the tensors of the batch, of any shape and dtype.
            undo: gets what ends it, also if a later line fails.
            held: what else is live, of any shape and dtype.
        """
        modules = named_submodules(self._model)
        owners: dict[int, tuple[torch.Tensor, str]] = {}
        for path, module in modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    owners.setdefault(id(parameter), (parameter, path))
        parameters = [parameter for parameter, _ in owners.values()]
        self._storages.counts_fakes = dry_run_depth() > 0 or _any_fake((*parameters, *inputs))
        self._is_sharded = any(fsdp_parameters(module) for _, module in modules)
        self._scan_training_state(modules)
        for tensor in inputs:
            self._storages.track_existing(tensor, Category.INPUTS)
        for tensor in held:
            # Nothing is held by what is empty, and may be filled in the step.
            if not is_lazy(tensor) and any(storage.nbytes() for storage in storages_of(tensor)):
                self._storages.track_existing(tensor, Category.HELD)
        trained = [one for one in parameters if one.requires_grad and one.is_leaf and not is_lazy(one)]
        paths = {id(parameter): owners[id(parameter)][1] for parameter in trained}
        hooks = AccumulationHooks(functools.partial(self._after_accumulation, paths))
        undo.callback(hooks.remove)
        hooks.register(trained)
        for optimizer in self._optimizers:
            undo.callback(optimizer.register_step_post_hook(self._after_optimizer_step).remove)
        undo.callback(self.modules.end)
        self.modules.begin(modules)
        SAVED_TENSOR_HOOKS.add(self._on_saved)
        undo.callback(SAVED_TENSOR_HOOKS.remove, self._on_saved)
        RESIZE_HOOKS.add(self._on_resize)
        undo.callback(RESIZE_HOOKS.remove, self._on_resize)
        undo.callback(watch_annotations(self._on_annotation))
        undo.callback(watch_asides(self._storages.begin_aside, self._storages.end_aside))
        self._late_before = self._storages.late_bytes
        self._thread = threading.get_ident()
        listener = CompilerListener(
            self._before_compilation,
            self.modules.show,
            self._before_graph,
            self._after_graph,
            self._on_allocated,
        )
        COMPILER_HOOKS.add(listener)
        undo.callback(COMPILER_HOOKS.remove, listener)
        if MODE_HIDER.needed:
            MODE_HIDER.add(listener)
            undo.callback(MODE_HIDER.remove, listener)
        self.operators.begin(self._on_arguments, self._on_results, self._on_nothing_made)
        undo.callback(self.operators.end)

    def end(self) -> None:
        """Settle what is only known at the end; nothing is followed any more."""
        self._settle_recomputed()
        if len(self._storages.records) != self._num_scanned:
            self._scan_training_state()

    @contextmanager
    def limited(self, limit: AllocationLimit) -> Iterator[None]:
        """Ask a limit in this block, which may break it off.

        Args:
            limit: asked before each operator.
        """
        before = self._limit, self._late_before
        self._limit, self._late_before = limit, self._storages.late_bytes
        try:
            yield
        finally:
            self._limit, self._late_before = before

    # The next two run around every operator. They look first at what is nearly always the case: arguments
    # that are tensors and tracked, and a result that is one tensor or an argument.

    def _on_arguments(self, operator: OperatorTraits, args: Any, kwargs: Any) -> None:
        if operator.func is _LIFT_FRESH:
            return  # `torch.tensor(...)` makes its storage out of sight and shows it here first
        entry_of = self._storages.entry_of
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(argument, torch.Tensor):
                if entry_of(argument) is None:
                    self._track_argument(argument)
            elif isinstance(argument, (list, tuple)):
                for tensor in tensors_in(argument):
                    if entry_of(tensor) is None:
                        self._track_argument(tensor)
        if operator.role is not None:
            self._classify((args, kwargs), operator.role)
        if self._estimate is not None:
            self._estimate.before(operator.func, args, kwargs)
        if self._limit is not None:
            late_bytes = self._storages.late_bytes - self._late_before
            self._limit.before(operator.func, args, kwargs, self._storages.live_bytes, late_bytes)

    def _on_nothing_made(self) -> None:
        if current_graph_task() == NOT_IN_BACKWARD:
            if self._backward_module is None:
                return
        elif self.modules.is_still(self._last_followed):
            return
        self._follow_backward(self.modules.now())

    def _on_results(self, operator: OperatorTraits | None, results: Any) -> None:
        now = self.modules.now()
        if now.in_backward or self._backward_module is not None:
            self._follow_backward(now)
        made: Sequence[StorageRecord]
        if isinstance(results, torch.Tensor):
            made = self._storages.track_new(results, now.module)
        else:
            made = [
                record
                for tensor in tensors_in(results)
                for record in self._storages.track_new(tensor, now.module)
            ]
        if now.recomputing:
            self._recomputed.extend(made)
            self._last_followed = None
        if operator is not None and operator.role is not None:
            self._classify(results, operator.role)
        if self._limit is not None:
            self._limit.after(sum(record.num_bytes for record in made))

    def _classify(self, tree: Any, category: Category) -> None:
        for tensor in tensors_in(tree):
            self._storages.classify(tensor, category, None)

    def _track_argument(self, tensor: torch.Tensor) -> None:
        if self._num_graphs:
            self._on_results(None, tensor)  # made by the graph that is running, and shown to an operator
            return
        category = Category.INPUTS
        if self.modules.now().in_backward:
            if self._is_sharded and tensor.dim() == 1 and not self._storages.records_of(tensor):
                # What a collective made out of sight to reduce gradients in (gloo does) is new.
                self._on_results(None, tensor)
                self._classify(tensor, Category.UNSHARDED_GRADIENTS)
                return
            category = Category.GRADIENTS if ddp_around(self._model) is None else Category.BUCKETS
        self._storages.track_existing(tensor, category)

    def _on_saved(self, tensor: torch.Tensor) -> None:
        if not self.operators.in_force():
            return
        # What no operator made in the block was there before.
        for record in self._storages.track_existing(tensor, Category.INPUTS):
            # What was there before and is filled anew, as FSDP gathers weights, is no activation.
            if record.category is Category.TEMPORARY and not record.existed_before:
                record.category = Category.ACTIVATIONS
                record.recomputed = self.modules.now().recomputing
            if record.category is Category.ACTIVATIONS and record.saver is None:
                record.saver = self.modules.now().module

    def _on_resize(self, storage: torch.UntypedStorage, num_bytes_before: int) -> None:
        if self.operators.in_force():
            self._storages.track_before_resize(storage, num_bytes_before)
            self._storages.resize(storage, self.modules.now().module)
        else:
            self._storages.resize(storage)

    def _after_accumulation(self, owners: Mapping[int, str], parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        if gradient is not None and self.operators.in_force():
            self._storages.classify(gradient, Category.GRADIENTS, owners[id(parameter)])

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.operators.in_force():
            self._scan_training_state()
            self._storages.annotate("optimizer step")

    def _before_compilation(self) -> None:
        if threading.get_ident() == self._thread:
            self.modules.hide()

    def _before_graph(self, inputs: Sequence[Any]) -> None:
        if self.operators.in_force():
            for tensor in tensors_in(inputs):
                self._track_argument(tensor)
            self._num_graphs += 1

    def _after_graph(self, outputs: Any) -> None:
        if self.operators.in_force():
            self._num_graphs -= 1
            self._on_results(None, outputs)

    def _on_allocated(self, tensor: torch.Tensor) -> None:
        if self.operators.in_force():
            self._on_results(None, tensor)

    def _on_annotation(self, name: str) -> None:
        if self.operators.in_force():
            self._storages.annotate(name)

    def _settle_recomputed(self) -> None:
        # What outlives the recomputation was recomputed to be used by backward; the rest was temporary.
        for record in self._recomputed:
            if record.died is None and record.category in TRANSIENT:
                record.category = Category.ACTIVATIONS
                record.recomputed = True
                record.saver = record.saver or record.producer
        self._recomputed.clear()

    def _follow_backward(self, now: RunningModule) -> None:
        if now.recomputing or now is self._last_followed:
            return
        self._last_followed = now
        if self._recomputed:
            self._settle_recomputed()
        if not now.in_backward:
            self._backward_module = None
        elif now.module != self._backward_module:
            self._backward_module = now.module
            self._storages.annotate(f"backward {now.module}".rstrip())

    def _scan_training_state(self, modules: Sequence[tuple[str, nn.Module]] | None = None) -> None:
        # A step may put modules into the model, so a list of them is not kept for long.
        modules = modules or named_submodules(self._model)
        classify_training_state(self._storages, self._model, self._optimizers, modules)
        self._num_scanned = len(self._storages.records)


class _Forwards:
    """Puts forwards on the timeline, and looks in the first one for a DDP that nobody knew of.

    Apart from the ledger, which would be held by what it holds.

    Args:
        model: the module that is trained.
        tracker: is told of the forwards.
    """

    def __init__(self, model: nn.Module, tracker: StorageTracker) -> None:
        self._model = model
        self._storages = tracker
        self._is_first = True

    def __call__(self, name: str) -> None:
        if self._is_first:
            self._is_first = False
            classify_buckets(self._storages, self._model)
        self._storages.annotate(name)


skip_in_dynamo(StepTracker._after_accumulation, StepTracker._after_optimizer_step)


def _any_fake(tensors: Iterable[torch.Tensor]) -> bool:
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # where nobody has imported it, there are none
    return fakes is not None and any(
        type(tensor) not in PLAIN_TENSORS and fakes.is_fake(tensor) for tensor in tensors
    )
