"""Buffers in half precision that training changes, by whatever code."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import version_counter
from lightning_memtrain.core.arguments.module_selectors import Selector
from lightning_memtrain.precision.weights.converted_buffers import NamedBuffer
from lightning_memtrain.precision.weights.kept_layers import format_selectors

# Training steps in which a buffer that changes at all has changed.
_NUM_STEPS = 8


class _State(NamedTuple):
    """A buffer at one moment."""

    identity: int
    version: int
    total: float


class BufferWatch:
    """Warns of buffers that the first training steps change, though the text of the model does not say so.

    Args:
        buffers: that were cast to half precision.
        keep_in_fp32: which layers are kept in float32 already.
    """

    def __init__(self, buffers: Iterable[NamedBuffer], keep_in_fp32: Sequence[Selector]) -> None:
        self._keep_in_fp32 = keep_in_fp32
        self._steps_left = _NUM_STEPS
        self._watched = {found.full_name: (ref(found.layer), found.name) for found in buffers}
        self._states: dict[str, _State] = {}

    @contextmanager
    def watch_step(self) -> Iterator[None]:
        """Look at the buffers before and after a step, when they are where they are to stay."""
        if not self._steps_left or not self._watched:
            yield
            return
        if not self._states:
            self._states = {name: _state_of(self._buffer(name)) for name in self._watched}
        yield
        self._steps_left -= 1
        changed = [name for name in self._watched if self._has_changed(name)]
        for name in changed:
            del self._watched[name]
        self._warn_of(changed)

    def _buffer(self, name: str) -> Tensor | None:
        layer, own_name = self._watched[name]
        found: Tensor | None = getattr(layer(), own_name, None)
        return found

    def _has_changed(self, name: str) -> bool:
        buffer, before = self._buffer(name), self._states[name]
        if buffer is None or (id(buffer), version_counter(buffer)) == (before.identity, before.version):
            return False
        # Perhaps by the same numbers: DistributedDataParallel sends buffers to all ranks.
        self._states[name] = _state_of(buffer)
        return self._states[name].total != before.total

    def _warn_of(self, changed: list[str]) -> None:
        if changed:
            layers = [name.rpartition(".")[0] for name in changed]
            cure = "put them into a layer of their own, and name it in `LowPrecision(keep_in_fp32)`"
            if all(layers):
                keep = format_selectors((*self._keep_in_fp32, *dict.fromkeys(layers)))
                cure = f"keep their layers in float32 by `LowPrecision(keep_in_fp32={keep})`"
            warnings.warn(
                f"`LowPrecision` keeps the buffers {', '.join(map(repr, changed))} in half precision, and "
                "training changes them. If they count or average, which is lost in half precision, "
                f"{cure}.",
                stacklevel=2,
            )


def _state_of(buffer: Tensor | None) -> _State:
    if buffer is None or buffer.is_meta:
        return _State(id(buffer), -1, 0.0)
    values = torch.nan_to_num(buffer.detach().reshape(-1).float())
    # Weighted by their index, so that numbers that change places show.
    weights = torch.linspace(1, 2, values.numel(), device=values.device)
    return _State(id(buffer), version_counter(buffer), float((values * weights).sum()))
