"""A codec around every call of a model's ``training_step``, for one run after the other."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule

from lightning_memtrain.compat import wrap_training_step
from lightning_memtrain.core import NoEffectWarning, Setting, format_bytes
from lightning_memtrain.precision.activations.activation_codec import ActivationCodec
from lightning_memtrain.precision.activations.activation_packing import ActivationPacking, PackedBytes


class PackedTrainingSteps:
    """Packs what training steps save.

    It goes around ``training_step``, not around all that Lightning's ``train_step_context`` is around, since
    that does not know the batch, which is not packed.

    Args:
        codec: how to pack.
        owner: what the user wrote, for messages.
    """

    def __init__(self, codec: ActivationCodec, owner: str) -> None:
        self.codec = codec
        self._owner = owner
        self._state: dict[str, int] = {"num_packed": 0}
        self._packing: ActivationPacking | None = None
        self._undo: Callable[[], None] | None = None
        self._largest = PackedBytes()
        self._num_steps = 0

    def restart(self) -> None:
        """Begin with the first noise, for a run that does not go on with another one."""
        self._state = {"num_packed": 0}

    def begin(self, model: LightningModule, rank: int) -> None:
        """Put the codec around the steps of a model, which is complete by now.

        Args:
            model: that is trained from now on.
            rank: of this process.
        """
        self.end()
        self._largest, self._num_steps = PackedBytes(), 0
        packing = self._packing = self.codec.packing(model, rank)
        packing.load_state_dict(self._state)

        def around(step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            packing.exclude((args, kwargs))
            with packing:
                result = step(*args, **kwargs)
            self._num_steps += 1
            if packing.last.saved_bytes > self._largest.saved_bytes:
                self._largest = packing.last
            return result

        self._undo = wrap_training_step(model, around)

    def end(self) -> None:
        """Leave the model as it was found."""
        self._state = self.state_dict()
        if self._undo is not None:
            self._undo()
        self._undo = self._packing = None

    def warn_if_useless(self) -> None:
        """Say if nothing was packed."""
        if self._num_steps > 0 and self._largest.num_tensors == 0:
            warnings.warn(
                f"{self._owner} packed nothing, since every tensor that was saved for backward is a "
                "parameter or buffer, a part of the batch, which the trainer keeps in any case, no "
                "floating-point number of at most 32 bits, or has fewer than "
                f"min_numel={self.codec.min_numel} elements. Remove it, or lower "
                "`ActivationCodec(min_numel)`.",
                NoEffectWarning,
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, int]:
        """Where the noise of stochastic rounding is."""
        return dict(self._state) if self._packing is None else self._packing.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with the noise of an interrupted run."""
        self._state = dict(state_dict)
        if self._packing is not None:
            self._packing.load_state_dict(self._state)

    @property
    def settings(self) -> dict[str, Setting]:
        """What a report says of the codec."""
        codec = self.codec
        settings: dict[str, Setting] = {
            "bits": codec.bits,
            "group_size": codec.resolved_group_size,
            "min_numel": codec.min_numel,
            "stochastic": codec.stochastic,
        }
        if codec.stochastic:
            settings["seed"] = codec.seed
        return settings

    @property
    def events(self) -> tuple[str, ...]:
        """What a report says of the run."""
        largest = self._largest
        if not largest.num_tensors:
            return ()
        return (
            f"kept {largest.num_tensors} tensors of {format_bytes(largest.saved_bytes)} in "
            f"{format_bytes(largest.stored_bytes)} (largest training step)",
        )
