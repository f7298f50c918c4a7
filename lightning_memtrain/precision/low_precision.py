"""The Lightning plugin."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import ref

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from lightning_memtrain.compat.lightning_packages import (
    KnownToBoth,
    in_both,
    namesake,
    package_of,
    refuse_mix,
)
from lightning_memtrain.core import TechniqueRecord
from lightning_memtrain.core.arguments.module_selectors import Selector, selector_name
from lightning_memtrain.core.technique import readable_repr
from lightning_memtrain.optimizer_steps.parameter_steps import step_parameter
from lightning_memtrain.precision.activations.activation_codec import ActivationCodec
from lightning_memtrain.precision.activations.packed_training_steps import PackedTrainingSteps
from lightning_memtrain.precision.half_precision import HalfPrecisionTraining, half_precision_training
from lightning_memtrain.precision.low_precision_validation import (
    validate_optimizer,
    validate_settings,
    validate_strategy,
)
from lightning_memtrain.precision.optimizers.grad_scaler import CappedGradScaler, HalfGradScaler, ScalerConfig
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise
from lightning_memtrain.precision.precision_settings import (
    Leave,
    PrecisionName,
    PrecisionSettings,
    WeightRounding,
)
from lightning_memtrain.precision.weights.kept_layers import NORM
from lightning_memtrain.precision.weights.model_conversion import restore_float32_

# Lightning keys a plugin's state by the name of its class, and drops it when that is another one.
_CHECKPOINT_KEY = "lightning_memtrain.precision"
_VERSION = 1


class LowPrecision(KnownToBoth, Precision, kind=Precision):
    r"""Trains with weights and gradients in 2 bytes each, and converges as in float32.

    With ``"bf16-true"`` and ``"16-true"`` weights, gradients, inputs and activations are in half precision.
    The optimizer steps in float32 on one bucket of weights at a time, and writes them back by stochastic
    rounding, which is right on average; so updates that are smaller than the distance of two neighbouring
    numbers are not lost. In float16 the loss is scaled, and steps with infinite gradients are left out.

    With ``"bf16-mixed"``, ``"16-mixed"`` and ``"32-true"`` weights stay in float32, and everything is as with
    Lightning's plugin of that name.

    Args:
        precision: of weights and activations, in Lightning's words.
        weight_rounding: how weights in half precision are written: ``"stochastic"``, or ``"nearest"``: by the
            optimizer itself, in the precision of the weights, as Lightning does it.
        keep_in_fp32: layers whose weights stay in float32: ``"norm"`` for all normalisations, names of
            layers, in which ``*`` stands for any text, names of classes, and classes.
        scaler: how the loss is scaled in float16; a :class:`ScalerConfig` with its defaults unless given,
            for ``"16-mixed"`` torch's defaults.
        activations: keep what backward needs in few bits, as :class:`CompressedActivations` does.
        cast_targets: cast targets, too. Targets are the last item of a tuple or list, and the items of a
            mapping that are named y, target or label.
        seed: of the noise for stochastic rounding, which no other generator sees.
        bucket_numel: weights that are float32 at a time during a step; a parameter with more is a bucket of
            its own. By default 1/64 of all, at least 65536.
        leave: what the model is in after a run: ``"half"``, as it was trained, or ``"float32"``: a model like
            any other, with the numbers that it was trained to, which its own code can save, load and use.
            Checkpoints of the run are in half precision in either case.

    Raises:
        ArgumentError: if an argument is out of its range.
        MisconfigurationException: before the run begins, with a strategy that casts or steps by itself
            (FSDP, DeepSpeed, XLA), or with an optimizer that cannot step so.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()
        >>> trainer = L.Trainer(
        ...     max_steps=2, plugins=[LowPrecision("bf16-true")], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(model)
        >>> model.layer.weight.dtype
        torch.bfloat16
    """

    def __init__(
        self,
        precision: PrecisionName = "bf16-true",
        weight_rounding: WeightRounding = "stochastic",
        keep_in_fp32: Sequence[Selector] = (NORM,),
        scaler: ScalerConfig | None = None,
        activations: ActivationCodec | None = None,
        cast_targets: bool = False,
        seed: int = 0,
        bucket_numel: int | None = None,
        leave: Leave = "half",
    ) -> None:
        super().__init__()
        self._settings = PrecisionSettings(
            precision,
            weight_rounding,
            keep_in_fp32,
            scaler,
            activations,
            cast_targets,
            seed,
            bucket_numel,
            leave,
        )
        validate_settings(self._settings)
        self.precision = precision
        self._noise = RoundingNoise(seed)
        self._mode = self._mode_for(None)
        self._packed = (
            None if activations is None else PackedTrainingSteps(activations, "`LowPrecision(activations)`")
        )
        self._module: ref[LightningModule] | None = None
        self._trainer: ref[Trainer] | None = None
        self._fits = False

    def _mode_for(self, like: object) -> Precision:
        """What does the work; that of mixed precision is made once the device is known."""
        if self._settings.halves_weights:
            return half_precision_training(self._settings, self._noise, like)
        return namesake(Precision, like)()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the model in place, after a last look at the strategy."""
        if isinstance(module, in_both(LightningModule)) and module._trainer is not None:
            refuse_mix("LowPrecision", module.trainer)
            validate_strategy(module.trainer.strategy)
            self._module = ref(module)  # `connect` may get it inside of DDP
        if package_of(module) not in (package_of(self._mode), None):
            self._mode = self._mode_for(module)
        return self._mode.convert_module(module)

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Refuse optimizers that cannot work, and prepare the others."""
        self._fits = bool(optimizers)
        for optimizer in optimizers:
            validate_optimizer(optimizer, self._settings)
        if self._settings.precision in ("bf16-mixed", "16-mixed"):
            device = next((p.device.type for p in model.parameters()), "cpu")
            # Anew for each fit, with a scaler whose scale is not what another fit ended with.
            mode: Any = self._mode
            if optimizers or not isinstance(mode, in_both(MixedPrecision)) or mode.device != device:
                self._mode = namesake(MixedPrecision, self._mode)(
                    self._settings.precision,
                    device,
                    None
                    if self._settings.scaler is None
                    else CappedGradScaler(device, self._settings.scaler),
                )
        module = None if self._module is None else self._module()
        if self._fits:
            self._begin_anew(None if module is None else module.trainer)
        if self._packed is not None and self._fits and module is not None:
            self._packed.begin(module, module.global_rank)
        return self._mode.connect(model, optimizers, lr_schedulers)

    def _begin_anew(self, trainer: Trainer | None) -> None:
        """Let noise begin with its first step, unless the same trainer goes on; a checkpoint comes later."""
        if trainer is None or self._trainer is None or self._trainer() is not trainer:
            self._noise.restart()
            if self._packed is not None:
                self._packed.restart()
        self._trainer = None if trainer is None else ref(trainer)

    def teardown(self) -> None:
        """Leave the optimizers as they were found, and the model in the precision that was asked for."""
        if self._packed is not None and self._fits:
            self._packed.end()
            self._packed.warn_if_useless()
        self._fits = False
        self._mode.teardown()
        module = None if self._module is None else self._module()
        if module is not None and self._settings.leave == "float32":
            restore_float32_(module)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Where weights are made."""
        return self._mode.tensor_init_context()

    def module_init_context(self) -> AbstractContextManager[Any]:
        """Where the model is made."""
        return self._mode.module_init_context()

    def forward_context(self) -> AbstractContextManager[Any]:
        """Where the model computes."""
        return self._mode.forward_context()

    @contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """Where the model trains."""
        with self._mode.train_step_context():
            yield

    def convert_input(self, data: Any) -> Any:
        """Cast a batch."""
        return self._mode.convert_input(data)

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss."""
        return self._mode.pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Forward and backward by the closure, then the step."""
        return self._mode.optimizer_step(optimizer, model=model, closure=closure, **kwargs)

    def step_parameter(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Step one parameter that has a gradient.

        See :class:`~lightning_memtrain.optimizer_steps.SupportsParameterStep`.
        """
        if isinstance(self._mode, HalfPrecisionTraining):
            self._mode.step_parameter(optimizer, parameter)
        else:
            step_parameter(optimizer, parameter)

    def clip_gradients(self, *args: Any, **kwargs: Any) -> None:
        """Clip gradients that are no longer scaled."""
        self._mode.clip_gradients(*args, **kwargs)

    @property
    def scaler(self) -> GradScaler | None:
        """The scaler of the loss, once a run with float16 has begun."""
        return getattr(self._mode, "scaler", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the scale of the loss and the state of the noise, under a key of our own."""
        state: dict[str, Any] = {"version": _VERSION, "precision": self._settings.precision}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        if self._settings.rounds_stochastically:
            state["noise"] = self._noise.state_dict()
        if self._packed is not None:
            state["activations"] = self._packed.state_dict()
        checkpoint[_CHECKPOINT_KEY] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with what was saved.

        Args:
            checkpoint: the whole of it.

        Raises:
            MisconfigurationException: if a later version of this library wrote it.
        """
        if not self._fits:
            return
        state = checkpoint.get(_CHECKPOINT_KEY, {"version": _VERSION})
        if state["version"] > _VERSION:
            raise MisconfigurationException(
                f"The state of `LowPrecision` in a checkpoint must have version {_VERSION} or less, but got "
                f"version {state['version']}. Install the lightning_memtrain that wrote it, or a later one."
            )
        missing = []
        if self.scaler is not None:
            if "scaler" in state:
                self.scaler.load_state_dict(state["scaler"])
            else:
                missing.append("the scale of the loss")
        if self._settings.rounds_stochastically:
            if "noise" in state:
                self._noise.load_state_dict(state["noise"])
            else:
                missing.append("the noise for stochastic rounding")
                if isinstance(self._mode, HalfPrecisionTraining):
                    self._mode.upcast_loaded_state()
        if self._packed is not None:
            # Only noise is lost, and only if there is any, so this is not worth a warning.
            self._packed.load_state_dict(state.get("activations", {"num_packed": 0}))
        if missing:
            warnings.warn(
                f"The checkpoint was written without `LowPrecision(precision={self._settings.precision!r})`, "
                f"so {' and '.join(missing)} start afresh. Resume with the plugin and the precision that it "
                "was written with, or go on if the change is intended.",
                stacklevel=2,
            )

    @property
    def exact(self) -> bool:
        """Whether results are those of float32."""
        return self._settings.precision == "32-true" and self._packed is None

    __repr__ = readable_repr

    def technique_record(self) -> TechniqueRecord:
        """PrecisionSettings in force, and how many steps were left out."""
        settings = self._settings
        shown: dict[str, Any] = {"precision": settings.precision}
        if settings.halves_weights:
            shown |= {
                "weight_rounding": settings.weight_rounding,
                "keep_in_fp32": ", ".join(map(selector_name, settings.keep_in_fp32)) or None,
            }
        if settings.leave != "half":
            shown["leave"] = settings.leave
        skipped = self.scaler.num_skipped if isinstance(self.scaler, HalfGradScaler) else 0
        events: tuple[str, ...] = (f"{skipped} steps left out for infinite gradients",) if skipped else ()
        if isinstance(self._mode, HalfPrecisionTraining):
            events += self._mode.events
        if self._packed is not None:
            shown |= {f"activations_{name}": value for name, value in self._packed.settings.items()}
            events += self._packed.events
        return TechniqueRecord("LowPrecision", shown, events)
