"""Where a run is tried out: its trials, their bytes on the device, and the seconds of what they ran."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.checkpointing.selection.step_profile import StepProfile, Times
from lightning_memtrain.ledger.operators.workspace import OpCall
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.microbatching.splitting.batches import batch_size_of, take_samples
from lightning_memtrain.planning.fit.seconds.measured_seconds import MeasuredSeconds
from lightning_memtrain.planning.fit.seconds.roofline import RooflineSeconds
from lightning_memtrain.planning.fit.trials.real_rounds import Candidate, RealRounds
from lightning_memtrain.planning.fit.trials.run_progress import RunProgress
from lightning_memtrain.planning.fit.trials.step_trace import StepTrace
from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn
from lightning_memtrain.planning.fit.trials.timed_trial import RealSeconds, time_trial
from lightning_memtrain.planning.fit.trials.trial import Trial
from lightning_memtrain.planning.fit.trials.trial_copies import TrialCopies
from lightning_memtrain.planning.fit.trials.tried_ways import Asked, Segments, Tried
from lightning_memtrain.planning.fit.way import TechniqueSettings
from lightning_memtrain.planning.prediction.cpu.calibration import AskedWorkspace, measure_call
from lightning_memtrain.planning.prediction.few_steps import Model, is_module
from lightning_memtrain.planning.prediction.ranks.world import World
from lightning_memtrain.tracing.device import Device

#: So many chunks show what more of them would: the first finds no gradients, the third what the second kept.
SHOWN_CHUNKS = 3
# A trial that takes so many times as long as the first one is given up, but not before so many seconds.
_GIVEN_TIMES, _LEAST_GIVEN_SECONDS = 3.0, 6.0
# What real chunks may take in one search.
_MOST_REAL_SECONDS = 8.0
# Of random numbers on the CPU, beside those that calls keep.
_STATES_AT_ONCE = 3

# Bytes a second between a GPU and the host: of PCIe 3.0 with 16 lanes, which nobody has checked on a device.
_HOST_BANDWIDTH = 12e9

MICROBATCHING = "lightning_memtrain.Microbatching"
CHECKPOINTING = "lightning_memtrain.ActivationCheckpointing"


class Workshop:
    """Tries ways to run a model, each in a copy of this process.

    Args:
        model: what is trained, or what makes it.
        options: arguments of Trainer, as the run has them.
        device: what the run uses.
        batch: a batch of it, on the CPU.
        progress: of the run; ``None`` for one that has not begun.
        world: the ranks that share the model, of which the first is tried; ``None`` where it is whole.
    """

    def __init__(
        self,
        model: Model,
        options: Mapping[str, Any],
        device: Device,
        batch: Any,
        progress: RunProgress | None = None,
        world: World | None = None,
    ) -> None:
        self.device = device
        self.batch = batch
        self.batch_size = _batch_size(batch)
        self.num_trials = 0
        self.num_timed = 0
        self._known: dict[Any, Tried | Exception] = {}
        self._copies = TrialCopies(model, options, device, world)
        self._begun: list[Asked] = []
        self._most_seconds: float | None = None
        self.exact: dict[tuple[str, bool], bool] = {}
        """What techniques said of themselves, for one chunk and for several."""
        self._model = model
        self._progress = progress or RunProgress()
        self._world = world
        self._options = options
        self._workspace = None if device.is_cuda else AskedWorkspace(measure_call, torch.get_num_threads())
        self._times: Times | None = None
        self._rounds = RealRounds(self._run_for_real, _MOST_REAL_SECONDS)

    @property
    def times(self) -> Times:
        """How long operators take."""
        if self._times is None:
            self._times = RooflineSeconds(self.device) if self.device.is_cuda else MeasuredSeconds()
        return self._times

    def seconds(self, tried: Tried) -> float:
        """How long a step takes that was tried.

        Args:
            tried: any.

        Returns:
            Seconds: of all chunks and the update.
        """
        chunk, update = self.parts_in_seconds(tried)
        return tried.num_chunks * chunk + update

    def parts_in_seconds(self, tried: Tried) -> tuple[float, float]:
        """How long a chunk and the update of a step take that was tried.

        Args:
            tried: any.

        Returns:
            Seconds of one chunk, and of the update.
        """
        operators = tried.trace.operators
        chunk = self.times.seconds(operators.forward) + self.times.seconds(operators.backward)
        return chunk + operators.host_bytes / _HOST_BANDWIDTH, self.times.seconds(operators.update)

    def size_of(self, num_chunks: int) -> int:
        """Samples of the largest of so many chunks."""
        return -(-(self.batch_size or 1) // num_chunks)

    def settings(self, num_chunks: int, segments: Segments) -> tuple[TechniqueSettings, ...]:
        """Microbatches and recomputation, as a Trainer takes them.

        Args:
            num_chunks: of the batch.
            segments: what is recomputed.

        Returns:
            The callbacks.
        """
        found = []
        if num_chunks > 1:
            found.append(TechniqueSettings(MICROBATCHING, {"microbatch_size": self.size_of(num_chunks)}))
        if segments:
            found.append(TechniqueSettings(CHECKPOINTING, {"policy": _policy(segments)}))
        return tuple(found)

    def run(
        self,
        num_chunks: int,
        segments: Segments = (),
        switched: SwitchedOn | None = None,
        *,
        with_calls: bool = False,
        size: int | None = None,
    ) -> Tried:
        """Try one way.

        Args:
            num_chunks: of the batch.
            segments: what is recomputed.
            switched: further techniques.
            with_calls: whether module calls are followed.
            size: samples of the largest chunk, where ``switched`` has all techniques.

        Returns:
            What it came to.
        """
        way = Asked(num_chunks, segments, switched or SwitchedOn(), with_calls, size)
        self._take_up_begun()
        if not self._is_known(way):
            start = time.perf_counter()
            self._begin([way])
            self._take_up_begun()
            if self._most_seconds is None:
                took = time.perf_counter() - start
                self._most_seconds = max(_LEAST_GIVEN_SECONDS, _GIVEN_TIMES * took)
        found = self._known[way.key]
        if isinstance(found, Exception):
            raise found
        return found

    def ahead(self, ways: Sequence[Asked]) -> None:
        """Begin to try ways that will be asked for, as many side by side as this process has cores.

        Args:
            ways: the most wanted first; what they come to is waited for when one of them is asked for.
        """
        self._take_up_begun()
        wanted: dict[Any, Asked] = {way.key: way for way in ways if not self._is_known(way)}
        most = self._copies.num_at_once
        if len(wanted) > 1 and most > 1:
            self._begin(list(wanted.values())[:most])

    def wait(self) -> None:
        """Wait for what was begun, such as before something is timed."""
        self._take_up_begun()

    def close(self) -> None:
        """End what was begun and not asked for; trials may follow all the same."""
        self._begun = []
        self._copies.close()

    def _is_known(self, way: Asked) -> bool:
        known = self._known.get(way.key)
        if isinstance(known, Tried):
            return known.trace.calls is not None or not way.with_calls
        return known is not None

    def _begin(self, ways: list[Asked]) -> None:
        self.num_trials += len(ways)
        self._copies.begin([self._trial(way) for way in ways])
        self._begun = ways

    def _take_up_begun(self) -> None:
        begun, self._begun = self._begun, []
        for way, trace in zip(begun, self._copies.results() if begun else (), strict=True):
            self._known[way.key] = trace if isinstance(trace, Exception) else self._tried(way, trace)

    def _trial(self, way: Asked) -> Trial:
        num_chunks, on = way.num_chunks, way.switched
        settings = self.settings(num_chunks, way.segments) if way.size is None else ()
        size, shown = way.size or self.size_of(num_chunks), min(num_chunks, SHOWN_CHUNKS)
        techniques = [*settings, *on.techniques, *on.stand_ins]
        return Trial(
            techniques=[(one.class_path, dict(one.init_args), one.place) for one in techniques],
            trainer_arguments=dict(on.trainer_arguments),
            first_batch=self.batch if num_chunks == 1 else take_samples(self.batch, size),
            batch=self.batch if shown == num_chunks else take_samples(self.batch, size * shown),
            num_chunks=shown,
            with_calls=way.with_calls,
            progress=self._progress,
            most_seconds=self._most_seconds,
        )

    def _tried(self, way: Asked, trace: StepTrace) -> Tried:
        num_chunks, size = way.num_chunks, way.size or self.size_of(way.num_chunks)
        self.exact |= {(name, num_chunks > 1): one for name, one in trace.facts.exact.items()}
        left_out = 0
        if num_chunks > SHOWN_CHUNKS:
            shown_bytes = bytes_of(take_samples(self.batch, size * SHOWN_CHUNKS))
            left_out = bytes_of(self.batch) - shown_bytes + (num_chunks - SHOWN_CHUNKS) * trace.growth_bytes
        allocated = self._allocated_bytes(trace, way.segments) + left_out
        needed = allocated
        if self.device.is_cuda:
            needed = trace.reserved_bytes + left_out + self.device.context_bytes
        return Tried(num_chunks, size, way.segments, allocated, needed, trace)

    @property
    def can_time(self) -> bool:
        """Whether a way can be run for real: on the CPU, by a model that is there."""
        return (
            not self.device.is_cuda
            and self._world is None
            and is_module(self._model)
            and all(one.device.type == "cpu" for one in self._model.parameters())
        )

    def time(self, candidates: Sequence[Candidate], beside: Iterable[OpCall]) -> list[RealSeconds | None]:
        """Run ways for real, in turn.

        Args:
            candidates: the most wanted first.
            beside: operators to measure again in each round, with repetitions.

        Returns:
            What their chunks took; ``None`` for what failed or would have taken too long.
        """
        if not self.can_time:
            return [None] * len(candidates)
        times, calls = self.times, list(beside)
        found = self._rounds.time(
            candidates, lambda: times.measure_again(calls) if isinstance(times, MeasuredSeconds) else None
        )
        self.num_timed += sum(one is not None for one in found)
        return found

    def _run_for_real(self, one: Candidate, most_seconds: float) -> RealSeconds | None:
        assert is_module(self._model)
        size = self.size_of(one.num_chunks)
        is_part = one.num_watched < one.num_chunks
        techniques = [*self.settings(one.num_chunks, one.segments), *one.switched.techniques]
        trial = Trial(
            techniques=[(other.class_path, other.init_args, other.place) for other in techniques],
            trainer_arguments=one.switched.trainer_arguments,
            first_batch=self.batch if one.num_chunks == 1 else take_samples(self.batch, size),
            batch=take_samples(self.batch, size * one.num_watched) if is_part else self.batch,
            num_chunks=one.num_watched,
            progress=self._progress,
        )
        num_threads = torch.get_num_threads()
        return time_trial(self._model, self._options, self.device, trial, num_threads, most_seconds)

    def _allocated_bytes(self, trace: StepTrace, segments: Segments) -> int:
        if self.device.is_cuda:
            return trace.allocated_bytes
        assert trace.moments is not None
        assert self._workspace is not None
        held = max(trace.moments.peak_bytes(self._workspace), trace.ledger_bytes)
        if not segments:
            return held
        return held + (sum(map(len, segments)) + _STATES_AT_ONCE) * torch.get_rng_state().nbytes

    def profile(self, tried: Tried, call_seconds: float, least_bytes: float | None) -> StepProfile:
        """The chunk of a trial as stages.

        Args:
            tried: with its module calls.
            call_seconds: what recomputing a call takes beside its operators.
            least_bytes: modules that hold less are not looked into; ``None`` for the profile's own choice.

        Returns:
            The profile.
        """
        calls = tried.trace.calls
        assert calls is not None
        within = self.within(tried)
        return StepProfile(calls, calls.records, self.times, call_seconds, least_bytes, within)

    def within(self, tried: Tried) -> list[tuple[int, int]]:
        """What each operator of a chunk holds while it runs, on the CPU.

        Args:
            tried: with its module calls.

        Returns:
            Ticks and bytes.
        """
        calls = tried.trace.calls
        if self._workspace is None or calls is None:
            return []
        return [(tick, self._workspace.peak_bytes(call)) for tick, call in calls.ticks]


def _policy(segments: Segments) -> Any:
    """Plain names where each is recomputed by itself."""
    if all(len(segment) == 1 for segment in segments):
        return [segment[0] for segment in segments]
    return {
        "class_path": "lightning_memtrain.checkpointing.Segments",
        "init_args": {"segments": [list(segment) for segment in segments]},
    }


def _batch_size(batch: Any) -> int | None:
    try:
        return batch_size_of(batch)
    except MisconfigurationException:  # nothing that microbatches could be made of
        return None


def bytes_of(batch: Any) -> int:
    """Bytes of all tensors of a batch."""
    return sum(tensor.nbytes for tensor in find_tensors(batch))


#: Tells what goes on.
Say = Callable[[str], None]


def largest_of(batches: list[Any]) -> tuple[Any, str]:
    """The batch to plan for.

    Args:
        batches: the first ones of a run.

    Returns:
        The one of most bytes, and what the user must know of that; empty if all are alike.
    """
    differ = len({bytes_of(batch) for batch in batches}) > 1
    note = f"Batches differ in size: the plan is for the largest of the first {len(batches)}."
    return max(batches, key=bytes_of), note if differ else ""
