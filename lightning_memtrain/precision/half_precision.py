"""Training whose weights and gradients are in half precision."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_memtrain.compat.lightning_packages import in_both, namesake
from lightning_memtrain.compat.lightning_private import DtypeContextManager, after_closure
from lightning_memtrain.optimizer_steps.closures import EvaluatedClosure, EvaluatesModelError, takes_closure
from lightning_memtrain.optimizer_steps.parameter_steps import step_parameter
from lightning_memtrain.precision.batch_casting import cast_batch
from lightning_memtrain.precision.low_precision_validation import evaluates_model_error
from lightning_memtrain.precision.optimizers.bucketed_step import BucketedStep
from lightning_memtrain.precision.optimizers.grad_scaler import HalfGradScaler, ScalerConfig
from lightning_memtrain.precision.optimizers.stochastic_rounding import RoundingNoise
from lightning_memtrain.precision.precision_settings import PrecisionSettings
from lightning_memtrain.precision.weights.buffer_watch import BufferWatch
from lightning_memtrain.precision.weights.converted_buffers import NamedBuffer
from lightning_memtrain.precision.weights.half_precision_errors import name_layers_in_errors
from lightning_memtrain.precision.weights.model_conversion import convert_to_low_precision_

# From here on, gradients that are added up in bfloat16 are off by about 1 %.
_MANY_BACKWARDS = 64


if TYPE_CHECKING:
    _Base = Precision
else:
    _Base = object


def half_precision_training(
    settings: PrecisionSettings, noise: RoundingNoise, like: object = None
) -> HalfPrecisionTraining:
    """What does the work for trainers of one of the packages that Lightning goes by.

    Args:
        settings: of the plugin.
        noise: for stochastic rounding.
        like: a trainer or module of the package; that of ``lightning`` without one.

    Returns:
        A ``Precision`` of the package, whose methods look for modules of the same.
    """
    kind: type[HalfPrecisionTraining] = type(
        "HalfPrecisionTraining", (HalfPrecisionTraining, namesake(Precision, like)), {}
    )
    return kind(settings, noise)


class HalfPrecisionTraining(_Base):
    """Lightning's half precision with a loss scaler, layers kept in float32, and steps in float32.

    To be derived from together with the ``Precision`` of a package, see :func:`half_precision_training`.

    Args:
        settings: of the plugin.
        noise: for stochastic rounding.
    """

    def __init__(self, settings: PrecisionSettings, noise: RoundingNoise) -> None:
        self.precision = settings.precision
        self.scaler: HalfGradScaler | None = None
        self._settings = settings
        self._noise = noise
        self._steps: dict[Optimizer, BucketedStep] = {}
        self._model: weakref.ref[nn.Module] | None = None
        self._kept_buffers: list[NamedBuffer] = []
        self._watch: BufferWatch | None = None
        self._num_backwards = 0
        self._steps_now = False
        self._events: tuple[str, ...] = ()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Cast the weights in place."""
        buffers = convert_to_low_precision_(module, self._settings.dtype, self._settings.keep_in_fp32)
        self._model = weakref.ref(module)
        self._kept_buffers = buffers.kept
        self._watch = BufferWatch(buffers.unclear, self._settings.keep_in_fp32)
        return module

    def convert_input(self, data: Any) -> Any:
        """Cast the inputs of a batch."""
        return cast_batch(data, self._settings.dtype, self._settings.cast_targets)

    def tensor_init_context(self) -> AbstractContextManager[Any]:
        """Make weights in half precision at once, unless some are to stay in float32.

        Those would lose the digits that a checkpoint, which is loaded before the conversion, has of them.
        """
        if self._settings.keep_in_fp32:
            return nullcontext()
        return DtypeContextManager(self._settings.dtype)

    def module_init_context(self) -> AbstractContextManager[Any]:
        """See :meth:`tensor_init_context`."""
        return self.tensor_init_context()

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        """Make half precision the default dtype, as Lightning's half precision does."""
        model = None if self._model is None else self._model()
        names = (
            nullcontext()
            if model is None
            else name_layers_in_errors(
                model, self._settings.keep_in_fp32, self._settings.cast_targets, self._kept_buffers
            )
        )
        with names, DtypeContextManager(self._settings.dtype):
            yield

    @contextmanager
    def train_step_context(self) -> Generator[None, None, None]:
        """Look whether a training step changes a buffer that half precision may spoil."""
        watch = nullcontext() if self._watch is None else self._watch.watch_step()
        with watch, self.forward_context():
            yield

    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        """Prepare the scaler and the steps, once the model is on its device."""
        device = next((p.device.type for p in model.parameters()), "cpu")
        # Anew for each fit: the scale another ended with may be of no use. Evaluation leaves it be.
        if self._settings.precision == "16-true" and optimizers:
            self.scaler = HalfGradScaler(device, self._settings.scaler or ScalerConfig())
        self.teardown()
        self._events = ()
        self._num_backwards = 0
        if self._settings.rounds_stochastically:
            for optimizer in optimizers:
                self._bucketed(optimizer)
        return model, optimizers, lr_schedulers

    def upcast_loaded_state(self) -> None:
        """Expect state of a run whose steps were in half precision: it becomes float32 when it is loaded."""
        for step in self._steps.values():
            step.upcast_loaded_state()

    def teardown(self) -> None:
        """Take all hooks off the optimizers."""
        self._events = self.events
        for step in self._steps.values():
            step.close()
        self._steps.clear()

    @property
    def events(self) -> tuple[str, ...]:
        """What a report says of the last run's steps."""
        return (*self._events, *(event for step in self._steps.values() for event in step.events))

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Scale the loss, in float32: in float16 a loss above 2 times 32768 would be infinite."""
        self._num_backwards += 1
        if self._num_backwards == _MANY_BACKWARDS + 1 and self._settings.precision == "bf16-true":
            warnings.warn(
                "`LowPrecision(precision='bf16-true')` adds up gradients in bfloat16, whose error grows with "
                f"their number, but one step is made of more than {_MANY_BACKWARDS} backward passes: about "
                "1 % of the gradient. Accumulate fewer batches, use larger microbatches, or use '16-true', "
                "whose error is an eighth.",
                stacklevel=2,
            )
        if self.scaler is not None:
            if self.scaler.awaits_step:
                raise RuntimeError(
                    "`LowPrecision(precision='16-true')` needs `clip_gradients`, which takes the scale of "
                    "the loss off the gradients, to be followed by that optimizer's step, but got a "
                    "backward, whose gradients are scaled. Clip after the last backward before "
                    "`optimizer.step()`."
                )
            tensor = self.scaler.scale(tensor.float())
        return super().pre_backward(tensor, module)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Optimizer, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Forward and backward by the closure, then unscale, clip and step."""
        if self.scaler is None and not self._settings.rounds_stochastically:
            result = super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
            self._num_backwards = 0
            return result
        result = closure()
        self._num_backwards = 0
        # In automatic optimization this means that there was no backward; else it always is None.
        without_backward = result is None and model.automatic_optimization
        scaler = None if without_backward else self.scaler
        if scaler is not None:
            scaler.unscale_once_(optimizer)
        self._steps_now = True
        try:
            after_closure(self)(model, optimizer)
        finally:
            self._steps_now = False
        if self._settings.rounds_stochastically:
            step: Callable[[], Any] = partial(self._bucketed(optimizer).step, result, **kwargs)
        else:
            step = partial(self._step_evaluated, optimizer, result, kwargs)
        if scaler is not None:
            scaler.step_if_finite(optimizer, step)
            scaler.update()
        elif self.scaler is None:
            step()
        return result

    def _step_evaluated(self, optimizer: Optimizer, result: Any, kwargs: dict[str, Any]) -> Any:
        """Step an optimizer whose model has been evaluated, and give it what that returned if it asks."""
        if takes_closure(optimizer):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            kwargs = {**kwargs, "closure": EvaluatedClosure(result, parameters)}
        try:
            return optimizer.step(**kwargs)
        except EvaluatesModelError as error:
            raise evaluates_model_error(optimizer, self._settings, str(error)) from error

    def step_parameter(self, optimizer: Optimizer, parameter: Tensor) -> None:
        """Step one parameter as :meth:`optimizer_step` would."""
        if self._settings.rounds_stochastically:
            self._bucketed(optimizer).step_parameter(parameter)
        else:
            step_parameter(optimizer, parameter)

    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Clip gradients that are not scaled: in manual optimization this comes before the step."""
        if isinstance(optimizer, in_both(LightningOptimizer)):
            optimizer = optimizer.optimizer
        if clip_val > 0 and self.scaler is not None and not self._steps_now:
            self.scaler.unscale_once_(optimizer)
        super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)

    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip by a norm that is computed in float32, where it neither overflows nor loses digits."""
        gradients = [p.grad for p in self.main_params(optimizer) if p.grad is not None]
        if not gradients:
            return
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32).to(gradients[0].device) for g in gradients]
        factor = (clip_val / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.to(gradient.device))

    def _bucketed(self, optimizer: Optimizer) -> BucketedStep:
        if optimizer not in self._steps:
            numel = self._settings.bucket_numel
            self._steps[optimizer] = BucketedStep(optimizer, self._noise, numel)
        return self._steps[optimizer]
