"""The ledger: live bytes of tensor storages, counted exactly while anything runs inside it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_memtrain.core import (
    Category,
    CategoryBytes,
    MemoryBreakdown,
)
from lightning_memtrain.core.arguments.value_checks import (
    as_device,
    check_kinds,
    check_modules,
    check_optimizers,
)
from lightning_memtrain.ledger.model_devices import parameter_device
from lightning_memtrain.ledger.operators.allocation_limit import AllocationLimit
from lightning_memtrain.ledger.operators.workspace import (
    OpWorkspace,
    PeakEstimator,
    PeakMoments,
)
from lightning_memtrain.ledger.step_tracker import StepTracker
from lightning_memtrain.ledger.storage_records import (
    Event,
    StorageRecord,
    Survivor,
    build_breakdown,
    held_at_peak,
)
from lightning_memtrain.ledger.storage_tracker import TRAINING_STATE, StorageTracker
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors


class MemoryLedger:
    """Count live bytes of tensor storages on one device, by category, module and moment.

    Everything that runs inside the ``with`` block is counted: forward, backward, recomputation, optimizer
    steps, on CPU, CUDA or any other device. On ``meta`` no memory is used, but torch takes other kernels
    there, with other bytes: :func:`~lightning_memtrain.predict` tells what a device will need. Storages are
    counted once however many tensors share them, from the moment when an operator returns them until they
    are freed. Bytes that an operator uses only while it runs are not tensors of the program and not counted:
    see :class:`~lightning_memtrain.ledger.OpWorkspace`.

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
        held: tensors that live on beside the block, such as copies of weights or a second model, whether it
            uses them or not; training state and the batch among them are counted as such.

    Raises:
        ArgumentError: if ``device`` is not given and ``model`` has no parameters, or has them on two devices.

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
        held: Iterable[torch.Tensor] = (),
    ) -> None:
        check_modules("MemoryLedger", model=model)
        cure = "Leave it out."
        if workspace is not None:
            check_kinds("MemoryLedger", OpWorkspace, "an OpWorkspace or None", cure, workspace=workspace)
        if limit is not None:
            check_kinds("MemoryLedger", AllocationLimit, "an AllocationLimit or None", cure, limit=limit)
        self._model = model
        self._optimizers = tuple(optimizers) if isinstance(optimizers, Sequence) else (optimizers,)
        check_optimizers("MemoryLedger", optimizers=self._optimizers)
        self._inputs = inputs
        check_kinds("MemoryLedger", Iterable, "tensors", "Pass a list of tensors.", held=held)
        self._held = tuple(held)
        for one in self._held:
            check_kinds("MemoryLedger", torch.Tensor, "tensors", "Pass a list of tensors.", held=one)
        given = None if device is None else as_device("MemoryLedger", device=device)
        self.device = parameter_device(model) if given is None else given
        self._estimate = PeakEstimator(workspace) if workspace is not None else None
        self._storages = StorageTracker(self.device, self._estimate)
        self._watch = StepTracker(model, self._optimizers, self._storages, self._estimate, limit)
        self._undo = ExitStack()
        self._last_step_tick: int | None = None
        self._entered = False
        self._thread: int | None = None

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
            inputs, self._inputs = find_tensors(self._inputs), None  # the ledger must not keep the batch
            held, self._held = self._held, ()
            self._watch.begin(inputs, undo, held)
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise RuntimeError(
                "`MemoryLedger` must be left in the thread that entered it, whose operators it counts, but "
                "was left in another one and still counts. Enter and leave it in the same thread."
            )
        self._undo.close()
        self._watch.end()
        self._storages.close()

    # ------------------------------------------------------------------ reading

    @property
    def current_bytes(self) -> int:
        """Bytes that are live now (or, after the block, were live at its end)."""
        return self._storages.live_bytes

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

    @property
    def peak_moments(self) -> PeakMoments | None:
        """What :attr:`predicted_peak_bytes` comes of; ``None`` if the ledger has no ``workspace``."""
        return None if self._estimate is None else self._estimate.moments()

    def breakdown(
        self, *, per_module: bool = True, timeline: bool = True, with_asides: bool = True
    ) -> MemoryBreakdown:
        """What was counted so far, as bytes by category, by module and by moment.

        Args:
            per_module: whether to make the rows per module.
            timeline: whether to make the rows per event.
            with_asides: whether what ran within the step but is no part of it (probes) counts for the peak.

        Returns:
            A frozen breakdown; its growth rows hold what was made before the last :meth:`next_step` (or,
            without one, at any time), is still live and is no training state.
        """
        return build_breakdown(
            [*self._storages.records],  # another thread may ask while there are more and more
            [Event(tick, name) for tick, name in [*self._storages.events]],
            device=str(self.device),
            module_types=self._watch.modules.type_names,
            grown=[one.record for one in self._storages.live_entries() if self._outlived(one.record)],
            per_module=per_module,
            timeline=timeline,
            asides=() if with_asides else self._storages.asides,
        )

    @property
    def tick(self) -> int:
        """The clock by which records count: it advances whenever a storage is made, freed or resized."""
        return self._storages.tick

    @property
    def records(self) -> Sequence[StorageRecord]:
        """The life of every storage so far."""
        return self._storages.records

    def records_of(self, tensor: torch.Tensor) -> list[StorageRecord]:
        """The records of the storages behind a tensor, as far as they are counted.

        Args:
            tensor: any tensor, of any shape, dtype and layout.

        Returns:
            One record per storage.
        """
        return self._storages.records_of(tensor)

    def survivors(self) -> tuple[Survivor, ...]:
        """What is still live of all that was made in the block and is no training state.

        Returns:
            Weak handles that can be asked later whether the storage still exists.
        """
        return self._storages.survivors()

    def annotate(self, name: str) -> None:
        """Put an event on the timeline.

        Args:
            name: what happens now, e.g. ``"optimizer step"``.
        """
        self._storages.annotate(name)

    def limited(self, limit: AllocationLimit) -> AbstractContextManager[None]:
        """Ask a limit in this block, which may break it off.

        Args:
            limit: asked before each operator.

        Returns:
            The block.
        """
        return self._watch.limited(limit)

    def held_between(self, first: int, last: int) -> CategoryBytes:
        """What was live at the highest moment of a stretch.

        Args:
            first: the beginning, as :attr:`tick` told it.
            last: its end.

        Returns:
            Bytes by category, as they are known by now.
        """
        return held_at_peak(self._storages.records, first, last)

    def next_step(self) -> None:
        """Say that a training step is over, when one ledger counts several: what outlives it is growth."""
        self._last_step_tick = self._storages.tick
        self.annotate("next step")

    def _outlived(self, record: StorageRecord) -> bool:
        if record.existed_before or record.category in (*TRAINING_STATE, Category.INPUTS, Category.HELD):
            return False
        return self._last_step_tick is None or record.born <= self._last_step_tick
