"""Trials of one run, each in a copy of this process; some side by side."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from lightning_memtrain.compat.torch_private import DisableTorchFunction, disable_current_modes
from lightning_memtrain.planning.fit.trials.step_trace import StepTrace
from lightning_memtrain.planning.fit.trials.trial import Trial, trial_on_cpu, trial_on_twin, with_techniques
from lightning_memtrain.planning.prediction.few_steps import Model
from lightning_memtrain.planning.prediction.forked import Ask, BegunCopy, result_of
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.planning.prediction.twin.twin_place import TwinPlace, on_twin
from lightning_memtrain.tracing.device import Device

Outcome = StepTrace | Exception


class TrialCopies:
    """Runs trials.

    On the twin of a GPU a copy of this process comes first, in which the model is made and all is imported
    that this needs; trials begin as copies of that one.

    Args:
        model: what is trained, or what makes it.
        options: arguments of Trainer, as the run has them.
        device: the CPU, or a GPU by NVIDIA.
        world: the ranks that share the model.
    """

    def __init__(
        self, model: Model, options: Mapping[str, Any], device: Device, world: World | None = None
    ) -> None:
        self._model, self._options, self._device, self._world = model, options, device, world
        self._begun: list[_Begun] = []
        self._made: BegunCopy[None] | None = None
        self._is_waiting = False

    @property
    def num_at_once(self) -> int:
        """Trials that are run side by side: one for each core that this process may use."""
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def begin(self, trials: Sequence[Trial]) -> None:
        """Begin some, of which nothing is waited for.

        Args:
            trials: side by side; :meth:`results` must have been called for those before.
        """
        if not self._device.is_cuda:
            self._begun = [_Begun(partial(self._on_cpu, trial)) for trial in trials]
            return
        try:
            messages = [pickle.dumps(trial) for trial in trials]
        except Exception:  # a batch may be anything; then each trial makes the model by itself
            self._begun = [_Begun(partial(self._alone, trial)) for trial in trials]
            return
        if self._made is None:
            made = BegunCopy(self._serve)
            made.next()
            self._made = made
        self._made.tell(messages)
        self._is_waiting = True

    def results(self) -> list[Outcome]:
        """What was begun came to.

        Returns:
            For each trial what its steps held and ran, or the error that it ended with.
        """
        if self._is_waiting:
            assert self._made is not None
            self._is_waiting = False
            return list(self._made.next()[1])
        begun, self._begun = self._begun, []
        return [_outcome(one.result) for one in begun]

    def close(self) -> None:
        """End what still runs; a later trial begins anew."""
        for one in self._begun:
            one.copy.stop()
        self._begun, self._is_waiting = [], False
        if self._made is not None:
            self._made.stop()
            self._made = None

    # ------------------------------------------------------------------ in copies

    def _on_cpu(self, trial: Trial) -> StepTrace:
        with _for_at_most(trial.most_seconds):
            return trial_on_cpu(self._model, self._options, self._device, trial)

    def _serve(self, ask: Ask) -> None:
        with on_twin(self._model, self._device, self._world) as place:
            outcomes: list[Outcome] = []
            while True:
                begun = [_Begun(partial(self._unpacked, place, one)) for one in ask(outcomes)]
                outcomes = [_outcome(one.result) for one in begun]

    def _unpacked(self, place: TwinPlace, message: bytes) -> StepTrace:
        with disable_current_modes(), DisableTorchFunction():  # as if nothing were on the twin yet
            trial = pickle.loads(message)
            given = with_techniques(self._model, self._options, self._device, trial)
        with _for_at_most(trial.most_seconds):
            return trial_on_twin(place, given, trial)

    def _alone(self, trial: Trial) -> StepTrace:
        given = with_techniques(self._model, self._options, self._device, trial)
        with on_twin(self._model, self._device, self._world) as place, _for_at_most(trial.most_seconds):
            return trial_on_twin(place, given, trial)


class _Begun:
    """A trial that runs.

    Args:
        function: what it does.
    """

    def __init__(self, function: Callable[[], StepTrace]) -> None:
        self._function = function
        self.copy = BegunCopy(self._asking_nothing)

    def _asking_nothing(self, ask: Ask) -> StepTrace:
        return self._function()

    def result(self) -> StepTrace:
        """Wait for it."""
        return result_of(self.copy, self._asking_nothing)


@contextmanager
def _for_at_most(seconds: float | None) -> Iterator[None]:
    """Give up after so many seconds; in a copy, whose only thread is the one that has begun it."""
    if seconds is None:
        yield
        return

    def give_up(*args: Any) -> None:
        raise TimeoutError(f"trying it was given up after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _outcome(wait: Callable[[], StepTrace]) -> Outcome:
    try:
        return wait()
    except Exception as error:
        return error
