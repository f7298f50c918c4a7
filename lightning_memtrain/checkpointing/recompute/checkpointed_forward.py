"""What takes the place of a module's forward while it is checkpointed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.ambient_state import Surroundings
from lightning_memtrain.checkpointing.recompute.call_traits import Habits
from lightning_memtrain.checkpointing.recompute.copies_before_writes import KeptBefore
from lightning_memtrain.checkpointing.recompute.module_attributes import holders
from lightning_memtrain.checkpointing.recompute.module_state import ModuleState
from lightning_memtrain.checkpointing.recompute.objects.adapter_lookup import is_cache
from lightning_memtrain.checkpointing.recompute.objects.key_value_caches import Layers
from lightning_memtrain.checkpointing.recompute.objects.object_copies import TwinMaker
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import Objects, holds_what_changes
from lightning_memtrain.checkpointing.recompute.recomputable_call import Call, Unit, described, flattened
from lightning_memtrain.checkpointing.recompute.segment import Segment

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
"""Makes a context for the forward of a call and one for its recomputation."""


class Group:
    """Modules that are recomputed together where one feeds the next.

    Args:
        contexts: contexts for each call; by default none.
    """

    def __init__(self, contexts: Contexts | None = None) -> None:
        self.contexts = contexts
        self._open: _Open | None = None

    def take(self, position: int, tensors: Collection[Tensor]) -> Segment:
        """The segment that a call goes on with, or a new one; until it is given back, others begin their own.

        A call goes on with the last segment if it comes later in the group than that one's calls, takes
        something that they made, and no checkpoint around them begins or ends in between. So no segment
        reaches into another forward pass, however the last one ended.

        Args:
            position: place of the module in the group.
            tensors: arguments of the call.

        Returns:
            The segment.
        """
        segment = self._open.segment() if self._open is not None and self._open.is_within_reach else None
        self._open = None
        if (
            segment is None
            or segment.calls[-1].unit.position >= position
            or all(segment.maker(tensor) is None for tensor in tensors)
        ):
            return Segment()
        return segment

    def give_back(self, segment: Segment) -> None:
        """Let the next call go on with a segment."""
        hook = _hook_around()
        reference: Callable[[], Any] | None
        try:
            reference = weakref.ref(hook) if hook is not None else None
        except TypeError:  # it is part of Python, which lives on anyway
            reference = functools.partial(_as_it_is, hook)
        self._open = _Open(weakref.ref(segment), reference)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}  # a copy begins anew


class _Open(NamedTuple):
    """A segment that calls may go on with while the same hook for saved tensors is in force."""

    segment: weakref.ref[Segment]
    hook: Callable[[], Any] | None

    @property
    def is_within_reach(self) -> bool:
        hook = _hook_around()
        return hook is None if self.hook is None else hook is not None and self.hook() is hook


# Before torch 2.8 there is no such function.
_top_hooks: Callable[[bool], Any] = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", lambda tracing: None
)


def _hook_around() -> Any:
    hooks = _top_hooks(True)
    return hooks[0] if hooks is not None else None


class CheckpointedForward:
    """Takes the place of a module's forward: runs it, and again in backward.

    An attribute of the module, so its class, its parameters and their names stay what they are. It can be
    copied and pickled with the module.

    Args:
        module: the module.
        name: its path in the model.
        group: what it is recomputed together with.
        position: its place in the group.
        path: which part of the group's levels it belongs to.
    """

    def __init__(
        self, module: nn.Module, name: str, group: Group, position: int = 0, path: tuple[int, ...] = ()
    ) -> None:
        self.module = module
        self.name = name
        self.position = position
        self.path = path
        self._group = group
        self._is_removed = False
        self.has_effect = False
        """Whether a call has saved something for backward."""
        self.fills_cache = False
        """Whether a call in training was given a key-value cache."""
        # By the modes of the modules: in training a forward may change what it leaves alone otherwise.
        self._habits: dict[tuple[bool, ...], Habits] = {}
        # `module.compile()` keeps the compiled forward in another attribute than an own forward.
        self._attribute = "forward" if module._compiled_call_impl is None else "_compiled_call_impl"
        self._replaced = module.__dict__.get(self._attribute)

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.__dict__[self._attribute] = self

    def remove(self) -> None:
        """Give the forward back; where something else took its place since, do nothing from here."""
        self._is_removed = True
        if self.module.__dict__.get(self._attribute) is not self:
            return
        if self._replaced is None:
            del self.module.__dict__[self._attribute]
        else:
            self.module.__dict__[self._attribute] = self._replaced

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self._replaced is not None:
            return self._replaced(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, keeping what it takes to run it again."""
        if self._is_removed or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        flat, structure = flattened((args, kwargs))
        tensors = {place: value for place, value in enumerate(flat) if isinstance(value, Tensor)}
        self.fills_cache |= self.module.training and any(is_cache(type(value)) for value in flat)
        segment = self._group.take(self.position, tensors.values())
        makers = {place: made for place, tensor in tensors.items() if (made := segment.maker(tensor))}

        modules = [*self.module.modules()]
        modes = tuple(module.training for module in modules)
        habits = self._habits.get(modes, Habits())
        state = ModuleState(modules, habits.assigned, habits.swapped)
        passed = {
            place: value
            for place, value in enumerate(flat)
            if place not in tensors and holds_what_changes(value)
        }
        objects = Objects(passed, holders(modules), Layers(modules, self.name))
        is_known = habits.know(objects)
        is_watched = not is_known and not _has_compiled(self.module)
        given = [*tensors.items(), *state.tensors, *objects.tensors]
        writes = KeptBefore(
            given, None if is_watched else habits.written, None if is_known else objects.look_for_changes
        )
        surroundings = Surroundings([tensor for _, tensor in given], habits.draws_from_numpy)
        own, again = self._group.contexts() if self._group.contexts is not None else (nullcontext(),) * 2
        unit = Unit(self.name, self.module, self.original, self.position, self.path)
        call = Call(len(segment.calls), unit, surroundings, state, again, is_watched)

        # What is saved is held until the call has ended if it may be needed so long: by a backward in the
        # forward, or by autograd if the call turns out not to be one that can run again.
        holds = habits.looks_back or habits.write_to_attributes or state.has_tensors_of_its_own
        stretch = segment.stretch(self.path)
        num_before = len(stretch)
        try:
            with stretch.saving(self.name, state.statistics, holds=holds), writes, own:
                output = self.original(*args, **kwargs)
        except BaseException:
            stretch.forget_since(num_before)
            raise
        self.has_effect |= len(stretch) > num_before
        surroundings.call_ended()
        swapped = [slot for slot in state.swapped() if slot not in habits.swapped]
        assigned = state.assigned()
        if (writes.missed or swapped) and not holds:
            raise self._late(writes.missed, swapped)
        if habits.is_new:
            habits = habits._replace(
                is_new=False,
                draws_from_numpy=surroundings.draws_from_numpy,
                looks_back=stretch.looks_back,
            )
        if assigned or writes.missed or swapped or not is_known:
            habits = self._habits[modes] = habits._replace(
                written=habits.written.union(writes.before, writes.missed),
                watched=habits.watched.union(objects.looked_at),
                passing=habits.passing.union(objects.changed_for_a_while),
                assigned=habits.assigned.union(assigned),
                swapped=habits.swapped.union(swapped),
                fills_what_is_saved=habits.fills_what_is_saved or writes.fills_what_is_saved,
            )
        if writes.missed or swapped:  # it cannot run again as it did, but the next call will know
            stretch.forget_since(num_before)
            return output
        self._refuse_entangled(writes.entangled())
        stretch.drop_since(num_before)
        call.runs_to_its_end = habits.fills_what_is_saved
        twins = TwinMaker(objects, objects.roots_changed(writes.copies, habits.passing), writes.copies)
        state.call_ended(writes.before, objects.tensors, twins.roots)
        call.keep(flat, structure, makers, writes.before, twins)
        segment.add(call, flattened(output)[0])
        self._group.give_back(segment)
        return output

    def _late(self, written: list[Any], swapped: list[Any]) -> RuntimeError:
        keys, how = (written, "in place") if written else (swapped, "by giving it other data")
        return RuntimeError(
            f"`ActivationCheckpointing` cannot recompute {self.name!r}: its forward changes "
            f"{self._named(keys)} {how}, which it did not in its first call. Let it make a new tensor, or "
            "leave this module out."
        )

    def _refuse_entangled(self, keys: list[Any]) -> None:
        if keys:
            raise RuntimeError(
                f"`ActivationCheckpointing` cannot recompute {self.name!r}: what it writes to in place must "
                f"not share memory with anything else that it is given, but {self._named(keys)} do. "
                "Pass a copy (`.clone()`), write to none of them, or leave this module out."
            )

    def _named(self, keys: Collection[Any]) -> str:
        return " and ".join(described(key, self.module) for key in keys)


def _as_it_is(value: Any) -> Any:
    return value


def _has_compiled(module: nn.Module) -> bool:
    # `torch.compile(module)` keeps the module in this attribute; `module.compile()` in the other.
    # Compiled code does not run under a dispatch mode.
    return any("_orig_mod" in one._modules or one._compiled_call_impl is not None for one in module.modules())
