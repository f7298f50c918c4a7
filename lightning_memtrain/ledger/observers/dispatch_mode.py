"""A dispatch mode that shows every operator, and what is known of operators beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from lightning_memtrain.compat.torch_private import (
    FakeTensor,
    OpOverload,
    TorchDispatchMode,
    function_of_operator,
    get_current_dispatch_mode_stack,
    get_dispatch_stack_at,
    len_torch_dispatch_stack,
    pop_mode,
    push_mode,
    schema_of,
    skip_in_dynamo,
)
from lightning_memtrain.core import Category, OnDemandTensor

# Of tensors without data torch asks more often where they are than it computes with them.
_DEVICE_OF = torch.ops.prim.device.default
_len_dispatch_stack = len_torch_dispatch_stack
_dispatch_mode_at = get_dispatch_stack_at


class OperatorTraits(NamedTuple):
    """What is known of an operator beforehand.

    Args:
        func: the operator.
        call: what runs it.
        returns_arguments: whether it gives back storages of its arguments only, with the sizes that they had.
        makes_views: whether it does that, and writes to none of them either.
        role: what its arguments and results are used for, unless they are training state, if it is there to
            move them between processes; ``None`` for nearly all.
    """

    func: Any
    call: Callable[..., Any]
    returns_arguments: bool
    makes_views: bool
    role: Category | None


class OperatorMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Shows every operator below autograd, with its arguments and results."""

    _before: Callable[[OperatorTraits, Any, Any], None]
    _after: Callable[[OperatorTraits, Any], None]
    _passing: Callable[[], None] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].device
        for kind in types:
            if kind is not torch.nn.Parameter and issubclass(kind, OnDemandTensor):
                return NotImplemented  # the operators that make its numbers come here instead
        traits = _KNOWN.get(id(func)) or traits_of(func)
        _, call, returns_arguments, makes_views, _ = traits
        passing = self._passing
        if not makes_views or passing is None:
            self._before(traits, args, kwargs or {})
        results = call(*args, **kwargs) if kwargs else call(*args)
        if returns_arguments and passing is not None:
            passing()
        else:
            self._after(traits, results)
        return results

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch asks this when the class is made. Where the answer is yes, it wraps `__torch_dispatch__` in
        # `torch._dynamo.disable`, some more calls in Python around every operator.
        return not skip_in_dynamo(cls.__dict__["__torch_dispatch__"])

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have ``torch.compile`` compile what it meets under this mode, and not give it up for good."""
        return True

    def begin(
        self,
        before: Callable[[OperatorTraits, Any, Any], None],
        after: Callable[[OperatorTraits, Any], None],
        passing: Callable[[], None] | None = None,
    ) -> None:
        """Begin to show operators, in this thread and in those that run its backward.

        Args:
            before: called with operator, arguments and keyword arguments.
            after: called with operator and results.
            passing: called instead of ``after`` where an operator makes nothing, and instead of both where it
                only makes views of its arguments, which more than half of all do; whoever uses the view
                shows the same storage.
        """
        self._before, self._after, self._passing = before, after, passing
        push_mode(self)

    def in_force(self) -> bool:
        """Whether it is here, now and in this thread that operators are shown.

        They are not shown while a dry run goes on, while torch compiles, and in other threads than the one
        that began (but in those in which autograd runs its backward). Who follows a step by other means
        than operators asks this, so that all that is seen is of the same step.
        """
        depth = _len_dispatch_stack()
        if depth and _dispatch_mode_at(depth - 1) is self:  # asked often, and nearly always so
            return True
        return depth > 1 and self in get_current_dispatch_mode_stack()

    def end(self) -> None:
        """Stop watching, wherever on the stack: two ledgers may be left in the order of their entering."""
        above: list[TorchDispatchMode] = []
        while get_current_dispatch_mode_stack():
            top = pop_mode()
            if top is self:
                break
            above.append(top)
        for other in reversed(above):
            push_mode(other)
        self._passing = None
        del self._before, self._after  # they belong to the owner of this mode, and would keep it


# What the operators that FSDP2 has of its own read and write, beside shards.
_OF_FSDP = {
    "all_gather_copy_in": Category.GATHERED_WEIGHTS,
    "split_with_sizes_copy": Category.GATHERED_WEIGHTS,
    "chunk_cat": Category.UNSHARDED_GRADIENTS,
}

# By identity, since an operator's hash is a call in Python; it is kept, so that the identity stays its own.
_KNOWN: dict[int, OperatorTraits] = {}


def traits_of(func: Any) -> OperatorTraits:
    """What is known of an operator beforehand.

    Args:
        func: any operator.

    Returns:
        Its traits; the same object each time.
    """
    return _KNOWN.get(id(func)) or _KNOWN.setdefault(id(func), _look_at(func))


def _look_at(func: Any) -> OperatorTraits:
    schema: Any = schema_of(func)
    if schema is None:
        return OperatorTraits(func, func, False, False, None)
    arguments_only = (
        not any(part in schema.name for part in ("resize", "set_", "lift"))
        and "out" not in schema.overload_name
        and all(value.alias_info is not None for value in schema.returns)
    )
    views = arguments_only and bool(schema.returns) and not schema.is_mutable
    namespace, _, name = schema.name.partition("::")
    role = _OF_FSDP.get(name) if namespace == "fsdp" else None
    # An operator called is a function of Python around this one, which shows in steps of small operators.
    call = function_of_operator(func) if type(func) is OpOverload else func
    return OperatorTraits(func, call, arguments_only, views, role)
