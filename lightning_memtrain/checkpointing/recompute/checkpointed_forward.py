"""What takes the place of a module's forward while it is checkpointed.

Not ``torch.utils.checkpoint``: that one protects the state of torch's generators and autocast. Whether a call
has other state to protect (random numbers of Python or NumPy, attributes, buffers, objects) is known once it
has run, and then torch has nothing to go back to; what it would save in time is in docs/checkpointing.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.ambient_state import AmbientState
from lightning_memtrain.checkpointing.recompute.call_traits import CallTraits
from lightning_memtrain.checkpointing.recompute.copies_before_writes import CopiesBeforeWrites
from lightning_memtrain.checkpointing.recompute.module_attributes import mutable_attributes
from lightning_memtrain.checkpointing.recompute.module_state import ModuleState
from lightning_memtrain.checkpointing.recompute.objects.adapter_lookup import is_cache
from lightning_memtrain.checkpointing.recompute.objects.key_value_caches import CacheLayers
from lightning_memtrain.checkpointing.recompute.objects.object_copies import ObjectCopier
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import ReachableObjects, is_mutable
from lightning_memtrain.checkpointing.recompute.recomputable_call import (
    CallTarget,
    OutputId,
    RecomputableCall,
    describe_key,
    flatten,
)
from lightning_memtrain.checkpointing.recompute.recompute_group import RecomputeGroup
from lightning_memtrain.checkpointing.recompute.segment import Segment, SegmentPart
from lightning_memtrain.compat.torch_private import TreeSpec, disable_dynamo
from lightning_memtrain.core.compiled_modules import is_compiled


class _Arguments(NamedTuple):
    """What a call was given: its values, how they belong together, and which its segment makes again."""

    flat: list[Any]
    structure: TreeSpec
    from_segment: dict[int, OutputId]


class _BegunCall(NamedTuple):
    """A call about to run, and all that was noted before it.

    Args:
        call: runs again in backward.
        segment: what it goes on with.
        part: the part of the segment that it belongs to.
        arguments: what it was given.
        modes: of its modules.
        traits: what is known of calls in these modes.
        is_known: whether that covers all that this call finds.
        ambient_state: what it finds around it.
        state: what it finds in its modules.
        objects: what it finds in Python objects.
        writes: copies what it writes to.
        context: to run it in.
        holds: whether to hold what it saves until it has ended.
    """

    call: RecomputableCall
    segment: Segment
    part: SegmentPart
    arguments: _Arguments
    modes: tuple[bool, ...]
    traits: CallTraits
    is_known: bool
    ambient_state: AmbientState
    state: ModuleState
    objects: ReachableObjects
    writes: CopiesBeforeWrites
    context: AbstractContextManager[Any]
    holds: bool


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
        self,
        module: nn.Module,
        name: str,
        group: RecomputeGroup,
        position: int = 0,
        path: tuple[int, ...] = (),
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
        self._traits: dict[tuple[bool, ...], CallTraits] = {}
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

    @disable_dynamo
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, keeping what it takes to run it again."""
        if self._is_removed or not torch.is_grad_enabled():
            return self.original(*args, **kwargs)
        begun = self._begin(args, kwargs)
        part, num_before = begun.part, len(begun.part)
        drops = part.dropping_saved_tensors(self.name, begun.state.statistics, holds=begun.holds)
        try:
            with drops, begun.writes, begun.context:
                output = self.original(*args, **kwargs)
        except BaseException:
            part.forget_since(num_before)
            raise
        self.has_effect |= len(part) > num_before
        traits = self._learn(begun)
        if traits is None:  # it cannot run again as it did, but the next call will know
            part.forget_since(num_before)
            return output
        self._refuse_shared_memory(begun.writes.sharing_memory())
        part.drop_since(num_before)
        self._keep(begun, traits, flatten(output)[0])
        return output

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _BegunCall:
        """Note all that the call finds."""
        flat, structure = flatten((args, kwargs))
        tensors = {place: value for place, value in enumerate(flat) if isinstance(value, Tensor)}
        self.fills_cache |= self.module.training and any(is_cache(type(value)) for value in flat)
        segment = self._group.take_segment(self.position, tensors.values())
        from_segment = {
            place: output_id for place, tensor in tensors.items() if (output_id := segment.output_id(tensor))
        }

        modules = [*self.module.modules()]
        modes = tuple(module.training for module in modules)
        traits = self._traits.get(modes, CallTraits())
        state = ModuleState(modules, traits.assigned, traits.given_other_data)
        passed = {
            place: value for place, value in enumerate(flat) if place not in tensors and is_mutable(value)
        }
        objects = ReachableObjects(passed, mutable_attributes(modules), CacheLayers(modules, self.name))
        is_known = traits.cover(objects)
        is_watched = not is_known and not _contains_compiled(self.module)
        given = [*tensors.items(), *state.tensors, *objects.tensors]
        writes = CopiesBeforeWrites(
            given, None if is_watched else traits.written, None if is_known else objects.look_for_changes
        )
        ambient_state = AmbientState([tensor for _, tensor in given], traits.draws_from_numpy)
        context, again = self._group.contexts() if self._group.contexts is not None else (nullcontext(),) * 2
        target = CallTarget(self.name, self.module, self.original, self.position, self.path)
        call = RecomputableCall(len(segment.calls), target, ambient_state, state, again, is_watched)
        # What is saved is held until the call has ended if it may be needed so long: by a backward in the
        # forward, or by autograd if the call turns out not to be one that can run again.
        holds = traits.runs_own_backward or traits.writes_to_attributes or state.has_own_tensors
        part = segment.part(self.path)
        arguments = _Arguments(flat, structure, from_segment)
        return _BegunCall(
            call,
            segment,
            part,
            arguments,
            modes,
            traits,
            is_known,
            ambient_state,
            state,
            objects,
            writes,
            context,
            holds,
        )

    def _learn(self, begun: _BegunCall) -> CallTraits | None:
        """Learn what the call has changed.

        Args:
            begun: the call, which has ended.

        Returns:
            What is known of such calls now; ``None`` if this one cannot run again.
        """
        traits, state, writes, objects = begun.traits, begun.state, begun.writes, begun.objects
        begun.ambient_state.call_ended()
        given_other_data = [one for one in state.given_other_data() if one not in traits.given_other_data]
        assigned = state.assigned()
        cannot_run_again = bool(writes.missed or given_other_data)
        if cannot_run_again and not begun.holds:
            raise self._late(writes.missed, given_other_data)
        if traits.is_new:
            traits = traits._replace(
                is_new=False,
                draws_from_numpy=begun.ambient_state.draws_from_numpy,
                runs_own_backward=begun.part.runs_own_backward,
            )
        if assigned or cannot_run_again or not begun.is_known:
            traits = self._traits[begun.modes] = traits._replace(
                written=traits.written.union(writes.before, writes.missed),
                seen=traits.seen.union(objects.looked_at),
                changed_for_a_while=traits.changed_for_a_while.union(objects.changed_for_a_while),
                assigned=traits.assigned.union(assigned),
                given_other_data=traits.given_other_data.union(given_other_data),
                writes_after_save=traits.writes_after_save or writes.writes_after_save,
            )
        return None if cannot_run_again else traits

    def _keep(self, begun: _BegunCall, traits: CallTraits, outputs: Sequence[Any]) -> None:
        """Keep what it takes to run the call again, and let the next one go on with its segment."""
        call, objects, writes = begun.call, begun.objects, begun.writes
        call.runs_to_its_end = traits.writes_after_save
        changed = objects.roots_changed(writes.copies, traits.changed_for_a_while)
        copier = ObjectCopier(objects, changed, writes.copies)
        begun.state.call_ended(writes.before, objects.tensors, copier.roots)
        call.keep_arguments(*begun.arguments, writes.before, copier)
        begun.segment.add(call, outputs)
        self._group.give_back(begun.segment)

    def _late(self, written: list[Any], given_other_data: list[Any]) -> RuntimeError:
        keys, how = (written, "in place") if written else (given_other_data, "by giving it other data")
        return RuntimeError(
            f"`ActivationCheckpointing` cannot recompute {self.name!r}: its forward changes "
            f"{self._named(keys)} {how}, which it did not in its first call. Let it make a new tensor, or "
            "leave this module out."
        )

    def _refuse_shared_memory(self, keys: list[Any]) -> None:
        if keys:
            raise RuntimeError(
                f"`ActivationCheckpointing` cannot recompute {self.name!r}: what it writes to in place must "
                f"not share memory with anything else that it is given, but {self._named(keys)} do. "
                "Pass a copy (`.clone()`), write to none of them, or leave this module out."
            )

    def _named(self, keys: Collection[Any]) -> str:
        return " and ".join(describe_key(key, self.module) for key in keys)


def _contains_compiled(module: nn.Module) -> bool:
    # Compiled code does not run under a dispatch mode.
    return any(map(is_compiled, module.modules()))
