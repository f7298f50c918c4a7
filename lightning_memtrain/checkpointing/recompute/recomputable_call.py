"""One call of a module: all that is needed to run it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.ambient_state import AmbientState
from lightning_memtrain.checkpointing.recompute.copies_before_writes import CopyBeforeWriteMode
from lightning_memtrain.checkpointing.recompute.module_attributes import ModuleAttribute
from lightning_memtrain.checkpointing.recompute.module_state import ModuleState
from lightning_memtrain.checkpointing.recompute.objects.adapter_lookup import is_cache
from lightning_memtrain.checkpointing.recompute.objects.object_copies import (
    ObjectCopier,
    TensorCopies,
    writable_copy,
)
from lightning_memtrain.checkpointing.recompute.objects.reachable_objects import ObjectPath
from lightning_memtrain.compat.torch_private import TreeSpec, tree_flatten, tree_unflatten

OutputId = tuple[int, int]
"""A tensor by the call of the segment that made it, and its place among the call's outputs."""


class CallTarget(NamedTuple):
    """A module that is recomputed.

    Args:
        name: its path in the model.
        module: the module.
        forward: its own forward.
        position: its place among those that are recomputed together.
        path: which part of these it belongs to, from the outermost level.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    position: int
    path: tuple[int, ...]


class Argument(NamedTuple):
    """Where a call finds one of its arguments when it runs again.

    Args:
        value: the argument itself, if it is neither a tensor nor an object that is looked into.
        saved_index: its place among the tensors that the call saves.
        output_id: the earlier call of the segment that makes it again.
        requires_grad: whether the tensor did.
        is_leaf: whether no operator made the tensor that autograd knows.
        is_written: whether the call writes to it.
    """

    value: Any = None
    saved_index: int | None = None
    output_id: OutputId | None = None
    requires_grad: bool = False
    is_leaf: bool = True
    is_written: bool = False


class RecomputableCall:
    """One call of a module, which can run again.

    Args:
        index: its place in its segment.
        target: what was called.
        ambient_state: what the call found around it.
        state: what the call found in its modules.
        context: to run it in again.
        is_watched: whether it ran under a dispatch mode, in which torch takes other ways now and then.
    """

    def __init__(
        self,
        index: int,
        target: CallTarget,
        ambient_state: AmbientState,
        state: ModuleState,
        context: AbstractContextManager[Any],
        is_watched: bool,
    ) -> None:
        self.index = index
        self.runs_to_its_end = False
        """Whether it must, each time, since it adds to what autograd has saved."""
        self.target = target
        self.arguments: list[Argument] = []
        self._ambient_state = ambient_state
        self._state = state
        self._context = context
        self._is_watched = is_watched
        self._structure: TreeSpec | None = None
        self._saved_by: Any = None
        self._saved: Sequence[Tensor] | None = None
        self._copier: ObjectCopier | None = None

    def keep_arguments(
        self,
        flat: Sequence[Any],
        structure: TreeSpec,
        from_segment: Mapping[int, OutputId],
        before: Mapping[Any, Tensor],
        copier: ObjectCopier,
    ) -> None:
        """Keep what the call was given, where nothing makes it again.

        Args:
            flat: its arguments.
            structure: how they belong together.
            from_segment: by place, what earlier calls of the segment make again.
            before: by place, what it wrote to, as it was before, in the same shape and dtype.
            copier: copies the arguments that are objects, and those that its modules hold.
        """
        self._structure = structure
        self._copier = copier
        saved: list[Tensor] = []
        saved_indices: dict[int, int] = {}
        for place, value in enumerate(flat):
            if not isinstance(value, Tensor) or value.is_inference():  # autograd keeps no tensor of that mode
                self.arguments.append(Argument(value if place not in copier.roots else None))
                continue
            if place not in from_segment and id(value) not in saved_indices:
                saved_indices[id(value)] = len(saved)
                saved.append(before.get(place, value).detach())  # without the graph behind it
            self.arguments.append(
                Argument(
                    saved_index=saved_indices.get(id(value)),
                    output_id=from_segment.get(place),
                    requires_grad=value.requires_grad,
                    is_leaf=value.is_leaf,
                    is_written=place in before,
                )
            )
        self._saved_by = _SaveForBackward.apply(_dummy(), *saved).grad_fn if saved else None  # type: ignore[no-untyped-call]

    def run_again(self, find_output: Callable[[OutputId], Tensor]) -> list[Any]:
        """Run the call again, with the state that it found the first time.

        Args:
            find_output: gives what earlier calls made.

        Returns:
            Its outputs, flat, with the shapes and dtypes of forward.

        Raises:
            RuntimeError: if the result would not be the same.
        """
        changed = self._state.changed_since()
        assert self._structure is not None
        assert self._copier is not None
        changed = changed or self._copier.outdated
        if changed:
            raise RuntimeError(
                f"`ActivationCheckpointing` cannot recompute {self.target.name!r}: its "
                f"{describe_key(changed[0], self.target.module)} was changed "
                "in place after its forward and before its backward, so the gradients would be those of "
                "another model. Run backward before the change, e.g. before the optimizer steps, or leave "
                "this module out."
            )
        copies = TensorCopies()
        objects = self._copier.object_copies(copies)
        args, kwargs = tree_unflatten(self._values(find_output, objects), self._structure)
        watch = CopyBeforeWriteMode() if self._is_watched else nullcontext()
        with self._ambient_state.restored(), self._state.restored(copies, objects), watch, self._context:
            return flatten(self.target.forward(*args, **kwargs))[0]

    def _values(self, find_output: Callable[[OutputId], Tensor], objects: Mapping[Any, Any]) -> list[Any]:
        if self._saved is None:  # a checkpoint around this one may give them only once
            self._saved = self._saved_by.saved_tensors if self._saved_by is not None else ()
        again: dict[Argument, Tensor] = {}  # the same tensor in several places is so again
        values = []
        for place, argument in enumerate(self.arguments):
            if argument.saved_index is None and argument.output_id is None:
                values.append(objects.get(place, argument.value))
                continue
            if argument not in again:
                if argument.saved_index is not None:
                    tensor = self._saved[argument.saved_index]
                else:
                    assert argument.output_id is not None
                    tensor = find_output(argument.output_id)
                again[argument] = _made_again(tensor, argument)
            values.append(again[argument])
        return values


def describe_key(key: Any, module: nn.Module) -> str:
    """What a tensor is, for people.

    Args:
        key: place of an argument, attribute of a module, or place within what one of these holds.
        module: the module that is called.

    Returns:
        E.g. ``"argument 2"``, or ``"attribute 'tracker.total'"``.
    """
    if isinstance(key, ObjectPath):
        root = describe_key(key.root, module)
        return f"{root[:-1]}{key}'" if root.endswith("'") else f"{root} ({str(key).lstrip('.')!r})"
    if isinstance(key, int):
        return f"argument {key + 1}"
    return key.describe(module) if isinstance(key, ModuleAttribute) else "argument or attribute"


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of arguments or outputs, and how they belong together.

    Args:
        tree: arguments or outputs.

    Returns:
        Both. Key-value caches are leaves, of which others may have told torch how to take them apart.
    """
    return tree_flatten(tree, is_leaf=_is_leaf)


def _is_leaf(value: Any) -> bool:
    return is_cache(type(value))


def _made_again(tensor: Tensor, argument: Argument) -> Tensor:
    if argument.is_written:
        return writable_copy(tensor, argument.requires_grad)
    tensor = tensor.detach().requires_grad_(argument.requires_grad)
    # Hooks and modules may treat leaves in another way.
    return tensor if argument.is_leaf else torch.ops.aten.alias(tensor)


class _SaveForBackward(torch.autograd.Function):
    """Keeps tensors as autograd keeps what it saves, so that a checkpoint around this one may drop them."""

    @staticmethod
    def forward(ctx: Any, handle: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return handle.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("nothing depends on it")


def _dummy() -> Tensor:
    # Takes no bytes.
    return torch.empty(0, device="meta", requires_grad=True)
