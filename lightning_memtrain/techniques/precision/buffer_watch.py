"""Buffers in half precision that training changes, by whatever code."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from weakref import ref

import torch
from torch import Tensor

from lightning_memtrain.techniques.precision.conversion import BufferPlace
from lightning_memtrain.techniques.precision.settings import Settings, written_names

# Training steps in which a buffer that changes at all has changed.
_NUM_STEPS = 8


class BufferWatch:
    """Warns of buffers that the first training steps change, though the text of the model does not say so.

    Args:
        buffers: that were cast to half precision.
        settings: of the plugin.
    """

    def __init__(self, buffers: Iterable[BufferPlace], settings: Settings) -> None:
        self._settings = settings
        self._steps_left = _NUM_STEPS
        self._watched = {
            found.place: (ref(found.layer), found.name, *_state_of(getattr(found.layer, found.name)))
            for found in buffers
        }

    def after_step(self) -> None:
        """Look at the buffers."""
        if not self._steps_left or not self._watched:
            return
        self._steps_left -= 1
        changed = []
        for place, (layer_ref, name, version, total) in list(self._watched.items()):
            layer = layer_ref()
            buffer = getattr(layer, name, None)
            if buffer is None or buffer._version == version:
                continue
            # Written to with the same numbers: DistributedDataParallel sends buffers to all ranks.
            now = _state_of(buffer)
            if now[1] == total:
                self._watched[place] = layer_ref, name, *now
            else:
                changed.append(place)
                del self._watched[place]
        if changed:
            layers = [place.rpartition(".")[0] for place in changed]
            cure = "put them into a layer of their own, and name it in `LowPrecision(keep_fp32)`"
            if all(layers):
                keep = written_names((*self._settings.keep_fp32, *dict.fromkeys(layers)))
                cure = f"keep their layers in float32 by `LowPrecision(keep_fp32={keep})`"
            warnings.warn(
                f"`LowPrecision` keeps the buffers {', '.join(map(repr, changed))} in half precision, and "
                "training changes them. If they count or average, which is lost in half precision, "
                f"{cure}.",
                stacklevel=2,
            )


def _state_of(buffer: Tensor | None) -> tuple[int, float]:
    if buffer is None or buffer.is_meta:
        return -1, 0.0
    # Weighted by the place, so that numbers that change places show.
    flat = buffer.detach().reshape(-1)
    return buffer._version, float(
        torch.dot(flat.float(), torch.linspace(1, 2, flat.numel(), device=flat.device))
    )
