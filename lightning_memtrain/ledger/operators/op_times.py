"""How long operators take: measured once per operator, shapes and dtypes, on the target device."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from lightning_memtrain.compat.torch_private import disable_current_modes
from lightning_memtrain.core.random_state import torch_random_kept
from lightning_memtrain.ledger.operators.workspace import OpCall, computes_nothing

_ENOUGH_SECONDS = 0.02
_MOST_RUNS = 5


class OpTimes:
    """A table of the seconds that each distinct call of an operator takes, run alone with made-up data.

    The first run of a short call warms up and is not counted; of a long one, whose warming up is nothing
    beside it, the first run counts. Of several runs the fastest is taken. Random number generators are left
    as they were.

    Args:
        device: where to measure; calls that were traced on fake tensors or on ``meta`` are run there. One
            that runs nothing may have a function ``seconds_of`` in its module, which estimates.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.unmeasured: dict[OpCall, str] = {}
        """Calls that cannot be run alone, which count 0 seconds, each with the reason."""
        self._seconds: dict[OpCall, float] = {}

    def seconds(self, calls: Iterable[OpCall]) -> float:
        """Seconds that all of the calls take together.

        Args:
            calls: as :func:`~.workspace.op_call` describes them, with repetitions.

        Returns:
            The sum.
        """
        return sum(self._of(call) for call in calls)

    def _of(self, call: OpCall) -> float:
        if computes_nothing(call.func):
            return 0.0
        if call not in self._seconds:
            estimate = getattr(getattr(torch, self.device.type, None), "seconds_of", None)
            self._seconds[call] = (
                self._measure(call) if estimate is None else estimate(call.make_arguments, call.func)
            )
        return self._seconds[call]

    def _measure(self, call: OpCall) -> float:
        fastest = float("inf")
        with disable_current_modes(), torch_random_kept(self.device), torch.no_grad():
            try:
                spent = 0.0
                for run in range(_MOST_RUNS):
                    args, kwargs = call.make_arguments(
                        self.device
                    )  # anew, since the operator may write to them
                    self._wait()
                    start = time.perf_counter()
                    call.func(*args, **kwargs)
                    self._wait()
                    seconds = time.perf_counter() - start
                    del args, kwargs  # not to be held beside the next ones
                    spent += seconds
                    if run > 0 or seconds > _ENOUGH_SECONDS:
                        fastest = min(fastest, seconds)
                    if spent > _ENOUGH_SECONDS and fastest < float("inf"):
                        break
            except Exception as error:  # an operator may refuse made-up data in any way it likes
                self.unmeasured[call] = f"{type(error).__name__}: {error}"
                return 0.0
        return fastest

    def _wait(self) -> None:
        module: Any = getattr(torch, self.device.type, None)
        if hasattr(module, "synchronize"):
            module.synchronize()
