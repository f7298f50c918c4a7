"""Following the module calls of one step: when each began and ended, and what it took, saved and returned."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_memtrain.checkpointing.existing_checkpoints import is_backward
from lightning_memtrain.checkpointing.insertion import insertable_modules
from lightning_memtrain.compat.torch_private import (
    current_autograd_node,
    next_sequence_number,
    sequence_number_of,
)
from lightning_memtrain.ledger import MemoryLedger
from lightning_memtrain.ledger.observers.dispatch_mode import OperatorMode, OperatorTraits
from lightning_memtrain.ledger.observers.saved_tensors import SAVED_TENSOR_HOOKS
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call
from lightning_memtrain.ledger.storage_records import StorageRecord
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.tracing.inplace_writes import version_of

_ACCUMULATES_GRADIENT = 2**64 - 1


@dataclass(eq=False)
class ProfiledCall:
    """One call of a module in the step.

    Args:
        name: path of the module; ``None`` for the step itself.
        start: tick of the ledger when it began; ``end``: when it ended.
        first_save: how many tensors had been saved for backward when it began; ``last_save``: at its end.
        first_op: how many operators had run when it began; ``last_op``: at its end.
        backward_start: tick when its backward began, ``None`` if it has none; ``backward_end``: of its last
            operator there.
        taken: records of its arguments, each with whether the call wrote to it.
        returned: records of its outputs.
        versions: its arguments while it runs, each with its version.
        calls: what it calls in turn.
        parent: what called it.
    """

    name: str | None
    start: int = 0
    end: int = 0
    first_save: int = 0
    last_save: int = 0
    first_op: int = 0
    last_op: int = 0
    backward_start: int | None = None
    backward_end: int = 0
    taken: list[tuple[StorageRecord, bool]] = field(default_factory=list)
    returned: list[StorageRecord] = field(default_factory=list)
    versions: list[tuple[Tensor, int]] = field(default_factory=list)
    calls: list[ProfiledCall] = field(default_factory=list)
    parent: ProfiledCall | None = None


class CallProfiler:
    """Follows the module calls of one step, beside a ledger that is entered already.

    Args:
        model: the module whose submodules are followed.
        ledger: counts the bytes.
        left_out: paths of submodules that are not followed.
    """

    def __init__(
        self, model: nn.Module, ledger: MemoryLedger, left_out: Collection[str] = frozenset()
    ) -> None:
        self.root = ProfiledCall(None)
        self.op_calls: list[OpCall] = []
        #: Of each tensor that was saved, its records and how many operators had run by then.
        self.saves: list[tuple[list[StorageRecord], int]] = []
        self.forward_end = 0
        self._model = model
        self._ledger = ledger
        self._left_out = left_out
        # `None` for calls that are not followed.
        self._stack: list[ProfiledCall | None] = [self.root]
        self._first_nodes = [-1]
        self._calls_of_nodes = [self.root]
        self._undo = ExitStack()
        self._operators = OperatorMode()  # type: ignore[no-untyped-call]

    def __enter__(self) -> CallProfiler:
        self.root.start = self._ledger.tick
        candidates = insertable_modules(self._model).difference(self._left_out)
        for name, module in self._model.named_modules():
            if name in candidates and name:
                before = module.register_forward_pre_hook(self._enter(name), with_kwargs=True)
                after = module.register_forward_hook(self._leave, always_call=True)
                self._undo.callback(before.remove)
                self._undo.callback(after.remove)
        SAVED_TENSOR_HOOKS.add(self._on_saved)
        self._undo.callback(SAVED_TENSOR_HOOKS.remove, self._on_saved)
        self._operators.begin(self._on_operator, lambda operator, results: None)
        self._undo.callback(self._operators.end)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._undo.close()
        root = self.root
        root.end, root.last_save, root.last_op = self._ledger.tick, len(self.saves), len(self.op_calls)

    def _records(self, tree: Any) -> list[StorageRecord]:
        return [record for tensor in tensors_in(tree) for record in self._ledger.records_of(tensor)]

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._is_over():
                self._stack.append(None)
                return
            outer = self._stack[-1]
            assert outer is not None
            call = ProfiledCall(name, parent=outer)
            call.versions = [(tensor, version_of(tensor)) for tensor in tensors_in((args, kwargs))]
            call.start, call.first_save, call.first_op = self._now()
            outer.calls.append(call)
            self._stack.append(call)
            self._note_change()

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self._stack.pop()
        if call is None:
            return
        call.end, call.last_save, call.last_op = self._now()
        call.returned = self._records(output)
        for tensor, version in call.versions:
            call.taken += [(record, version_of(tensor) != version) for record in self._records(tensor)]
        call.versions.clear()
        self._note_change()

    def _is_over(self) -> bool:
        """Whether backward has begun: what is called from then on is recomputed, or evaluated once more."""
        return self.forward_end > 0 or is_backward()

    def _now(self) -> tuple[int, int, int]:
        return self._ledger.tick, len(self.saves), len(self.op_calls)

    def _note_change(self) -> None:
        self._first_nodes.append(next_sequence_number())
        innermost = self._stack[-1]
        assert innermost is not None
        self._calls_of_nodes.append(innermost)

    def _on_saved(self, tensor: Tensor) -> None:
        self.saves.append((self._ledger.records_of(tensor), len(self.op_calls)))

    def _on_operator(self, operator: OperatorTraits, args: Any, kwargs: Any) -> None:
        if not is_backward():
            if self.forward_end == 0:
                self.op_calls.append(op_call(operator.func, args, kwargs))
            return
        tick = self._ledger.tick
        self.forward_end = self.forward_end or tick
        node = current_autograd_node()
        number = sequence_number_of(node) if node is not None else _ACCUMULATES_GRADIENT
        if number == _ACCUMULATES_GRADIENT:
            return
        call: ProfiledCall | None = self._calls_of_nodes[bisect_right(self._first_nodes, number) - 1]
        while call is not None:
            if call.backward_start is None:
                call.backward_start = tick
            call.backward_end = tick
            call = call.parent
