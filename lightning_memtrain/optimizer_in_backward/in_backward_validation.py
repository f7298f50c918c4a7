"""Runs in which stepping during backward would go wrong, each with the reason and a way out."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer

from lightning_memtrain.compat.lightning_packages import namesake, overrides
from lightning_memtrain.compat.lightning_private import ddp_options, has_comm_hook
from lightning_memtrain.optimizer_in_backward.gradient_accumulation import (
    Accumulation,
    suggested_accumulation,
)
from lightning_memtrain.optimizer_steps import SupportsParameterStep, why_no_partial_steps

_STRATEGIES = {"SingleDeviceStrategy", "DDPStrategy"}
# Subclasses of these that leave less to us.
_FOREIGN_STRATEGIES = {"DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"}
_SEES_ALL_GRADIENTS = ("on_after_backward", "on_before_optimizer_step")


def validate_model(model: LightningModule, *, two_pass: bool, hooks_without_gradients: bool) -> None:
    """Refuse models that have a hand in what happens between backward and step.

    Args:
        model: the module that is trained.
        two_pass: whether backward is to run twice.
        hooks_without_gradients: whether hooks may be called when gradients are gone.

    Raises:
        MisconfigurationException: naming the method.
    """
    if not model.automatic_optimization:
        raise MisconfigurationException(
            "`OptimizerInBackward` needs automatic optimization, but got a model with "
            "automatic_optimization=False, whose `training_step` steps the optimizer itself. "
            "Return the loss and let Lightning optimize."
        )
    if overrides(model, "optimizer_step"):
        raise MisconfigurationException(
            "`OptimizerInBackward` steps during backward, but got a model that overrides `optimizer_step`, "
            "which could no longer decide about it. Leave it out; use a scheduler to warm up a learning rate."
        )
    if overrides(model, "configure_gradient_clipping"):
        raise MisconfigurationException(
            "`OptimizerInBackward` never has all gradients at once, but got a model that overrides "
            "`configure_gradient_clipping`. Use Trainer(gradient_clip_val=...) instead."
        )
    if two_pass and overrides(model, "backward"):
        raise MisconfigurationException(
            '`OptimizerInBackward(clip_by_norm="two_pass")` runs backward twice, but got a model that '
            "overrides `backward`. Leave it out, or clip by value."
        )
    for name in () if hooks_without_gradients else _SEES_ALL_GRADIENTS:
        if overrides(model, name):
            raise _hook_error(name, "a model")


def validate_callbacks(trainer: Trainer, *, hooks_without_gradients: bool) -> None:
    """Refuse callbacks that need what is not there.

    Args:
        trainer: the trainer that is about to fit.
        hooks_without_gradients: whether hooks may be called when gradients are gone.

    Raises:
        MisconfigurationException: naming the callback.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if getattr(callback, "repeats_backward", False):
            raise MisconfigurationException(
                "`OptimizerInBackward` needs that each batch is run once, but got "
                f"{type(callback).__name__} with settings by which it may run a batch again, when weights "
                'have changed already (microbatch_size="auto", batchnorm="synchronized"). '
                "Give a fixed size and batchnorm='pooled'."
            )
        if hooks_without_gradients or type(callback).__module__.startswith("lightning_memtrain."):
            continue
        for name in _SEES_ALL_GRADIENTS:
            if overrides(callback, name):
                raise _hook_error(name, type(callback).__name__)


def validate_run(
    trainer: Trainer, optimizers: list[Optimizer], accumulation: Accumulation | None, clip_by_norm: str | None
) -> None:
    """Refuse strategies, precisions, optimizers and settings of the trainer.

    Args:
        trainer: the trainer that is about to fit; its strategy is set up.
        optimizers: the run's.
        accumulation: how gradients are accumulated.
        clip_by_norm: how gradients are clipped by norm.

    Raises:
        MisconfigurationException: naming what is in the way.
    """
    if len(optimizers) != 1:
        raise MisconfigurationException(
            f"`OptimizerInBackward` needs one optimizer, but `configure_optimizers` returned "
            f"{len(optimizers)}. Use one with several parameter groups."
        )
    optimizer = optimizers[0]
    if reason := why_no_partial_steps(optimizer):
        raise MisconfigurationException(
            "`OptimizerInBackward` needs an optimizer that steps without evaluating the model, but got "
            f"{type(optimizer).__name__}: {reason}. Use another optimizer."
        )
    _validate_strategy(trainer, accumulation)
    _validate_precision(trainer)
    if accumulation is not None:
        accumulation.check(optimizer)
    elif trainer.accumulate_grad_batches > 1:
        raise accumulation_error(optimizer, f"accumulate_grad_batches={trainer.accumulate_grad_batches}")
    clips = bool(trainer.gradient_clip_val)
    if clips and accumulation is not None:
        raise MisconfigurationException(
            f"`OptimizerInBackward(accumulation={accumulation!r})` cannot clip, since the sum of the "
            f"gradients never exists, but got gradient_clip_val={trainer.gradient_clip_val}. "
            "Leave out one of them."
        )
    by_value = trainer.gradient_clip_algorithm == "value"
    if clips and not by_value and clip_by_norm is None:
        raise MisconfigurationException(
            "`OptimizerInBackward` never has all gradients at once, whose norm "
            f"gradient_clip_val={trainer.gradient_clip_val} needs. "
            'Give `OptimizerInBackward(clip_by_norm="two_pass")`, which runs backward twice, or '
            'Trainer(gradient_clip_algorithm="value").'
        )


def accumulation_error(optimizer: Optimizer, got: str) -> MisconfigurationException:
    """The error for gradients of several backwards where nothing was chosen that accumulates them.

    Args:
        optimizer: the run's.
        got: what accumulates.

    Returns:
        The error.
    """
    choice = suggested_accumulation(optimizer)
    cure = "Leave out one of them" if choice is None else f"Choose `OptimizerInBackward({choice})`"
    return MisconfigurationException(
        f"`OptimizerInBackward` frees each gradient at once, so {type(optimizer).__name__} cannot accumulate "
        f"them, but got {got}. {cure}."
    )


def _hook_error(name: str, owner: str) -> MisconfigurationException:
    return MisconfigurationException(
        f"`OptimizerInBackward` has freed all gradients when `{name}` is called, but got {owner} that "
        "overrides it. Look at gradients in `Tensor.register_hook` of each parameter; "
        "or, if it looks at none, give OptimizerInBackward(hooks_without_gradients=True)."
    )


def validate_no_comm_hook(strategy: Strategy) -> None:
    """Refuse a hook that gets whole buckets of gradients; it may be put on DDP's wrapper at any time.

    Args:
        strategy: the run's.

    Raises:
        MisconfigurationException: if there is one.
    """
    if has_comm_hook(strategy):
        raise MisconfigurationException(
            "`OptimizerInBackward` averages gradients over ranks one by one, but got a communication hook "
            "(DDPStrategy(ddp_comm_hook=...) or register_comm_hook), which works on buckets of gradients. "
            "Leave it out."
        )


def _validate_strategy(trainer: Trainer, accumulation: Accumulation | None) -> None:
    strategy = trainer.strategy
    names = {kind.__name__ for kind in type(strategy).__mro__}
    if not names & _STRATEGIES or names & _FOREIGN_STRATEGIES:
        raise MisconfigurationException(
            "`OptimizerInBackward` needs a strategy that leaves gradients and steps to it, but got "
            f"{type(strategy).__name__}, which shards or steps by itself. Train with ddp or on one device."
        )
    if trainer.world_size == 1:
        return
    validate_no_comm_hook(strategy)
    reason = None
    options = ddp_options(strategy)
    for option in ("find_unused_parameters", "static_graph"):
        if options.get(option):
            reason = f"{option}=True: all parameters must get a gradient on every rank. Leave it out"
    if accumulation is not None and not accumulation.exact:
        reason = (
            f"accumulation={accumulation!r}, by which each rank would have another optimizer state. "
            "Use one microbatch"
        )
    if reason is not None:
        raise MisconfigurationException(
            f"`OptimizerInBackward` averages gradients over ranks one by one, but got {reason}."
        )


def _validate_precision(trainer: Trainer) -> None:
    plugin: Any = trainer.precision_plugin
    if getattr(plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "`OptimizerInBackward` cannot take a step back when a later gradient turns out to be infinite, "
            f"but got {type(plugin).__name__} with a loss scaler. Use bfloat16, e.g. precision='bf16-mixed' "
            "or LowPrecision('bf16-true')."
        )
    if isinstance(plugin, SupportsParameterStep):
        return
    kinds = [namesake(kind, like=plugin) for kind in (Precision, MixedPrecision)]
    if type(plugin).optimizer_step not in [kind.optimizer_step for kind in kinds]:
        raise MisconfigurationException(
            f"`OptimizerInBackward` needs a precision plugin that steps as Lightning's do, but got "
            f"{type(plugin).__name__}, which overrides `optimizer_step`. "
            "Give it a method `step_parameter(optimizer, parameter)`."
        )
