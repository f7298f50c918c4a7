"""The search: from a model, its data and a limit to the ways that keep it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

from lightning_memtrain.checkpointing.selection.counted_step import call_seconds
from lightning_memtrain.planning.fit.choice.family import BATCHNORM, Family
from lightning_memtrain.planning.fit.choice.pairs import Pair
from lightning_memtrain.planning.fit.seconds.roofline import RooflineSeconds
from lightning_memtrain.planning.fit.techniques import SWITCHES, Switch
from lightning_memtrain.planning.fit.trials.run_options import first_batches, run_options
from lightning_memtrain.planning.fit.trials.workshop import Tried, Workshop, bytes_of
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Refused, Way
from lightning_memtrain.tracing.device import Device

# A way that takes no more than so many times the plain step is not worth looking for a faster one.
_FAST_ENOUGH = 1.05
# What is switched on beside costs something in Python that no operator shows: it has to be so much faster.
_NOTABLY = 0.98
_MOST_ROWS = 8
# Steps that take less are not run for real.
_LEAST_REAL_SECONDS = 0.1
# After so long nothing more is looked for beside what was found.
_LATE_SECONDS = 15.0


def search(
    model: pl.LightningModule | Callable[[], pl.LightningModule],
    batch: Any = None,
    *,
    datamodule: pl.LightningDataModule | None = None,
    trainer: pl.Trainer | None = None,
    device: Device,
    limit_bytes: int,
    allow: tuple[str, ...] = (),
) -> FoundWays:
    """Find what keeps a limit. Nothing of the caller's process is changed.

    Steps run without data, in copies of this process: the run as it is, and two more sizes of microbatches.
    From these follows what every pair of microbatch size and recomputation would hold, and how long it would
    take; the fastest within the limit is run in turn, and the curves are corrected by what that shows, until
    the fastest one has been run.

    Args:
        model: the module to train, or a function that makes it.
        batch: one batch; ``None`` for ``datamodule``, or the model's own ``train_dataloader``.
        datamodule: where batches come from.
        trainer: of the run, its own callbacks and plugins included; a callback that plans is left out.
        device: what the run uses.
        limit_bytes: most bytes that the device may be asked for, its context included.
        allow: what may change the result, names that are known.

    Returns:
        The ways.
    """
    return _Search(model, batch, datamodule, trainer, device, limit_bytes, allow).run()


class _Search:
    def __init__(
        self,
        model: Any,
        batch: Any,
        datamodule: pl.LightningDataModule | None,
        trainer: pl.Trainer | None,
        device: Device,
        limit_bytes: int,
        allow: tuple[str, ...],
    ) -> None:
        self._start = time.perf_counter()
        self._limit_bytes = limit_bytes
        self._allow = allow
        self._notes: list[str] = []
        self._refused: list[Refused] = []
        options = run_options(trainer, device)
        if batch is None:
            batch = self._largest(first_batches(model, datamodule, options))
        self._own = {type(one).__name__ for one in options.get("callbacks", ())}
        self._workshop = Workshop(model, options, device, batch)
        self._call_seconds = call_seconds()
        self._plain_seconds = 0.0

    def run(self) -> FoundWays:
        plain = self._workshop.run(1, with_calls=True)
        fits = plain.needed_bytes <= self._limit_bytes
        base = self._family(plain, (), may_chunk=not fits and self._may_chunk(plain))
        base.explorer.take_up(plain)
        self._plain_seconds = base.explorer.curves()[0].seconds
        plain_way = base.way(base.explorer.pair_of(plain, self._plain_seconds), self._plain_seconds)
        if fits:
            return self._found(plain_way, plain_way, (plain_way,), Floor(plain_way, _held(plain)))
        families = [base]
        chosen = self._best(base)
        self._plain_seconds = base.explorer.curves()[0].seconds
        plain_way = base.way(base.explorer.pair_of(plain, self._plain_seconds), self._plain_seconds)
        for switches in self._switch_sets(plain):
            if chosen is not None and chosen[1].seconds <= self._plain_seconds * _FAST_ENOUGH:
                break
            if chosen is not None and self._is_late():
                names = " + ".join(switch.name for switch in switches)
                self._refused.append(
                    Refused(names, f"not looked at: after {_LATE_SECONDS:.0f} s a way was found")
                )
                continue
            family = self._family(plain, switches, may_chunk=self._may_chunk(plain))
            family.explorer.learn(base.explorer)
            other = self._tried_out(family)
            if family.explorer.tried:
                families.append(family)
            if other is not None and (chosen is None or other[1].seconds < _NOTABLY * chosen[1].seconds):
                chosen = other
        offered = self._offers(plain, chosen, base)
        floor = self._floor(families, plain, chosen)
        chosen_way = None if chosen is None else chosen[0].way(chosen[1], self._plain_seconds)
        return self._found(plain_way, chosen_way, self._front(families, chosen), floor, offered)

    # ------------------------------------------------------------------ families

    def _family(self, plain: Tried, switches: tuple[Switch, ...], may_chunk: bool) -> Family:
        may_chunk = may_chunk and not any(switch.refusal(plain.trace.facts, 2) for switch in switches)
        # Of a short step nobody would notice what is not measured.
        may_time = self._workshop.can_time and self._is_long(plain)
        return Family(self._workshop, plain, switches, self._call_seconds, may_chunk, may_time, self._is_late)

    def _is_late(self) -> bool:
        return time.perf_counter() - self._start > _LATE_SECONDS

    def _is_long(self, plain: Tried) -> bool:
        facts, operators, times = plain.trace.facts, plain.trace.operators, self._workshop.times
        # A module that steps its optimizers itself would change the weights.
        return facts.automatic_optimization and (
            times.seconds(operators.forward) + times.seconds(operators.backward) >= _LEAST_REAL_SECONDS
        )

    def _may_chunk(self, plain: Tried, with_batchnorm: bool = False) -> bool:
        facts = plain.trace.facts
        if not facts.automatic_optimization or "Microbatching" in self._own:
            return False
        return with_batchnorm or not facts.has_batchnorm or BATCHNORM in self._allow

    def _best(self, family: Family) -> tuple[Family, Pair] | None:
        family.explorer.explore(self._limit_bytes)
        pair = family.explorer.best(self._limit_bytes)
        return None if pair is None else (family, pair)

    def _tried_out(self, family: Family) -> tuple[Family, Pair] | None:
        try:
            return self._best(family)
        except Exception as error:  # what goes wrong in a trial is the answer
            names = " + ".join(switch.name for switch in family.switches)
            self._refused.append(Refused(names, str(error).splitlines()[0] if str(error) else repr(error)))
            return None

    def _switch_sets(self, plain: Tried) -> list[tuple[Switch, ...]]:
        """What may be switched on, alone and all together; refusals are noted."""
        facts, usable = plain.trace.facts, []
        for switch in SWITCHES:
            if switch.allow and switch.allow not in self._allow:
                self._refused.append(Refused(switch.name, "changes the result", switch.allow))
                continue
            reason = switch.refusal(facts, 1)
            if reason:
                self._refused.append(Refused(switch.name, reason))
            elif not set(self._own) & {one.name for one in switch.settings(facts, 1)}:
                usable.append(switch)
        sets: list[tuple[Switch, ...]] = [(switch,) for switch in usable]
        if len(usable) > 1:
            sets.append(tuple(usable))
        return sets

    def _offers(self, plain: Tried, chosen: tuple[Family, Pair] | None, base: Family) -> tuple[Way, ...]:
        """What would keep the limit, or take less time, if it were allowed."""
        if not plain.trace.facts.has_batchnorm or self._may_chunk(plain):
            return ()
        family = self._family(plain, (), may_chunk=self._may_chunk(plain, with_batchnorm=True))
        family.explorer.take_up(plain)
        family.explorer.learn(base.explorer)
        other = self._tried_out(family)
        if other is None or (chosen is not None and other[1].seconds >= chosen[1].seconds):
            return ()
        return (family.way(other[1], self._plain_seconds),)

    # ------------------------------------------------------------------ the answer

    def _front(self, families: list[Family], chosen: tuple[Family, Pair] | None) -> tuple[Way, ...]:
        pairs = [(family, pair) for family in families for pair in family.explorer.front()]
        if chosen is not None:
            pairs.append(chosen)
        best: list[tuple[Family, Pair]] = []
        for family, pair in sorted(pairs, key=lambda one: (one[1].seconds, one[1].peak_bytes)):
            if not best or pair.peak_bytes < best[-1][1].peak_bytes:
                best.append((family, pair))
        return tuple(family.way(pair, self._plain_seconds) for family, pair in _thinned(best, chosen))

    def _floor(self, families: list[Family], plain: Tried, chosen: tuple[Family, Pair] | None) -> Floor:
        lowest = min(families, key=lambda family: family.explorer.front()[-1].peak_bytes)
        if chosen is not None:
            return Floor(lowest.way(lowest.explorer.front()[-1], self._plain_seconds))
        pair = lowest.explorer.floor()
        tried = lowest.explorer.tried[pair.num_chunks, pair.segments]
        return Floor(lowest.way(pair, self._plain_seconds), _held(tried))

    def _found(
        self,
        plain: Way,
        chosen: Way | None,
        front: tuple[Way, ...],
        floor: Floor,
        offered: tuple[Way, ...] = (),
    ) -> FoundWays:
        times = self._workshop.times
        if isinstance(times, RooflineSeconds):
            self._notes.append(
                "Times are those of the GPU's data sheet (operations, bytes, launches), not measured."
                if times.is_known
                else "Times are those of a common GPU: this one's data sheet is not known."
            )
        elif self._workshop.num_timed:
            self._notes.append(
                "The fastest ways were run for real for some chunks, to see how long they take; times of the "
                "others, and of the run as it is, follow from that and from their operators."
            )
        return FoundWays(
            plain=plain,
            chosen=chosen,
            front=front,
            floor=floor,
            offered=offered,
            refused=tuple(self._refused),
            notes=tuple(self._notes),
            batch_size=self._workshop.batch_size,
            seconds=time.perf_counter() - self._start,
        )

    def _largest(self, batches: list[Any]) -> Any:
        largest = max(batches, key=bytes_of)
        if len({bytes_of(batch) for batch in batches}) > 1:
            self._notes.append(
                f"Batches differ in size: the plan is for the largest of the first {len(batches)}."
            )
        return largest


def _held(tried: Tried) -> tuple[tuple[str, int], ...]:
    rows = [(str(category), num) for category, num in tried.trace.at_peak.items() if num > 0]
    return tuple(sorted(rows, key=lambda row: -row[1]))


def _thinned(
    pairs: list[tuple[Family, Pair]], chosen: tuple[Family, Pair] | None
) -> list[tuple[Family, Pair]]:
    """About so many rows, at even steps of bytes, with both ends and what was chosen."""
    if len(pairs) <= _MOST_ROWS:
        return pairs
    most, least = pairs[0][1].peak_bytes, pairs[-1][1].peak_bytes
    kept = {0, len(pairs) - 1}
    for row in range(1, _MOST_ROWS - 1):
        wanted = most - (most - least) * row / (_MOST_ROWS - 1)
        kept.add(min(range(len(pairs)), key=lambda place: abs(pairs[place][1].peak_bytes - wanted)))
    if chosen in pairs:
        kept.add(pairs.index(chosen))
    return [pairs[place] for place in sorted(kept)]
