"""Seconds of operators on this CPU, each run alone, but with the caches as a step leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import disable_current_modes
from lightning_memtrain.core.random_state import torch_random_kept
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits, traits_of
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call
from lightning_memtrain.planning.fit.seconds.even_clock import EvenClock
from lightning_memtrain.planning.prediction.cpu.smaller_calls import sizes_of, with_size

# More than the caches of one core, which the rest of a step would fill.
_FLUSHED_BYTES = 2**23
# What is smaller stays in a cache from when it was made until it is used.
_LEAST_COLD_BYTES = 2**16
_ENOUGH_SECONDS = 0.1
_MOST_RUNS = 3
# What a page of memory takes is measured once in so many operators.
_CALIBRATED = 8
# Of an operator on more than this a part is measured, which takes less time and less memory, and is often
# a part of the same operator on other sizes, too. What is done to single entries is faster on small parts.
_MOST_BYTES = 2**25
_MOST_BYTES_OF_PRODUCTS = 2**23
_PRODUCTS = frozenset(getattr(torch.ops.aten, name) for name in ("mm", "addmm", "bmm", "baddbmm"))
# Of long axes parts are so many times as long as something, as kernels have it.
_VECTOR = 64
_LAYERS = 24
_STEPS = 15


class MeasuredSeconds:
    """A table of the seconds that each distinct call of an operator takes within a step on the CPU.

    Its first tensor is what was computed just before, and is in the cache; all others come from memory, as
    what was saved for backward does. With a single thread the processor's time counts, so that others who use
    the machine do not.

    Fresh pages of memory do not count, since a run that has gone on for some steps is given few.

    Each operator costs something beside, in Python and in autograd: measured on layers that do next to
    nothing.
    """

    def __init__(self) -> None:
        self._seconds: dict[OpCall, list[float]] = {}
        self._clock = EvenClock(torch.get_num_threads())
        self._num_measured = 0
        self._elsewhere = torch.zeros(_FLUSHED_BYTES // 4)
        self.overhead_seconds = max(0.0, self._overhead())
        """Of each operator, beside its own."""

    def seconds(self, calls: Iterable[OpCall]) -> float:
        """Seconds that all of the calls take together.

        Args:
            calls: with repetitions; those that only make views take none.

        Returns:
            The sum.
        """
        return sum(
            self._of(call) + self.overhead_seconds for call in calls if not traits_of(call.func).makes_views
        )

    def measure_again(self, calls: Iterable[OpCall]) -> None:
        """Measure each distinct call once more; of all its times the median counts.

        A machine that others use is not always as fast: what is to be compared has to be measured in turn.

        Args:
            calls: with repetitions.
        """
        for call in dict.fromkeys(calls):
            if not traits_of(call.func).makes_views and self._of(call) > 0:
                self._seconds[call].append(self._measure(call, num_runs=2))

    def _of(self, call: OpCall) -> float:
        if call not in self._seconds:
            self._seconds[call] = [self._measure(call, _MOST_RUNS)]
        return median(self._seconds[call])

    def _measure(self, call: OpCall, num_runs: int) -> float:
        is_product = getattr(call.func, "overloadpacket", None) in _PRODUCTS
        most_bytes = _MOST_BYTES_OF_PRODUCTS if is_product else _MOST_BYTES
        if sum(spec.num_bytes for spec in call.tensors) <= most_bytes:
            return self._run(call, num_runs)
        smaller = _part_of(call, most_bytes)
        if smaller is None:
            return self._run(call, num_runs)
        part, times = smaller
        if part not in self._seconds or num_runs < _MOST_RUNS:
            self._seconds.setdefault(part, []).append(self._run(part, num_runs))
        return times * median(self._seconds[part])

    def _run(self, call: OpCall, num_runs: int) -> float:
        clock = self._clock
        self._num_measured += 1
        if self._num_measured % _CALIBRATED == 0:
            clock.calibrate()
        fastest, spent = float("inf"), 0.0
        with disable_current_modes(), torch_random_kept(torch.device("cpu")), torch.no_grad():
            try:
                for run in range(num_runs):
                    args, kwargs = call.make_arguments(torch.device("cpu"))
                    self._cool([*args, *kwargs.values()])
                    start = clock.now()
                    result = call.func(*args, **kwargs)
                    seconds = clock.between(start, clock.now())
                    del args, kwargs, result
                    spent += seconds
                    if run > 0 or seconds > _ENOUGH_SECONDS:
                        fastest = min(fastest, seconds)
                    if spent > _ENOUGH_SECONDS and fastest < float("inf"):
                        break
            except Exception:  # an operator may refuse made-up data in any way it likes
                return 0.0
        return fastest

    def _cool(self, arguments: list[Any]) -> None:
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        if sum(one.nbytes for one in tensors) < _LEAST_COLD_BYTES:
            return
        self._elsewhere.add_(1)
        tensors[0].fill_(1 if tensors[0].dtype.is_floating_point else 0)

    def _overhead(self) -> float:
        layers = nn.Sequential(*(m for _ in range(_LAYERS) for m in (nn.Linear(4, 4), nn.ReLU())))
        batch, clock, calls = torch.zeros(2, 4), self._clock, []
        mode = OperatorMode()  # type: ignore[no-untyped-call]

        def note(operator: OperatorTraits, args: Any, kwargs: Any) -> None:
            if not operator.makes_views:
                calls.append(op_call(operator.func, args, kwargs))

        def step() -> float:
            start = clock.now()
            layers(batch).sum().backward()
            return clock.between(start, clock.now())

        mode.begin(note, lambda operator, results: None)
        try:
            step()
        finally:
            mode.end()
        whole = min(step() for _ in range(_STEPS))
        return (whole - sum(self._of(call) for call in calls)) / len(calls)


def _part_of(call: OpCall, most_bytes: int) -> tuple[OpCall, float] | None:
    """A smaller call, and how many times as long the whole takes; ``None`` if no axis can be made shorter.

    Of parts that are all too large, the smallest.
    """
    found: list[tuple[int, OpCall, float]] = []
    for size in sizes_of(call):
        if any(spec.shape.count(size) > 1 for spec in call.tensors):
            continue  # such as a square matrix, of which a part is not so many times faster
        for part in _parts(size):
            smaller = with_size(call, size, part)
            if smaller is None:
                break
            num_bytes = sum(spec.num_bytes for spec in smaller.tensors)
            found.append((num_bytes, smaller, size / part))
            if num_bytes <= most_bytes:
                return smaller, size / part
    return min(found, key=lambda one: one[0])[1:] if found else None


def _parts(size: int) -> Iterator[int]:
    """Sizes from the half on, of whole vectors as long as that can be."""
    part = size // 2
    while part:
        yield part - part % _VECTOR if part > _VECTOR else part
        part //= 2
