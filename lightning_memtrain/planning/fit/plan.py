"""The plan: which way to run, what else there was, and what it holds for."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_memtrain.core import ArgumentError, format_bytes
from lightning_memtrain.core.notebooks import show
from lightning_memtrain.planning.fit.holding.fingerprint import Fingerprint
from lightning_memtrain.planning.fit.holding.plan_guard import PlanGuard
from lightning_memtrain.planning.fit.objects import made, technique_path
from lightning_memtrain.planning.fit.plan_file import (
    EDITED,
    plan_from_dict,
    plan_to_dict,
    read_plan,
    write_plan,
)
from lightning_memtrain.planning.fit.showing.plan_page import plan_html, save_plan_page
from lightning_memtrain.planning.fit.showing.plan_table import plan_text
from lightning_memtrain.planning.fit.way import Floor, FoundWays, TechniqueSettings, Way
from lightning_memtrain.tracing.device import Device


@dataclass(frozen=True, repr=False)
class Plan:
    """How a run keeps a limit: the way to take, all others worth having, and the run that it is made for.

    ``print(plan)`` shows the table, a notebook shows it as a page.

    Args:
        found: what the search came to.
        device: what the run uses.
        limit_bytes: most bytes to use: reserved ones and the context on a GPU, allocated ones on the CPU.
        allow: what may change the result, by name.
        fingerprint: the run that it holds for.

    Example:
        >>> plan = mt.plan(model, batch, limit="11GiB", device="RTX 3060 12GB")  # doctest: +SKIP
        >>> trainer = L.Trainer(**plan.trainer_kwargs(max_epochs=3))  # doctest: +SKIP
    """

    found: FoundWays
    device: Device
    limit_bytes: int
    allow: tuple[str, ...]
    fingerprint: Fingerprint

    # ------------------------------------------------------------------ what came of it

    @property
    def chosen(self) -> Way | None:
        """The way to take; ``None`` if nothing keeps the limit."""
        return self.found.chosen

    @property
    def plain(self) -> Way:
        """The run as it is."""
        return self.found.plain

    @property
    def front(self) -> tuple[Way, ...]:
        """The Pareto front of bytes and time, most bytes first."""
        return self.found.front

    @property
    def floor(self) -> Floor:
        """The least that the run needs."""
        return self.found.floor

    @property
    def fits(self) -> bool:
        """Whether there is a way that keeps the limit; one that was edited is given the benefit of doubt."""
        return self.chosen is not None and self.keeps_limit(self.chosen)

    def keeps_limit(self, way: Way) -> bool:
        """Whether a way keeps the limit; one that was edited is given the benefit of doubt.

        Args:
            way: any.

        Returns:
            ``False`` only where it is known that it does not.
        """
        needed_bytes = self.needed_bytes(way)
        return needed_bytes is None or needed_bytes <= self.limit_bytes

    @property
    def model_name(self) -> str:
        """Class name of the model."""
        return self.fingerprint.model.rpartition(".")[2]

    def needed_bytes(self, way: Way) -> int | None:
        """What a way needs of the device, to be compared with the limit.

        Args:
            way: any.

        Returns:
            Reserved bytes and the context of a GPU; ``None`` if nobody predicted it.
        """
        return None if way.reserved_bytes is None else way.reserved_bytes + self.device.context_bytes

    @property
    def spare_bytes(self) -> int | None:
        """What the chosen way leaves of the limit; ``None`` if nobody predicted it."""
        needed_bytes = None if self.chosen is None else self.needed_bytes(self.chosen)
        return None if needed_bytes is None else self.limit_bytes - needed_bytes

    def has_room_for(self, num_bytes: int) -> bool:
        """Whether the chosen way leaves so many bytes, as one that nobody predicted is taken to do.

        Args:
            num_bytes: more than was planned for.

        Returns:
            ``False`` only where it is known that it does not.
        """
        return self.spare_bytes is None or num_bytes <= self.spare_bytes

    # ------------------------------------------------------------------ using it

    def callbacks(self) -> list[pl.Callback]:
        """The techniques of the chosen way that are callbacks, new ones at each call."""
        return self._made("callbacks")

    def trainer_kwargs(self, **own: Any) -> dict[str, Any]:
        """Arguments for a Trainer that follows the plan.

        Besides the techniques there is a callback that stops a run for which the plan was not made.

        Args:
            **own: arguments of the run itself, e.g. ``max_epochs=3, callbacks=[mine]``, which those of the
                plan are joined with.

        Returns:
            Arguments for ``L.Trainer(**kwargs)``, with new callbacks and plugins at each call.

        Raises:
            ValueError: if nothing keeps the limit, if an argument is set by both, or a technique is there
                already.
        """
        if self.chosen is None or not self.fits:
            raise ArgumentError(
                "`Plan.trainer_kwargs()` needs a way that keeps the limit, but got "
                f"{'none' if self.chosen is None else f'{self.chosen}, which does not'}. Print the plan for "
                "what it needs and what could be allowed."
            )
        arguments = dict(self.chosen.trainer_arguments)
        for name in arguments.keys() & own.keys():
            if own[name] != arguments[name]:
                raise ArgumentError(
                    f"`Plan.trainer_kwargs({name})` is a part of the plan, {arguments[name]!r}, but got "
                    f"{own[name]!r}. Leave it out, or change the plan: plan.edit({name}={own[name]!r})."
                )
        guard = PlanGuard(self.fingerprint, self.found.batch_shapes, self.found.held_bytes, self.spare_bytes)
        callbacks = [*_listed(own.get("callbacks")), guard, *self._made("callbacks")]
        plugins = [*_listed(own.get("plugins")), *self._made("plugins")]
        _refuse_twice(callbacks, "callbacks")
        _refuse_twice(plugins, "plugins")
        return {**own, **arguments, "callbacks": callbacks, **({"plugins": plugins} if plugins else {})}

    def edit(self, changes: Mapping[str, Any] | None = None, /, **named: Any) -> Plan:
        """Another way than the chosen one, made of it.

        Args:
            changes: by class name of a technique (or its path) the arguments to change, or ``None`` to leave
                it out; by the name of an argument of Trainer its value, or ``None`` likewise.
            **named: the same.

        Returns:
            The plan with the new way chosen. Where the model is still at hand, it is predicted; else what it
            needs is unknown, and the table says so.

        Raises:
            ValueError: if a name is neither a technique nor an argument of Trainer.

        Example:
            >>> plan = plan.edit(Microbatching={"microbatch_size": 4}, precision=None)  # doctest: +SKIP
        """
        before = self.chosen or self.floor.way
        techniques, arguments = list(before.techniques), dict(before.trainer_arguments)
        for name, value in {**(changes or {}), **named}.items():
            if name.rpartition(".")[2][:1].islower():
                _refuse_unknown_argument(name)
                arguments.pop(name, None)
                if value is not None:
                    arguments[name] = value
            else:
                _change(techniques, technique_path(name, "Plan.edit(changes)"), value)
        way = Way(tuple(techniques), None, None, None, False, (EDITED,), arguments)
        way = replace(self.plain) if way.is_plain else way
        if self.found.predict_way is not None and not way.is_plain:
            way = self.found.predict_way(way)
        return replace(self, found=replace(self.found, chosen=way))

    def predicted(self, way: Way) -> Way:
        """Predict a way, where the model is still at hand.

        Args:
            way: any, such as one that was edited.

        Returns:
            The way with what it needs; as it was if that cannot be found out any more.
        """
        return way if self.found.predict_way is None else self.found.predict_way(way)

    def _made(self, place: str) -> list[Any]:
        return [made(one) for one in (self.chosen.techniques if self.chosen else ()) if one.place == place]

    # ------------------------------------------------------------------ files and words

    def to_dict(self) -> dict[str, Any]:
        """Plain names and values, for JSON, YAML and checkpoints."""
        return plan_to_dict(self.found, self.device, self.limit_bytes, self.allow, self.fingerprint)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`.

        Args:
            data: what that returned, possibly changed by hand.

        Returns:
            The plan.
        """
        return cls(*plan_from_dict(data))

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML that a person can read and change.

        Args:
            path: the file.
        """
        write_plan(self.to_dict(), Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote, possibly changed by hand.

        Args:
            path: the file.

        Returns:
            The plan.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no plan, or an entry is missing.
        """
        try:
            return cls.from_dict(read_plan(Path(path)))
        except ValueError as error:
            raise ArgumentError(f"`Plan.load(path)` {error} (File: {str(path)!r}.)") from error

    def save_html(self, path: str | Path) -> None:
        """Write a page with a chart of the front and all ways; it loads nothing from any network.

        Args:
            path: the file.
        """
        save_plan_page(self.model_name, self.found, self.device, self.limit_bytes, Path(path))

    def __repr__(self) -> str:
        kept = "fits" if self.fits else "does not fit"
        return f"<Plan of {self.model_name} on {self.device.name}: {kept} {format_bytes(self.limit_bytes)}>"

    def show(self) -> None:
        """Draw table and chart in a notebook, or print the table."""
        show(self, str(self))

    def __str__(self) -> str:
        """The table, for the terminal."""
        return plan_text(self.model_name, self.found, self.device, self.limit_bytes)

    def _repr_html_(self) -> str:
        """The table and the chart, for notebooks."""
        return plan_html(self.model_name, self.found, self.device, self.limit_bytes)


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _refuse_twice(objects: list[Any], place: str) -> None:
    seen: set[type] = set()
    for one in objects:
        if type(one) in seen and type(one).__module__.startswith("lightning_memtrain."):
            name = type(one).__name__
            raise ArgumentError(
                f"`Plan.trainer_kwargs({place})` must not have what the plan has, too, but got {name}. Leave "
                f"yours out, or the plan's: plan.edit({name}=None)."
            )
        seen.add(type(one))


def _refuse_unknown_argument(name: str) -> None:
    known = inspect.signature(pl.Trainer.__init__).parameters
    if name not in known or name in ("self", "callbacks", "plugins"):
        near = get_close_matches(name, known, n=1)
        cure = f"Did you mean {near[0]!r}?" if near else "Techniques are named by their classes."
        raise ArgumentError(
            f"`Plan.edit(changes)` must name techniques or arguments of Trainer, but got {name!r}. {cure}"
        )


def _change(techniques: list[TechniqueSettings], path: str, arguments: Any) -> None:
    name = path.rpartition(".")[2]
    place = next((index for index, one in enumerate(techniques) if one.name == name), None)
    if arguments is None:
        if place is None:
            raise ArgumentError(f"`Plan.edit({name}=None)` needs a plan with {name}, but this one has none.")
        del techniques[place]
    elif not isinstance(arguments, Mapping):
        raise ArgumentError(
            f"`Plan.edit({name})` must be a mapping of arguments, e.g. {{'microbatch_size': 4}}, or None, "
            f"but got {arguments!r}."
        )
    elif place is None:
        techniques.append(TechniqueSettings(path, arguments))
    else:
        one = techniques[place]
        techniques[place] = replace(one, init_args={**one.init_args, **arguments})
