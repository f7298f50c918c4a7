"""Bytes that an operator holds only while it runs: measured once per operator, shapes and dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from lightning_memtrain.compat.torch_private import OpOverload, disable_current_modes, schema_of
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import as_device
from lightning_memtrain.core.random_state import torch_random_kept
from lightning_memtrain.ledger.device_allocator import allocator_statistics


@dataclass(frozen=True)
class TensorSpec:
    """All of a tensor that decides on what an operator allocates for it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self, device: torch.device) -> torch.Tensor:
        """A tensor of this form: ones, or zeros where a number may be an index."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor.fill_(1 if self.dtype.is_floating_point else 0)

    @property
    def num_bytes(self) -> int:
        """What its entries take, as if none shared a place."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Items:
    """A list or tuple among the arguments of an operator.

    Args:
        kind: which of both.
        items: what it holds.
    """

    kind: type[list[Any]] | type[tuple[Any, ...]]
    items: tuple[Hashable, ...]


@dataclass(frozen=True)
class _Unknown:
    description: str


class _Place(Enum):
    """Stands for a device among arguments; of an enumeration, it is the same one in every process."""

    TARGET = "the device to measure on"


_TARGET_DEVICE = _Place.TARGET


@dataclass(frozen=True)
class OpCall:
    """An operator with its arguments, tensors replaced by their form; equal calls need equal workspace."""

    func: Callable[..., Any]
    arguments: tuple[Hashable, ...]
    keywords: tuple[tuple[str, Hashable], ...]

    def make_arguments(self, device: torch.device) -> tuple[list[Any], dict[str, Any]]:
        """Arguments to run the call with, made up on a device.

        Args:
            device: where tensors are made.

        Returns:
            Positional and keyword arguments.

        Raises:
            TypeError: if one cannot be made up.
        """
        kwargs = {name: _make_argument(argument, device) for name, argument in self.keywords}
        return [_make_argument(argument, device) for argument in self.arguments], kwargs

    def __reduce__(self) -> Any:
        schema: Any = schema_of(self.func) if isinstance(self.func, OpOverload) else None
        if schema is None:
            return type(self), (self.func, self.arguments, self.keywords)
        return _call_of_named, (schema.name, schema.overload_name, self.arguments, self.keywords)

    @property
    def tensors(self) -> list[TensorSpec]:
        """The forms of all tensors among the arguments, with repetitions."""
        return [*_specs_in((self.arguments, [value for _, value in self.keywords]))]


def _call_of_named(name: str, overload: str, arguments: Any, keywords: Any) -> OpCall:
    """A call of an operator of torch, which cannot be pickled but by its name."""
    namespace, _, operator = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), operator)
    return OpCall(getattr(packet, overload or "default"), arguments, keywords)


def _specs_in(tree: Any) -> Iterator[TensorSpec]:
    if isinstance(tree, TensorSpec):
        yield tree
    elif isinstance(tree, Items):
        yield from _specs_in(tree.items)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _specs_in(item)


class OpWorkspace:
    """A table of how many bytes an operator holds at most while it runs, its results included.

    Each distinct call is run once, alone, on the target device with made-up data, and the device
    allocator's peak is read. Random number generators are left as they were.

    Args:
        device: where to measure, the one that the step is for.

    Raises:
        ArgumentError: if the device has no allocator figures.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = as_device("OpWorkspace", device=device)
        allocator = allocator_statistics(self.device)
        if allocator is None:
            raise ArgumentError(
                "`OpWorkspace(device)` must be a device whose allocator reports its peak, but got "
                f"{self.device}. Use the device on which the model will be trained, e.g. 'cpu' or 'cuda'."
            )
        self._allocator = allocator
        self._peaks: dict[OpCall, int] = {}
        self.unmeasured: dict[OpCall, str] = {}

    @property
    def granularity_bytes(self) -> int:
        """The allocator rounds every block up to a multiple of this."""
        return self._allocator.granularity_bytes

    def peak_bytes(self, call: OpCall) -> int:
        """Most bytes that one call holds beyond its arguments, results included.

        A call that cannot be run alone (its result depends on the data, or made-up data is refused) counts
        0 and is listed in :attr:`unmeasured` with the reason.
        """
        if call not in self._peaks:
            self._peaks[call] = self._measure(call)
        return self._peaks[call]

    def most_bytes(self, call: OpCall, made_bytes: int) -> float:
        """More than a call can hold, so that one that does not matter need not be measured.

        Args:
            call: which.
            made_bytes: of its results.

        Returns:
            A bound; infinite here, where every call is measured.
        """
        return math.inf

    def _measure(self, call: OpCall) -> int:
        # In a thread of its own: a profiler of this one may count what this one allocates.
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(self._measure_here, call).result()

    def _measure_here(self, call: OpCall) -> int:
        with disable_current_modes(), torch_random_kept(self.device), torch.no_grad():
            try:
                args, kwargs = call.make_arguments(self.device)
                self._allocator.start()
                try:
                    call.func(*args, **kwargs)
                finally:
                    reading = self._allocator.stop()
            except Exception as error:  # an operator may refuse made-up data in any way it likes
                self.unmeasured[call] = f"{type(error).__name__}: {error}"
                return 0
        return reading.over_start_bytes if reading is not None else 0


def computes_nothing(func: Callable[..., Any]) -> bool:
    """Whether an operator computes nothing: it names a range for profilers, or asks what a tensor is."""
    return getattr(func, "namespace", "") in ("prim", "profiler")


def op_call(func: Callable[..., Any], args: Any, kwargs: Any) -> OpCall:
    """Describe a call by what decides on its allocations."""
    keywords = tuple((name, _describe(value)) for name, value in sorted(kwargs.items()))
    return OpCall(func, tuple(_describe(argument) for argument in args), keywords)


@dataclass(frozen=True)
class PeakMoments:
    """All of a step that its peak depends on, whatever the workspace of its operators is.

    Args:
        rounded_bytes: most bytes of tensors, as the allocator rounds them, without those that were late.
        late_bytes: of tensors that were live from the start, though they were only seen later.
        live_before: most live bytes before each distinct call, without those that were late.
        most_made: most bytes that each of them made.
    """

    rounded_bytes: int
    late_bytes: int
    live_before: Mapping[OpCall, int]
    most_made: Mapping[OpCall, int]

    def peak_bytes(self, workspace: OpWorkspace) -> int:
        """The peak.

        Args:
            workspace: the table to look workspaces up in; measures those that it does not have.

        Returns:
            The bytes.
        """
        peak_bytes = self.rounded_bytes
        bounds = {
            call: live_bytes + workspace.most_bytes(call, self.most_made[call])
            for call, live_bytes in self.live_before.items()
        }
        for call in sorted(bounds, key=lambda call: -bounds[call]):
            if bounds[call] <= peak_bytes:
                break
            peak_bytes = max(peak_bytes, self.live_before[call] + workspace.peak_bytes(call))
        return peak_bytes + self.late_bytes


class PeakEstimator:
    """Finds the moment at which live storages and the workspace of the running operator are most.

    Only the largest number of live bytes before each distinct call is kept: nothing else can be a peak.

    Args:
        workspace: the table to look workspaces up in.
    """

    def __init__(self, workspace: OpWorkspace) -> None:
        self._workspace = workspace
        self._live_bytes = 0
        self._late_bytes = 0
        self._peak_bytes = 0
        self._most_before: dict[OpCall, int] = {}
        self._most_made: dict[OpCall, int] = {}
        self._running: OpCall | None = None
        self._made_bytes = 0

    def allocate(self, num_bytes: int, late: bool = False) -> None:
        """Count a storage; a ``late`` one was live from the start, so during all that was noted before."""
        # First rounded, then added: within a call, garbage may be collected, which changes the sum.
        num_bytes = self._rounded(num_bytes)
        self._live_bytes += num_bytes
        if late:
            self._late_bytes += num_bytes
        else:
            self._made_bytes += num_bytes
        self._peak_bytes = max(self._peak_bytes, self._live_bytes - self._late_bytes)

    def free(self, num_bytes: int) -> None:
        """Count a storage no more, since it was freed."""
        num_bytes = self._rounded(num_bytes)
        self._live_bytes -= num_bytes

    def before(self, func: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Note how much is live when an operator begins."""
        if computes_nothing(func):
            return
        self._note_made()
        call = self._running = op_call(func, args, kwargs)
        live_bytes = self._live_bytes - self._late_bytes
        self._most_before[call] = max(self._most_before.get(call, live_bytes), live_bytes)

    def peak_bytes(self) -> int:
        """The peak, after measuring what was not measured before and may matter."""
        return self.moments().peak_bytes(self._workspace)

    def moments(self) -> PeakMoments:
        """What the peak depends on beside the workspace."""
        self._note_made()
        return PeakMoments(self._peak_bytes, self._late_bytes, dict(self._most_before), dict(self._most_made))

    def _note_made(self) -> None:
        """Write down what was made since the last operator began."""
        call, self._running = self._running, None
        if call is not None:
            self._most_made[call] = max(self._most_made.get(call, 0), self._made_bytes)
        self._made_bytes = 0

    def _rounded(self, num_bytes: int) -> int:
        unit = self._workspace.granularity_bytes
        return -(-num_bytes // unit) * unit


def _describe(tree: Any) -> Hashable:
    if isinstance(tree, torch.Tensor):
        if tree.layout is not torch.strided:
            return _Unknown(f"a tensor of layout {tree.layout}")
        return TensorSpec(tuple(tree.shape), tuple(tree.stride()), tree.dtype)
    if isinstance(tree, list):
        return Items(list, tuple(_describe(item) for item in tree))
    if isinstance(tree, tuple):
        return Items(tuple, tuple(_describe(item) for item in tree))
    if isinstance(tree, torch.device):
        return _TARGET_DEVICE
    if isinstance(tree, torch.Generator):
        return None
    if isinstance(tree, torch.ScriptObject):  # such as the handle of a named range for profilers
        return _Unknown(type(tree).__name__)
    return tree if isinstance(tree, Hashable) else _Unknown(repr(tree))


def _make_argument(frozen: Hashable, device: torch.device) -> Any:
    if isinstance(frozen, TensorSpec):
        return frozen.make(device)
    if isinstance(frozen, Items):
        return frozen.kind(_make_argument(item, device) for item in frozen.items)
    if isinstance(frozen, _Unknown):
        raise TypeError(f"cannot make {frozen.description}")
    return device if frozen is _TARGET_DEVICE else frozen
