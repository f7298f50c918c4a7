"""The limit that chunks of a probe are broken off at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_memtrain.compat.torch_private import schema_of
from lightning_memtrain.ledger import AllocationLimit, ResultBytes
from lightning_memtrain.ledger.tensors.storages import tensors_in


class TrialLimit(AllocationLimit):
    """Lets tensors be copied before anybody writes to them.

    Args:
        limit_bytes: most bytes that may be live.
        results: says what operators make.
        before_write: called with each tensor that an operator is about to write to.
    """

    def __init__(
        self, limit_bytes: int, results: ResultBytes, before_write: Callable[[Tensor], None]
    ) -> None:
        super().__init__(limit_bytes, results)
        self._before_write = before_write

    def before(
        self, func: Callable[..., Any], args: Any, kwargs: Any, live_bytes: int, late_bytes: int
    ) -> None:
        """As in the base class."""
        super().before(func, args, kwargs, live_bytes, late_bytes)
        schema = schema_of(func)
        if schema is None or not schema.is_mutable:
            return
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                for tensor in tensors_in(value):
                    self._before_write(tensor)
