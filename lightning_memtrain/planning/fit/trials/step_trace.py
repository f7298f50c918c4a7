"""What a trial tells: bytes of a step, its operators, and its module calls, to be sent between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_memtrain.checkpointing.selection.call_profiler import ProfiledCall
from lightning_memtrain.core import Category
from lightning_memtrain.ledger.operators.workspace import OpCall, PeakMoments
from lightning_memtrain.ledger.storage_records import StorageRecord


@dataclass(frozen=True)
class WatchedCalls:
    """The module calls of one chunk, in the form that :class:`StepProfile` reads.

    Args:
        root: the call of ``training_step``.
        op_calls: operators of its forward.
        saves: see :class:`CallProfiler`.
        forward_end: tick at which backward began.
        records: the life of every storage of the step.
        ticks: every operator from then on, with the tick before it.
    """

    root: ProfiledCall
    op_calls: list[OpCall]
    saves: list[tuple[list[StorageRecord], int]]
    forward_end: int
    records: Sequence[StorageRecord]
    ticks: Sequence[tuple[int, OpCall]]


@dataclass(frozen=True)
class StepOperators:
    """The operators of a step, each as often as it ran.

    Args:
        forward: of its last chunk's forward.
        backward: of its last chunk's backward, with what is recomputed in it.
        update: of all else after that: clipping, the optimizer's step.
        host_bytes: copied between a GPU and the host in forward and backward.
    """

    forward: list[OpCall] = field(default_factory=list)
    backward: list[OpCall] = field(default_factory=list)
    update: list[OpCall] = field(default_factory=list)
    host_bytes: int = 0


@dataclass(frozen=True)
class RunFacts:
    """What of a run decides on the techniques that it can have.

    Args:
        automatic_optimization: whether Lightning calls backward and the optimizer.
        has_batchnorm: whether some layer normalises over samples.
        optimizers: per optimizer the names of its class and bases, and the defaults of its groups.
        exact: per technique that was in the trial, by class name, whether it leaves the result as it is.
        on_gpu: whether it runs on a GPU.
        has_float32: whether a parameter has 4 bytes a number.
        precision: what Trainer calls it.
        takes_all_at_once: whether an optimizer makes temporaries of all parameters (`foreach`).
        stateful: per optimizer, for how many parameters it keeps something after the steps.
        held_bytes: what lives on the device beside the model, such as copies of its weights.
        networks: children of the module that have parameters, and the names of their own children.
    """

    automatic_optimization: bool
    has_batchnorm: bool
    optimizers: tuple[tuple[tuple[str, ...], Mapping[str, object]], ...]
    exact: Mapping[str, bool]
    on_gpu: bool = False
    has_float32: bool = True
    precision: str = "32-true"
    takes_all_at_once: bool = False
    stateful: tuple[int, ...] = ()
    held_bytes: int = 0
    networks: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class StepTrace:
    """A step that ran without data.

    Args:
        ledger_bytes: most bytes of tensors that were live at once.
        moments: what the peak of the CPU's allocator follows from; ``None`` elsewhere.
        allocated_bytes: most bytes of blocks of a GPU's allocator; 0 on the CPU.
        reserved_bytes: most bytes that it had from the device; 0 on the CPU.
        workspace_bytes: what libraries keep on a GPU.
        at_peak: live bytes by category at the peak.
        growth_bytes: what each chunk leaves until the end of the batch.
        operators: what ran.
        facts: about the run.
        calls: module calls of the last chunk; ``None`` if nobody asked.
        state_bytes: of parameters, buffers, gradients and optimizer state when the update begins, which
            neither smaller chunks nor recomputation can make less; 0 if that is not known.
    """

    ledger_bytes: int
    moments: PeakMoments | None
    allocated_bytes: int
    reserved_bytes: int
    workspace_bytes: int
    at_peak: Mapping[Category, int]
    growth_bytes: int
    operators: StepOperators
    facts: RunFacts
    calls: WatchedCalls | None = None
    state_bytes: int = 0
