"""Errors of operators that do not exist in half precision, with the layer and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from torch import nn

_HALF = re.compile(r"\b(b?float16|half)\b", re.IGNORECASE)


@contextmanager
def layers_named_in_errors(model: nn.Module) -> Iterator[None]:
    """Add to an error that speaks of half precision which layer of a model it came from.

    Args:
        model: whose layers have names.

    Raises:
        RuntimeError: in place of an error of torch's; of the class that it had, with what to do.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if type(error) not in (RuntimeError, NotImplementedError) or not _HALF.search(str(error)):
            raise
        name, layer = _innermost_layer(error.__traceback__, model)
        if layer is None:
            raise
        if name:
            cure = f'Keep it in float32 by `LowPrecision(keep_fp32=("norm", "{name}"))`'
        else:
            cure = "Put what failed into a layer of its own and name that in `LowPrecision(keep_fp32)`"
        raise type(error)(
            f"{_described(name, layer)} cannot compute in half precision: {error}\n"
            f"{cure}, or cast what it computes with by `.float()`."
        ) from error


def _described(name: str, layer: nn.Module) -> str:
    return f"Layer {name!r} ({type(layer).__name__})" if name else type(layer).__name__


def _innermost_layer(traceback: TracebackType | None, model: nn.Module) -> tuple[str, nn.Module | None]:
    names = {id(layer): name for name, layer in model.named_modules()}
    found: tuple[str, nn.Module | None] = "", None
    while traceback is not None:
        candidate = traceback.tb_frame.f_locals.get("self")
        if isinstance(candidate, nn.Module) and id(candidate) in names:
            found = names[id(candidate)], candidate
        traceback = traceback.tb_next
    return found
