"""The callback that keeps activations in few bits while a model trains."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memtrain.core import NoEffectWarning, TechniqueRecord, format_bytes
from lightning_memtrain.core.technique import Setting
from lightning_memtrain.techniques.precision.activation_codec import ActivationCodec
from lightning_memtrain.techniques.precision.activation_packing import ActivationPacking, PackedBytes

_STEP = "training_step"


class CompressedActivations(Callback):
    """Keeps activations for backward in few bits, in training only.

    Each call of ``training_step`` runs in the codec's context; nothing else changes. The context is outside
    of all activation checkpointing, whose inputs are then packed, and inside of microbatching.

    Args:
        codec: how to pack; ``None`` for 8 bits.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = CompressedActivations(ActivationCodec(bits=4, group=8, min_numel=8))
        >>> trainer = L.Trainer(
        ...     max_steps=2, callbacks=[callback], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(BoringModel())
        >>> trainer.global_step
        2
    """

    def __init__(self, codec: ActivationCodec | None = None) -> None:
        super().__init__()
        self.codec = ActivationCodec() if codec is None else codec
        self._state: dict[str, int] = {"num_packed": 0}
        self._packing: ActivationPacking | None = None
        self._undo: Callable[[], None] | None = None
        self._largest = PackedBytes()
        self._num_steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run packed."""
        if stage == "fit":
            self._largest, self._num_steps = PackedBytes(), 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the context around ``training_step``; the model is complete by now."""
        self._packing = self.codec.packing(pl_module, trainer.global_rank)
        self._packing.load_state_dict(self._state)
        self._undo = _wrap(pl_module, _PackedStep(pl_module.training_step, self._packing, self._note))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if it was of no use."""
        if self._num_steps > 0 and self._largest.num_tensors == 0:
            warnings.warn(
                "`CompressedActivations` packed nothing, since every tensor that was saved for backward is a "
                "parameter, no floating-point number of at most 32 bits, or has fewer than "
                f"min_numel={self.codec.min_numel} elements. Remove it, or lower "
                "`ActivationCodec(min_numel)`.",
                NoEffectWarning,
                stacklevel=2,
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found: after an error Lightning calls no ``teardown``."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self._state = self.state_dict()
        if self._undo is not None:
            self._undo()
        self._undo = self._packing = None

    def state_dict(self) -> dict[str, int]:
        """Where the noise of stochastic rounding is."""
        return dict(self._state) if self._packing is None else self._packing.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the noise of an interrupted run."""
        self._state = dict(state_dict)
        if self._packing is not None:
            self._packing.load_state_dict(self._state)

    @property
    def exact(self) -> bool:
        """Gradients are rounded."""
        return False

    def technique_record(self) -> TechniqueRecord:
        """What the memory report says of it."""
        codec, largest = self.codec, self._largest
        settings: dict[str, Setting] = {
            "bits": codec.bits,
            "group": codec.numbers_per_group,
            "min_numel": codec.min_numel,
            "stochastic": codec.stochastic,
        }
        if codec.stochastic:
            settings["seed"] = codec.seed
        events: tuple[str, ...] = ()
        if largest.num_tensors:
            events = (
                f"kept {largest.num_tensors} tensors of {format_bytes(largest.saved_bytes)} in "
                f"{format_bytes(largest.stored_bytes)} (largest training step)",
            )
        return TechniqueRecord("CompressedActivations", settings, events)

    def _note(self, packed: PackedBytes) -> None:
        self._num_steps += 1
        if packed.saved_bytes > self._largest.saved_bytes:
            self._largest = packed


class _PackedStep:
    """Stands in for a model's ``training_step``."""

    def __init__(
        self, step: Callable[..., Any], packing: ActivationPacking, note: Callable[[PackedBytes], None]
    ) -> None:
        functools.update_wrapper(self, step)  # Lightning looks at the signature
        self._step = step
        self._packing = packing
        self._note = note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._packing.spare((args, kwargs))
        with self._packing:
            result = self._step(*args, **kwargs)
        self._note(self._packing.last)
        return result

    # A copy of the model trains as it would without: its step would otherwise run the original's.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._step, memo)

    def __reduce__(self) -> Any:
        return _itself, (self._step,)


def _itself(step: Callable[..., Any]) -> Callable[..., Any]:
    return step


def _wrap(model: LightningModule, step: _PackedStep) -> Callable[[], None]:
    before = model.__dict__.get(_STEP)
    model.training_step = step  # type: ignore[method-assign]

    def undo() -> None:
        if model.__dict__.get(_STEP) is not step:
            return
        del model.__dict__[_STEP]
        if before is not None:
            model.__dict__[_STEP] = before

    return undo
