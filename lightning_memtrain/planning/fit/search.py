"""The search: from a model, its data and a limit to the ways that keep it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from itertools import product
from typing import Any

import lightning.pytorch as pl

from lightning_memtrain.checkpointing.selection.counted_step import call_seconds
from lightning_memtrain.core import format_bytes
from lightning_memtrain.planning.fit.choice.explorer import Explorer
from lightning_memtrain.planning.fit.choice.family import (
    BATCHNORM,
    NOTABLY_FASTER,
    NOTABLY_LESS,
    Family,
    first_line,
)
from lightning_memtrain.planning.fit.choice.pairs import Pair
from lightning_memtrain.planning.fit.choice.shown_pairs import front_of, lowest_of, thinned
from lightning_memtrain.planning.fit.choice.usable_switches import UsableSwitches
from lightning_memtrain.planning.fit.other_ways import recomputed_networks, unlocks
from lightning_memtrain.planning.fit.showing.time_note import note_on_times
from lightning_memtrain.planning.fit.techniques import FREE, SWITCHES, Switch
from lightning_memtrain.planning.fit.trials.given_way import WayPredictor
from lightning_memtrain.planning.fit.trials.run_options import first_batches, run_options, sharded_world
from lightning_memtrain.planning.fit.trials.run_progress import RunProgress
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.trials.tried_ways import Tried
from lightning_memtrain.planning.fit.trials.workshop import Workshop, largest_of
from lightning_memtrain.planning.fit.way import Floor, FoundWays, Refused, Way
from lightning_memtrain.planning.prediction.few_steps import PATTERNS_LEFT_OUT, needs_values
from lightning_memtrain.tracing.device import Device

# A way that takes no more than so many times the plain step is not worth looking for a faster one.
_FAST_ENOUGH = 1.05
# Steps that take less are not run for real.
_LEAST_REAL_SECONDS = 0.1
# After so long nothing more that leaves the result as it is is looked for beside what was found.
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
    techniques: tuple[Switch, ...] = (),
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
        techniques: what may be switched on beside those that are known.

    Returns:
        The ways.
    """
    with closing(_Search(model, batch, datamodule, trainer, device, limit_bytes, allow, techniques)) as found:
        return found.run()


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
        techniques: tuple[Switch, ...],
    ) -> None:
        self._start = time.perf_counter()
        self._limit_bytes = limit_bytes
        self._allow = allow
        self._notes: list[str] = []
        self._refused: list[Refused] = []
        world = sharded_world(trainer)
        options = run_options(trainer, device, world)
        if batch is None:
            is_sharded = world is not None
            batch, note = largest_of(first_batches(model, datamodule, options, is_sharded=is_sharded))
            self._notes += [note] if note else []
        self._own = {type(one).__name__ for one in options.get("callbacks", ())}
        if not device.is_cuda and any(map(needs_values, options.get("callbacks", ()))):
            self._notes.append(f"{PATTERNS_LEFT_OUT}.")
        self._workshop = Workshop(model, options, device, batch, RunProgress.of(trainer), world)
        # On a GPU what Python does meanwhile runs beside its kernels, whose launches are counted.
        self._call_seconds = 0.0 if device.is_cuda else call_seconds()
        self._plain_seconds = 0.0
        self._switches = UsableSwitches((*SWITCHES, *techniques), allow, self._own)
        self._free: tuple[Switch, ...] = ()
        self._can_chunk = self._can_recompute = True
        self._kept: dict[str, Any] = {}
        self._chosen: tuple[Family, Pair] | None = None
        self._base: Explorer | None = None

    def close(self) -> None:
        self._workshop.close()

    def run(self) -> FoundWays:
        plain = self._workshop.run(1, with_calls=True)
        facts = plain.trace.facts
        self._kept = {"stateful": facts.stateful, "held_bytes": facts.held_bytes}
        if plain.needed_bytes > self._limit_bytes:
            self._begin_first(plain)
        as_it_is = self._family(plain, ())
        as_it_is.explorer.take_up(plain)
        self._plain_seconds = as_it_is.explorer.curves()[0].seconds
        plain_way = self._way((as_it_is, as_it_is.explorer.pair_of(plain, self._plain_seconds)))
        if plain.needed_bytes <= self._limit_bytes:
            return self._found(plain_way, plain_way, (plain_way,), Floor(plain_way, plain.held))
        first = self._first(plain)
        families: list[Family] = [as_it_is, first]
        by_hand: list[tuple[Family, Pair]] = []
        self._chosen = self._best_of_first(first)
        self._base = first.explorer
        # Real chunks tell how long the run as it is takes, too.
        as_it_is.explorer.take_up(plain)
        as_it_is.explorer.learn(self._base)
        self._plain_seconds = as_it_is.explorer.curves()[0].seconds
        plain_way = self._way((as_it_is, as_it_is.explorer.pair_of(plain, self._plain_seconds)))
        as_it_is.explorer.use(self._can_chunk, self._can_recompute)
        for family in self._switched_on(plain, first):
            other = self._tried_out(family)
            if family.by_hand:
                by_hand += [] if other is None else [other]
                continue
            families += [family] if family.explorer.front() else []
            if other is not None and self._beats(other[1]):
                self._chosen = other
        chosen = self._chosen or recomputed_networks(first, plain, self._limit_bytes)
        with_batchnorm = self._with_batchnorm(plain)
        offered = [*self._offers(with_batchnorm, chosen), *map(self._way, by_hand)]
        if chosen is None:
            self._look_lower(families)
        floor = self._floor(families, chosen)
        if chosen is None:
            lowest = lowest_of(families)
            changing = self._switches.not_allowed(plain.trace.facts)
            found = unlocks(
                lowest,
                with_batchnorm,
                changing,
                self._unlocking(plain),
                self._limit_bytes,
            )
            offered += [self._way(one) for one in found.ways if one[1].peak_bytes <= self._limit_bytes]
            floor = replace(floor, unlocks=found.least_bytes)
        chosen_way = None if chosen is None else self._way(chosen)
        front = self._front(families, chosen)
        return self._found(plain_way, chosen_way, front, floor, tuple(dict.fromkeys(offered)))

    # ------------------------------------------------------------------ families

    def _family(self, plain: Tried, switches: tuple[Switch, ...], may_chunk: bool = False) -> Family:
        may_chunk = may_chunk and not any(switch.refusal(plain.trace.facts, 2) for switch in switches)
        # Of a short step nobody would notice what is not measured.
        may_time = self._workshop.can_time and self._is_long(plain)
        family = Family(
            self._workshop, plain, switches, self._call_seconds, may_chunk, may_time, self._is_late
        )
        family.explorer.use(self._can_chunk, self._can_recompute)
        if self._base is not None:
            family.explorer.learn(self._base)
        return family

    def _first(self, plain: Tried) -> Family:
        """Microbatches and recomputation, and what costs nothing where it saves something."""
        may_chunk = self._may_chunk(plain)
        if self._may_free(plain):
            family = self._family(plain, (FREE,), may_chunk)
            with suppress(Exception):  # then without it
                if family.explorer.trace(1).needed_bytes < NOTABLY_LESS * plain.needed_bytes:
                    self._free = (FREE,)
                    return family
        family = self._family(plain, (), may_chunk)
        family.explorer.take_up(plain)
        return family

    def _look_lower(self, families: list[Family]) -> None:
        """Look at small chunks of what can come below the rest, though not below the limit."""
        for family in families:
            explorer, lowest = family.explorer, lowest_of(families).explorer.front()[-1].peak_bytes
            if explorer.may_chunk and explorer.least_bytes < lowest:
                with suppress(Exception):  # then as far as is known
                    explorer.explore(self._limit_bytes)

    def _may_free(self, plain: Tried) -> bool:
        facts = plain.trace.facts
        needs_other = self._least_bytes(plain) > self._limit_bytes  # something else is to be switched on
        return not (needs_other or FREE.refusal(facts, 1) or self._switches.is_own(FREE, facts))

    def _begin_first(self, plain: Tried) -> None:
        """Begin what :meth:`_first` asks for, and ask for bytes of operators, which nothing disturbs."""
        if self._may_free(plain):
            explorer = self._family(plain, (FREE,), self._may_chunk(plain)).explorer
            explorer.ahead([1, 2] if explorer.may_chunk else [1])
            self._workshop.within(plain)
            self._workshop.wait()

    def _least_bytes(self, tried: Tried) -> int:
        """What no size of chunks and no recomputation can bring a run below."""
        return tried.trace.state_bytes + self._workshop.device.context_bytes

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

    def _is_enough(self) -> bool:
        return self._chosen is not None and self._chosen[1].seconds <= self._plain_seconds * _FAST_ENOUGH

    def _beats(self, pair: Pair) -> bool:
        return self._chosen is None or pair.seconds < NOTABLY_FASTER * self._chosen[1].seconds

    def _best(self, family: Family) -> tuple[Family, Pair] | None:
        whole = family.explorer.whole()
        if whole is not None and whole.peak_bytes <= self._limit_bytes:
            return family, whole
        if family.explorer.least_bytes > self._limit_bytes:
            return None
        family.explorer.explore(self._limit_bytes)
        pair = family.explorer.best(self._limit_bytes)
        return None if pair is None else (family, pair)

    def _tried_out(self, family: Family) -> tuple[Family, Pair] | None:
        try:
            return self._best(family)
        except Exception as error:  # what goes wrong in a trial is the answer
            self._refused.append(
                Refused(" + ".join(switch.name for switch in family.switches), first_line(error))
            )
            return None

    def _best_of_first(self, family: Family) -> tuple[Family, Pair] | None:
        """The best of the first family; where microbatches or recomputation cannot run, without these."""
        said = ""
        for chunks, recomputation in product((True, False), repeat=2):
            if not chunks and not family.explorer.may_chunk and recomputation:
                continue
            self._can_chunk, self._can_recompute = chunks, recomputation
            family.explorer.use(chunks, recomputation)
            try:
                found = self._best(family)
            except Exception as error:  # what goes wrong in a trial is the answer
                said = said or first_line(error)
                continue
            names = [("Microbatching", chunks), ("ActivationCheckpointing", recomputation)]
            self._refused += [Refused(name, said) for name, is_used in names if not is_used]
            return found
        return None

    def _switched_on(self, plain: Tried, first: Family) -> Iterator[Family]:
        """What may be switched on, one by one and together; what is of no use is noted."""
        facts, useful = plain.trace.facts, []
        least_bytes = self._least_bytes(plain)
        usable, refused = self._switches.usable(facts)
        self._refused += refused
        for place, switch in enumerate(usable):
            if not self._is_wanted(switch, facts, 0):
                continue
            if not switch.allow and self._chosen is not None and self._is_late():
                said = f"not looked at: after {_LATE_SECONDS:.0f} s a way was found"
                self._refused.append(Refused(switch.name, said))
                continue
            if not switch.lowers_state and least_bytes > self._limit_bytes:
                needed = format_bytes(least_bytes)
                said = f"leaves weights, gradients and optimizer state as they are, which take {needed}"
                self._refused.append(Refused(switch.name, said))
                continue
            # The next one is tried beside.
            self._ahead(plain, [one for one in usable[place:] if self._is_wanted(one, facts, least_bytes)])
            family = self._family(plain, self._with_free(switch), self._may_chunk(plain))
            if self._is_useful(family, switch, first):
                useful.append((switch, family.explorer.tried[1, ()].needed_bytes))
                least_bytes = min(least_bytes, family.explorer.least_bytes)
                yield family
        best: dict[str, tuple[Switch, int]] = {}
        for switch, needed_bytes in useful:
            group = switch.instead_of or switch.name
            if group not in best or needed_bytes < best[group][1]:
                best[group] = switch, needed_bytes
        together = tuple(switch for switch, _ in best.values())
        if len(together) > 1 and (any(switch.allow for switch in together) or self._chosen is None):
            yield self._family(plain, self._with_free(*together), self._may_chunk(plain))

    def _is_wanted(self, switch: Switch, facts: RunFacts, least_bytes: int) -> bool:
        if (not switch.allow and self._is_enough()) or (switch.by_hand(facts) and self._chosen is not None):
            return False
        return switch.lowers_state or least_bytes <= self._limit_bytes

    def _ahead(self, plain: Tried, switches: list[Switch]) -> None:
        families = [self._family(plain, self._with_free(switch)) for switch in switches]
        self._workshop.ahead([family.explorer.asked(1) for family in families])

    def _with_free(self, *switches: Switch) -> tuple[Switch, ...]:
        free = () if any(switch.frees_gradients for switch in switches) else self._free
        return (*free, *switches)

    def _is_useful(self, family: Family, switch: Switch, first: Family) -> bool:
        why = family.why_useless(first, None if self._chosen is None else self._chosen[1])
        if why:
            self._refused.append(Refused(switch.name, why))
        return not why

    # ------------------------------------------------------------------ what was not allowed

    def _with_batchnorm(self, plain: Tried) -> Family | None:
        """Microbatches where layers look across samples, which is a change."""
        if not plain.trace.facts.has_batchnorm or self._may_chunk(plain):
            return None
        family = self._family(plain, self._free, self._may_chunk(plain, with_batchnorm=True))
        family.explorer.take_up(plain)
        return family if family.explorer.may_chunk and self._can_chunk else None

    def _offers(self, with_batchnorm: Family | None, chosen: tuple[Family, Pair] | None) -> list[Way]:
        """What would keep the limit, or take less time, if it were allowed."""
        other = None if with_batchnorm is None else self._tried_out(with_batchnorm)
        if other is None or (chosen is not None and other[1].seconds >= chosen[1].seconds):
            return []
        return [self._way(other)]

    def _unlocking(self, plain: Tried) -> Callable[..., Family]:
        return lambda *switches: self._family(plain, switches, self._may_chunk(plain))

    # ------------------------------------------------------------------ the answer

    def _front(self, families: list[Family], chosen: tuple[Family, Pair] | None) -> tuple[Way, ...]:
        return tuple(map(self._way, thinned(front_of(families, chosen), chosen)))

    def _way(self, found: tuple[Family, Pair]) -> Way:
        return found[0].way(found[1], self._plain_seconds)

    def _floor(self, families: list[Family], chosen: tuple[Family, Pair] | None) -> Floor:
        lowest = lowest_of(families)
        if chosen is not None:
            return Floor(self._way((lowest, lowest.explorer.front()[-1])))
        pair = lowest.explorer.floor()
        tried = lowest.explorer.tried[pair.num_chunks, pair.segments]
        return Floor(self._way((lowest, pair)), tried.held)

    def _found(
        self,
        plain: Way,
        chosen: Way | None,
        front: tuple[Way, ...],
        floor: Floor,
        offered: tuple[Way, ...] = (),
    ) -> FoundWays:
        note = note_on_times(self._workshop.times, self._workshop.num_timed)
        self._notes += [note] if note else []
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
            **self._kept,
            predict_way=WayPredictor(self._workshop, plain, self._plain_seconds),
        )
