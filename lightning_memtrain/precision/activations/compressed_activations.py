"""The callback that keeps activations in few bits while a model trains."""

from __future__ import annotations

from typing import Any
from weakref import ref

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memtrain.compat.lightning_packages import refuse_mix
from lightning_memtrain.core import TechniqueRecord
from lightning_memtrain.core.technique import readable_repr
from lightning_memtrain.precision.activations.activation_codec import ActivationCodec, validate_codec
from lightning_memtrain.precision.activations.packed_training_steps import PackedTrainingSteps


class CompressedActivations(Callback):
    """Keeps activations for backward in few bits, in training only.

    Each call of ``training_step`` runs in the codec's context; nothing else changes. The context is outside
    of all activation checkpointing, whose inputs are then packed, and inside of microbatching.

    :class:`~lightning_memtrain.LowPrecision` takes the same codec as an argument; beside it, or beside one of
    Lightning's precisions, this callback does the same.

    Args:
        codec: how to pack; ``None`` for 8 bits.

    Raises:
        ArgumentError: if ``codec`` is something else.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = CompressedActivations(ActivationCodec(bits=4, group_size=8, min_numel=8))
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
        codec = ActivationCodec() if codec is None else codec
        validate_codec("CompressedActivations(codec)", codec)
        self._training = PackedTrainingSteps(codec, "`CompressedActivations`")
        self._trainer: ref[Trainer] | None = None

    @property
    def codec(self) -> ActivationCodec:
        """How activations are packed."""
        return self._training.codec

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin anew with another trainer, before a checkpoint is restored."""
        refuse_mix("CompressedActivations", trainer)
        if stage == "fit" and (self._trainer is None or self._trainer() is not trainer):
            self._trainer = ref(trainer)
            self._training.restart()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the context around ``training_step``; the model is complete by now."""
        self._training.begin(pl_module, trainer.global_rank)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if it was of no use."""
        self._training.warn_if_useless()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the model as it was found: after an error Lightning calls no ``teardown``."""
        self._training.end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self._training.end()

    def state_dict(self) -> dict[str, int]:
        """Where the noise of stochastic rounding is."""
        return self._training.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the noise of an interrupted run."""
        self._training.load_state_dict(state_dict)

    @property
    def exact(self) -> bool:
        """Whether gradients are exact, which rounded activations never give."""
        return False

    __repr__ = readable_repr

    def technique_record(self) -> TechniqueRecord:
        """What the memory report says of it."""
        return TechniqueRecord("CompressedActivations", self._training.settings, self._training.events)
