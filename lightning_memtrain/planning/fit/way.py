"""Ways to fit: techniques with their settings, what they need and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lightning_memtrain.planning.fit.expressions import call_text, plain_values, value_text, wrapped
from lightning_memtrain.tracing.device import Device

if TYPE_CHECKING:
    import lightning.pytorch as pl

#: Arguments of Trainer that hold objects.
Place = Literal["callbacks", "plugins"]


@dataclass(frozen=True)
class TechniqueSettings:
    """One technique as a configuration file names it.

    Args:
        class_path: of its class, e.g. ``"lightning_memtrain.Microbatching"``.
        init_args: arguments that are not left at their defaults: text, numbers, booleans, ``None``, lists of
            these, and mappings with ``class_path`` and ``init_args`` for objects.
        place: the argument of Trainer that takes it.

    Example:
        >>> print(TechniqueSettings("lightning_memtrain.Microbatching", {"microbatch_size": 5}))
        mt.Microbatching(microbatch_size=5)
    """

    class_path: str
    init_args: Mapping[str, Any] = field(default_factory=dict)
    place: Place = "callbacks"

    def __post_init__(self) -> None:
        object.__setattr__(self, "init_args", MappingProxyType(plain_values(self.init_args)))

    def __hash__(self) -> int:
        return hash(self.class_path)

    def __reduce__(self) -> tuple[Any, ...]:  # a mapping that cannot be changed cannot be pickled
        return type(self), (self.class_path, dict(self.init_args), self.place)

    @property
    def name(self) -> str:
        """The class's name without its module."""
        return self.class_path.rpartition(".")[2]

    def __str__(self) -> str:
        return call_text(self.class_path, self.init_args)


@dataclass(frozen=True)
class Way:
    r"""One way to run: which techniques, what it needs, how long its steps take, and what it changes.

    Args:
        techniques: in the order in which Trainer is given them; none for the run as it is.
        allocated_bytes: predicted peak of what the device's allocator hands out, workspace included; ``None``
            if nobody predicted it, as of a way that was edited by hand.
        reserved_bytes: predicted peak of what the allocator takes from the device; on the CPU, where nothing
            is taken ahead, ``allocated_bytes``.
        time_ratio: predicted time of a step over that of the plain run; ``None`` if nobody predicted it.
        exact: whether the result is that of the plain run in exact arithmetic.
        changes: what it changes, a short phrase each; none where ``exact``.
        trainer_arguments: plain arguments of Trainer by name, e.g. ``{"precision": "bf16-mixed"}``.
        by_hand: lines that only the user can write, such as another optimizer in ``configure_optimizers``;
            such a way is offered, never taken.

    Example:
        >>> chunks = TechniqueSettings("lightning_memtrain.Microbatching", {"microbatch_size": 5})
        >>> way = Way((chunks,), 38_482_739, 38_482_739, 1.21, exact=True)
        >>> print(*way.lines(), sep="\n")
        callbacks=[
            mt.Microbatching(microbatch_size=5),
        ],
    """

    techniques: tuple[TechniqueSettings, ...]
    allocated_bytes: int | None
    reserved_bytes: int | None
    time_ratio: float | None
    exact: bool
    changes: tuple[str, ...] = ()
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)
    by_hand: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # As a file has them, so that a way that was written is the way that is read.
        in_order = sorted(self.techniques, key=lambda one: one.place)
        object.__setattr__(self, "techniques", tuple(in_order))
        object.__setattr__(self, "changes", tuple(self.changes))
        object.__setattr__(self, "by_hand", tuple(self.by_hand))
        object.__setattr__(self, "trainer_arguments", MappingProxyType(dict(self.trainer_arguments)))

    def __hash__(self) -> int:
        return hash((self.techniques, self.allocated_bytes, self.exact))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self.techniques,
            self.allocated_bytes,
            self.reserved_bytes,
            self.time_ratio,
            self.exact,
            self.changes,
            dict(self.trainer_arguments),
            self.by_hand,
        )

    @property
    def is_plain(self) -> bool:
        """Whether it is the run as it is."""
        return not (self.techniques or self.trainer_arguments or self.by_hand)

    def __str__(self) -> str:
        """Techniques with their settings, in one line."""
        parts = [f"{name}={value_text(value)}" for name, value in self.trainer_arguments.items()]
        parts += [str(one).removeprefix("mt.") for one in self.techniques]
        return " + ".join([*parts, *self.by_hand]) or "as it is"

    def lines(self, width: int = 80) -> tuple[str, ...]:
        """What to paste: arguments of Trainer, after the lines that belong into the model.

        Args:
            width: most characters in a line, as far as names allow.

        Returns:
            Lines of Python, with ``import lightning_memtrain as mt`` taken for granted; none for the run as
            it is.
        """
        lines = list(self.by_hand)
        lines += [f"{name}={value_text(value)}," for name, value in self.trainer_arguments.items()]
        for place in ("callbacks", "plugins"):
            calls = [str(one) for one in self.techniques if one.place == place]
            if calls:
                lines.append(f"{place}=[")
                lines += [line for call in calls for line in wrapped(f"{call},", width, indent=4)]
                lines.append("],")
        return tuple(lines)


@dataclass(frozen=True)
class Refused:
    """What cannot be used, or would be of no use.

    Args:
        what: a technique, with settings if it matters.
        why: the reason, and the cure where there is one.
        allow: the name that ``allow`` wants for it; empty if that is not what is missing.
    """

    what: str
    why: str
    allow: str = ""


@dataclass(frozen=True)
class Floor:
    """The least that the run needs by the ways that may be used.

    Args:
        way: the one that needs least.
        held: what is there at its peak: category and bytes, largest first.
        unlocks: what more could be allowed, and the bytes that the run would then need at least.
    """

    way: Way
    held: tuple[tuple[str, int], ...] = ()
    unlocks: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class FoundWays:
    """What a search came to: what ``planning/fit/search.py`` returns, and a plan keeps.

    Args:
        plain: the run as it is.
        chosen: the way to take; ``None`` if nothing keeps the limit.
        front: the Pareto front of bytes and time of all ways that may be used, most bytes first.
        floor: the least.
        offered: ways that keep the limit but change something that was not allowed, best first.
        refused: what was not considered, and why.
        notes: sentences that the user must know, such as which batch was taken for the largest.
        batch_size: samples of the batch that it holds for; ``None`` where they cannot be told.
        batch_shapes: shapes of that batch's tensors, in the order in which they are found; none if unknown.
        stateful: for each optimizer, for how many parameters it keeps something in the steps that were tried;
            none if unknown.
        held_bytes: what lived on the device beside the model then, such as copies of its weights.
        seconds: how long the search took.
        predict_way: predicts a way with other settings; ``None`` where that is no longer possible.
    """

    plain: Way
    chosen: Way | None
    front: tuple[Way, ...]
    floor: Floor
    offered: tuple[Way, ...] = ()
    refused: tuple[Refused, ...] = ()
    notes: tuple[str, ...] = ()
    batch_size: int | None = None
    batch_shapes: tuple[tuple[int, ...], ...] = ()
    stateful: tuple[int, ...] = ()
    held_bytes: int = 0
    seconds: float = 0.0
    predict_way: Callable[[Way], Way] | None = field(default=None, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "predict_way": None}  # of the model of this process


class Search(Protocol):
    """What finds ways to fit; ``planning/fit/search.py`` has the one that everybody uses."""

    def __call__(
        self,
        model: pl.LightningModule | Callable[[], pl.LightningModule],
        batch: Any = None,
        *,
        datamodule: pl.LightningDataModule | None = None,
        trainer: pl.Trainer | None = None,
        device: Device,
        limit_bytes: int,
        allow: tuple[str, ...] = (),
        techniques: tuple[Any, ...] = (),
    ) -> FoundWays:
        """Find what keeps a limit. Nothing of the caller's process is changed.

        Args:
            model: as for :func:`~lightning_memtrain.predict`; within a run the module that is trained, on its
                device.
            batch: one batch; ``None`` for ``datamodule``, or the model's own ``train_dataloader``.
            datamodule: where batches come from.
            trainer: of the run, its own callbacks and plugins included; a callback that plans is left out.
            device: what the run uses.
            limit_bytes: most bytes that the device may be asked for, its context included.
            allow: what may change the result, names that are known.
            techniques: what may be switched on besides what is known.

        Returns:
            The ways.
        """
