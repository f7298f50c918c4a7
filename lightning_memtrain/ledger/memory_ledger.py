"""The ledger: live bytes of tensor storages, counted exactly while anything runs inside it."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_memtrain.core import (
    Category,
    CategoryBytes,
    MemoryBreakdown,
    rehearsal_depth,
    watch_asides,
    watch_marks,
)
from lightning_memtrain.core.accumulation_hooks import AccumulationHooks
from lightning_memtrain.ledger.book import TRAINING_STATE, StorageBook
from lightning_memtrain.ledger.communication import ddp_around, fsdp_parameters, role_of
from lightning_memtrain.ledger.compiled import COMPILER_WATCH, MODES_HIDDEN, CompilerListener
from lightning_memtrain.ledger.devices import parameter_device
from lightning_memtrain.ledger.limit import AllocationLimit
from lightning_memtrain.ledger.modules import ModuleWatch, Moment
from lightning_memtrain.ledger.objects import tensors_within
from lightning_memtrain.ledger.operators import OperatorWatch, returns_arguments, skip_in_dynamo
from lightning_memtrain.ledger.records import TRANSIENT, StorageRecord, Survivor, analyse, held_at_peak
from lightning_memtrain.ledger.saved_tensors import SAVED_TENSOR_WATCH
from lightning_memtrain.ledger.storages import RESIZE_WATCH, tensors_in
from lightning_memtrain.ledger.training_state import classify_buckets, classify_training_state
from lightning_memtrain.ledger.workspace import OpWorkspace, PeakEstimate

_LIFT_FRESH = torch.ops.aten.lift_fresh.default


class MemoryLedger:
    """Count live bytes of tensor storages on one device, by category, module and moment.

    Everything that runs inside the ``with`` block is counted: forward, backward, recomputation, optimizer
    steps, on CPU, CUDA or any other device, and on ``meta``, where the same numbers come out without any
    memory being used. Storages are counted once however many tensors share them, from the moment when an
    operator returns them until they are freed. Bytes that an operator uses only while it runs are not
    tensors of the program and not counted: see :class:`~lightning_memtrain.ledger.OpWorkspace`.

    A storage that was live before the block and shows up as an argument in it counts from the start: as an
    input, or as a gradient when backward is the first to use it. One that was empty counts from the moment
    when it is filled. The buckets in which ``DistributedDataParallel`` averages gradients count from the
    start if ``model`` is the wrapper, or a trainer has wrapped it; else from its forward on.

    What is counted is what the thread does that entered the block, with autograd's threads that work for it.
    It may be read in any thread at any time.

    Args:
        model: the module that is trained; gives names to bytes. Its parameters decide on the device.
        optimizers: the optimizers whose state is to be told from activations.
        inputs: the batch, of any kind: collections, mappings and objects that hold tensors, in any nesting.
        device: count storages of this device instead of that of the parameters.
        workspace: measure the bytes that each operator holds while it runs, so that
            :attr:`predicted_peak_bytes` can be given.
        limit: asked before each operator, and may break the block off.

    Raises:
        ValueError: if ``device`` is not given and ``model`` has no parameters, or has them on two devices.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> batch = torch.ones(16, 4)
        >>> with MemoryLedger(model, optimizer, batch) as ledger:
        ...     model(batch).sum().backward()
        ...     optimizer.step()
        >>> held = ledger.breakdown().maxima
        >>> held[Category.PARAMETERS], held[Category.GRADIENTS], held[Category.INPUTS]
        (196, 196, 256)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizer | Sequence[Optimizer] = (),
        inputs: Any = None,
        *,
        device: torch.device | str | None = None,
        workspace: OpWorkspace | None = None,
        limit: AllocationLimit | None = None,
    ) -> None:
        self._model = model
        self._optimizers = tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)
        self._inputs = inputs
        self.device = torch.device(device) if device is not None else parameter_device(model)
        self._estimate = PeakEstimate(workspace) if workspace is not None else None
        self._limit = limit
        self._late_before = 0
        self._is_sharded = False  # by FSDP2
        self._book = StorageBook(self.device, self._estimate)
        self._operators = OperatorWatch()  # type: ignore[no-untyped-call]
        self._modules = ModuleWatch(model, _Forwards(model, self._book), self._operators.in_force)
        self._undo = ExitStack()
        self._num_scanned = 0
        self._recomputed: list[StorageRecord] = []
        self._last_step_tick: int | None = None
        self._backward_module: str | None = None
        self._entered = False
        self._thread: int | None = None
        self._num_graphs = 0  # compiled ones that are running

    # ------------------------------------------------------------------ entering and leaving

    def __enter__(self) -> MemoryLedger:
        if self._entered:
            raise RuntimeError(
                "`MemoryLedger` was entered twice, but one ledger counts one block. "
                "Make a new `MemoryLedger(model, ...)` for each block."
            )
        self._entered = True
        self._thread = threading.get_ident()
        with ExitStack() as undo:  # undoes what was done so far if a later line fails
            self._install(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "`MemoryLedger` must be left in the thread that entered it, whose operators it counts, but "
                "was left in another one and still counts. Enter and leave it in the same thread."
            )
        self._undo.close()
        self._settle_recomputed()
        if len(self._book.records) != self._num_scanned:
            self._scan_training_state()
        self._book.close()

    def _install(self, undo: ExitStack) -> None:
        inputs = tensors_within(self._inputs)
        self._book.counts_fakes = rehearsal_depth() > 0 or _any_fake((*self._model.parameters(), *inputs))
        self._is_sharded = any(fsdp_parameters(module) for module in self._model.modules())
        self._scan_training_state()
        for tensor in inputs:
            self._book.note_from_the_start(tensor, Category.INPUTS)
        self._inputs = None  # the ledger must not keep the batch alive
        trained = {
            name: parameter
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad and parameter.is_leaf and not is_lazy(parameter)
        }
        owners = {id(parameter): _owner(name) for name, parameter in trained.items()}
        hooks = AccumulationHooks(functools.partial(self._after_accumulation, owners))
        undo.callback(hooks.take_off)
        hooks.put_on(trained.values())
        for optimizer in self._optimizers:
            undo.callback(optimizer.register_step_post_hook(self._after_optimizer_step).remove)
        undo.enter_context(self._modules)
        SAVED_TENSOR_WATCH.add(self._on_saved)
        undo.callback(SAVED_TENSOR_WATCH.remove, self._on_saved)
        RESIZE_WATCH.add(self._on_resize)
        undo.callback(RESIZE_WATCH.remove, self._on_resize)
        undo.callback(watch_marks(self._on_mark))
        undo.callback(watch_asides(self._book.begin_aside, self._book.end_aside))
        self._late_before = self._book.late_bytes
        listener = CompilerListener(
            self._before_compilation,
            self._modules.show,
            self._before_graph,
            self._after_graph,
            self._on_allocated,
        )
        COMPILER_WATCH.add(listener)
        undo.callback(COMPILER_WATCH.remove, listener)
        if MODES_HIDDEN.needed:
            MODES_HIDDEN.add(listener)
            undo.callback(MODES_HIDDEN.remove, listener)
        self._operators.begin(self._on_arguments, self._on_results, self._on_views)
        undo.callback(self._operators.end)

    # ------------------------------------------------------------------ reading

    @property
    def current_bytes(self) -> int:
        """Bytes that are live now (or, after the block, were live at its end)."""
        return self._book.live_bytes

    def bytes_at(self, tick: int) -> int:
        """Bytes that were live at a moment of :attr:`tick`, with those that were only seen later.

        Args:
            tick: the moment.

        Returns:
            The bytes.
        """
        return self.held_between(tick, tick).total_bytes

    @property
    def predicted_peak_bytes(self) -> int:
        """What the device allocator will have seen: the ledger's peak with the workspace of each operator.

        Raises:
            RuntimeError: if the ledger was made without ``workspace``.
        """
        if self._estimate is None:
            raise RuntimeError(
                "`MemoryLedger.predicted_peak_bytes` needs measured workspaces, but this ledger has none. "
                "Make it with `MemoryLedger(..., workspace=OpWorkspace(device))`."
            )
        return self._estimate.peak_bytes()

    def breakdown(
        self, *, per_module: bool = True, timeline: bool = True, with_asides: bool = True
    ) -> MemoryBreakdown:
        """What was counted so far.

        Args:
            per_module: whether to make the rows per module.
            timeline: whether to make the rows per event.
            with_asides: whether what ran within the step but is no part of it (probes) counts for the peak.

        Returns:
            A frozen breakdown; its growth rows hold what was made before the last :meth:`next_step` (or,
            without one, at any time), is still live and is no training state.
        """
        return analyse(
            [*self._book.records],  # another thread may ask while there are more and more
            [*self._book.events],
            device=str(self.device),
            module_types=self._modules.type_names,
            grown=[record for record, _ in self._book.live_entries() if self._outlived(record)],
            per_module=per_module,
            timeline=timeline,
            asides=() if with_asides else self._book.asides,
        )

    @property
    def tick(self) -> int:
        """The clock by which records count: it advances whenever a storage is made, freed or resized."""
        return self._book.tick

    @property
    def records(self) -> Sequence[StorageRecord]:
        """The life of every storage so far."""
        return self._book.records

    def records_of(self, tensor: torch.Tensor) -> list[StorageRecord]:
        """The records of the storages behind a tensor, as far as they are counted.

        Args:
            tensor: any tensor.

        Returns:
            One record per storage.
        """
        return self._book.records_of(tensor)

    def survivors(self) -> tuple[Survivor, ...]:
        """What is still live of all that was made in the block and is no training state.

        Returns:
            Weak handles that can be asked later whether the storage still exists.
        """
        return self._book.survivors()

    def mark(self, name: str) -> None:
        """Put an event on the timeline.

        Args:
            name: what happens now, e.g. ``"optimizer step"``.
        """
        self._book.mark(name)

    @contextmanager
    def limited(self, limit: AllocationLimit) -> Iterator[None]:
        """Ask a limit in this block, which may break it off.

        Args:
            limit: asked before each operator.
        """
        before = self._limit, self._late_before
        self._limit, self._late_before = limit, self._book.late_bytes
        try:
            yield
        finally:
            self._limit, self._late_before = before

    def held_between(self, first: int, last: int) -> CategoryBytes:
        """What was live at the highest moment of a stretch.

        Args:
            first: the beginning, as :attr:`tick` told it.
            last: its end.

        Returns:
            Bytes by category, as they are known by now.
        """
        return held_at_peak(self._book.records, first, last)

    def next_step(self) -> None:
        """Say that a training step is over, when one ledger counts several: what outlives it is growth."""
        self._last_step_tick = self._book.tick
        self.mark("next step")

    # ------------------------------------------------------------------ what happens inside the block

    # The next two run around every operator. They look first at what is nearly always the case: arguments
    # that are tensors and in the book, and a result that is one tensor or an argument.

    def _on_arguments(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        if func is _LIFT_FRESH:
            return  # `torch.tensor(...)` makes its storage out of sight and shows it here first
        knows = self._book.knows
        for argument in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(argument, torch.Tensor):
                if not knows(argument):
                    self._note_argument(argument)
            elif isinstance(argument, (list, tuple)):
                for tensor in tensors_in(argument):
                    self._note_argument(tensor)
        role = role_of(func)
        if role is not None:
            self._classify((args, kwargs), role)
        if self._estimate is not None:
            self._estimate.before(func, args, kwargs)
        if self._limit is not None:
            late_bytes = self._book.late_bytes - self._late_before
            self._limit.before(func, args, kwargs, self._book.live_bytes, late_bytes)

    def _on_views(self) -> None:
        if self._backward_module is not None or self._modules.in_backward():
            self._follow_backward(self._modules.now())

    def _on_results(self, func: Any, results: Any) -> None:
        now = self._modules.now()
        if now.in_backward or self._backward_module is not None:
            self._follow_backward(now)
        if returns_arguments(func):
            return
        made_bytes = 0
        for tensor in (results,) if isinstance(results, torch.Tensor) else tensors_in(results):
            new = self._book.note_new(tensor, now.module)
            made_bytes += sum(record.num_bytes for record in new)
            if now.recomputing:
                self._recomputed.extend(new)
        role = role_of(func)
        if role is not None:
            self._classify(results, role)
        if self._limit is not None:
            self._limit.after(made_bytes)

    def _classify(self, tree: Any, category: Category) -> None:
        for tensor in tensors_in(tree):
            self._book.classify(tensor, category, None)

    def _note_argument(self, tensor: torch.Tensor) -> None:
        if self._num_graphs:
            self._on_results(None, tensor)  # made by the graph that is running, and shown to an operator
            return
        category = Category.INPUTS
        if self._modules.now().in_backward:
            if self._is_sharded and tensor.dim() == 1 and not self._book.records_of(tensor):
                # What a collective made out of sight to reduce gradients in (gloo does) is new.
                self._on_results(None, tensor)
                self._classify(tensor, Category.UNSHARDED_GRADIENTS)
                return
            category = Category.GRADIENTS if ddp_around(self._model) is None else Category.BUCKETS
        self._book.note_from_the_start(tensor, category)

    def _on_saved(self, tensor: torch.Tensor) -> None:
        if not self._operators.in_force():
            return
        # What no operator made in the block was there before.
        for record in self._book.note_from_the_start(tensor, Category.INPUTS):
            # What was there before and is filled anew, as FSDP gathers weights, is no activation.
            if record.category is Category.TEMPORARY and not record.existed_before:
                record.category = Category.ACTIVATIONS
                record.recomputed = self._modules.now().recomputing
            if record.category is Category.ACTIVATIONS and record.saver is None:
                record.saver = self._modules.now().module

    def _on_resize(self, storage: torch.UntypedStorage, num_bytes_before: int) -> None:
        if self._operators.in_force():
            self._book.note_unknown(storage, num_bytes_before)
            self._book.resize(storage, self._modules.now().module)
        else:
            self._book.resize(storage)

    def _after_accumulation(self, owners: Mapping[int, str], parameter: torch.Tensor) -> None:
        if parameter.grad is not None and self._operators.in_force():
            self._book.classify(parameter.grad, Category.GRADIENTS, owners[id(parameter)])

    def _after_optimizer_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._operators.in_force():
            self._scan_training_state()
            self.mark("optimizer step")

    def _before_compilation(self) -> None:
        if threading.get_ident() == self._thread:
            self._modules.hide()

    def _before_graph(self, inputs: Sequence[Any]) -> None:
        if self._operators.in_force():
            for tensor in tensors_in(inputs):
                self._note_argument(tensor)
            self._num_graphs += 1

    def _after_graph(self, outputs: Any) -> None:
        if self._operators.in_force():
            self._num_graphs -= 1
            self._on_results(None, outputs)

    def _on_allocated(self, tensor: torch.Tensor) -> None:
        if self._operators.in_force():
            self._on_results(None, tensor)

    def _on_mark(self, name: str) -> None:
        if self._operators.in_force():
            self.mark(name)

    def _settle_recomputed(self) -> None:
        # What outlives the recomputation was recomputed to be used by backward; the rest was temporary.
        for record in self._recomputed:
            if record.died is None and record.category in TRANSIENT:
                record.category = Category.ACTIVATIONS
                record.recomputed = True
                record.saver = record.saver or record.producer
        self._recomputed.clear()

    def _follow_backward(self, now: Moment) -> None:
        if now.recomputing:
            return
        if self._recomputed:
            self._settle_recomputed()
        if not now.in_backward:
            self._backward_module = None
        elif now.module != self._backward_module:
            self._backward_module = now.module
            self.mark(f"backward {now.module}".rstrip())

    def _scan_training_state(self) -> None:
        classify_training_state(self._book, self._model, self._optimizers)
        self._num_scanned = len(self._book.records)

    def _outlived(self, record: StorageRecord) -> bool:
        if record.existed_before or record.category in (*TRAINING_STATE, Category.INPUTS):
            return False
        return self._last_step_tick is None or record.born <= self._last_step_tick


class _Forwards:
    """Puts forwards on the timeline, and looks in the first one for a DDP that nobody knew of.

    Apart from the ledger, which would be held by what it holds.

    Args:
        model: the module that is trained.
        book: takes the events.
    """

    def __init__(self, model: nn.Module, book: StorageBook) -> None:
        self._model = model
        self._book = book
        self._is_first = True

    def __call__(self, name: str) -> None:
        if self._is_first:
            self._is_first = False
            classify_buckets(self._book, self._model)
        self._book.mark(name)


skip_in_dynamo(MemoryLedger._after_accumulation, MemoryLedger._after_optimizer_step)


def _any_fake(tensors: Iterable[torch.Tensor]) -> bool:
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # where nobody has imported it, there are none
    return fakes is not None and any(fakes.is_fake(tensor) for tensor in tensors)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
