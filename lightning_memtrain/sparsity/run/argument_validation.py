"""Arguments of the callback that are of another type or out of their range."""

from __future__ import annotations

import warnings
from typing import Any, get_args

from lightning_memtrain.core import ArgumentError, NoEffectWarning, parse_bytes
from lightning_memtrain.core.arguments.value_checks import check_counts, check_flags
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.methods.update_schedules import UpdateSchedule
from lightning_memtrain.sparsity.selection.select import Select
from lightning_memtrain.sparsity.storage.patterns import Storage


def refuse_arguments(
    method: Any,
    update: Any,
    layers: Any,
    storage: Any,
    chunk_bytes: Any,
    seed: Any,
    track_exploration: Any,
    leave: Any,
) -> None:
    """Refuse arguments of the callback that are of another type or out of their range.

    Args:
        method: see the callback, as the others.
        update: see there.
        layers: see there.
        storage: see there.
        chunk_bytes: see there.
        seed: see there.
        track_exploration: see there.
        leave: see there.

    Raises:
        ArgumentError: naming the argument.
    """
    _check_type("method", method, SparseMethod, "a method such as RigL(0.9)")
    _check_type("update", update, (UpdateSchedule, type(None)), "an update schedule such as UpdateEvery(100)")
    _check_type("layers", layers, (Select, type(None)), "a Select(...)")
    if storage not in get_args(Storage):
        expected = ", ".join(repr(choice) for choice in get_args(Storage))
        raise ArgumentError(
            f"`SparseTraining(storage)` must be one of {expected}, but got storage={storage!r}. Use one."
        )
    if chunk_bytes is not None:
        try:
            parse_bytes(chunk_bytes, argument="SparseTraining(chunk_bytes)")
        except ValueError as error:
            raise ArgumentError(f"{error} Leave it out for whole weights.") from None
    check_counts("SparseTraining", None, "Leave it out for 0.", seed=seed)
    check_flags("SparseTraining", track_exploration=track_exploration)
    if leave not in ("sparse", "dense"):
        raise ArgumentError(
            f"`SparseTraining(leave)` must be 'sparse' or 'dense', but got leave={leave!r}. Use 'dense' for "
            "a model that code without sparse layers can use after the run."
        )


def warn_of_update(method: SparseMethod, update: UpdateSchedule | None) -> None:
    """Warn of an update schedule for a pattern that never changes.

    Args:
        method: of the callback.
        update: of the callback.
    """
    if method.default_update is None and update is not None:
        warnings.warn(
            f"`SparseTraining(update)` has no effect with `{type(method).__name__}`, whose pattern never "
            "changes. Leave it out.",
            NoEffectWarning,
            stacklevel=3,
        )


def _check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentError(
            f"`SparseTraining({name})` must be {expected}, but got {name}={value!r}. Use one."
        )
