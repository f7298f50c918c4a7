"""Runs that low precision would spoil, each with the reason and a way out."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.module_selectors import as_selectors
from lightning_memtrain.optimizer_steps.closures import needs_closure
from lightning_memtrain.precision.activations.activation_codec import is_int, validate_codec
from lightning_memtrain.precision.optimizers.grad_scaler import ScalerConfig
from lightning_memtrain.precision.precision_settings import (
    Leave,
    PrecisionName,
    PrecisionSettings,
    WeightRounding,
)
from lightning_memtrain.precision.weights.kept_layers import NORM

# The smallest positive number of float16 is 6e-8; half of it is rounded to 0.
_SMALLEST_EPS = 2.0**-25
_SENSIBLE_EPS = 1e-4
_FOREIGN_STRATEGIES = {
    "FSDPStrategy": "FSDPPrecision",
    "ModelParallelStrategy": "Trainer(precision=...)",
    "DeepSpeedStrategy": "DeepSpeed's own fp16 or bf16 section",
    "XLAStrategy": "XLAPrecision",
    "SingleDeviceXLAStrategy": "XLAPrecision",
}


def validate_settings(settings: PrecisionSettings) -> None:
    """Refuse arguments that are out of their range or contradict each other.

    Args:
        settings: of the plugin.

    Raises:
        ArgumentError: naming the argument.
    """
    _check_choice("precision", settings.precision, get_args(PrecisionName))
    _check_choice("weight_rounding", settings.weight_rounding, get_args(WeightRounding))
    _check_choice("leave", settings.leave, get_args(Leave))
    cure = 'Write it as a tuple, e.g. ("norm", "head").'
    as_selectors("LowPrecision", cure, least=0, keep_in_fp32=settings.keep_in_fp32)
    if settings.scaler is not None and not isinstance(settings.scaler, ScalerConfig):
        raise ArgumentError(
            "`LowPrecision(scaler)` must be a ScalerConfig or None, but got "
            f"scaler={settings.scaler!r}. Write e.g. ScalerConfig(init_scale=1024.0)."
        )
    if settings.activations is not None:
        validate_codec("LowPrecision(activations)", settings.activations)
    if not isinstance(settings.cast_targets, bool):
        raise ArgumentError(
            "`LowPrecision(cast_targets)` must be True or False, but got "
            f"cast_targets={settings.cast_targets!r}. Use one of them."
        )
    if not is_int(settings.seed):
        raise ArgumentError(
            f"`LowPrecision(seed)` must be an integer, but got seed={settings.seed!r}. Leave it out for 0."
        )
    if settings.scaler is not None and not settings.precision.startswith("16"):
        raise ArgumentError(
            "`LowPrecision(scaler)` needs precision='16-true' or '16-mixed', the formats with small "
            f"exponents, but got precision={settings.precision!r}. Leave out the scaler."
        )
    numel = settings.bucket_numel
    if numel is not None and (not is_int(numel) or numel < 1):
        raise ArgumentError(
            "`LowPrecision(bucket_numel)` must be a number of weights of at least 1, but got "
            f"bucket_numel={numel!r}. Leave it out for 1/64 of the weights."
        )
    _refuse_without_effect(settings)


def _refuse_without_effect(settings: PrecisionSettings) -> None:
    precision = f"precision={settings.precision!r}"
    if not settings.halves_weights:
        for name, unused in (
            ("keep_in_fp32", tuple(settings.keep_in_fp32) != (NORM,)),
            ("cast_targets", settings.cast_targets),
            ("leave", settings.leave != "half"),
        ):
            if unused:
                raise ArgumentError(
                    f"`LowPrecision({name})` needs precision='bf16-true' or '16-true', where weights and "
                    f"batches are cast, but got {name}={getattr(settings, name)!r} and {precision}. "
                    "Leave it out."
                )
    if settings.bucket_numel is not None and not settings.rounds_stochastically:
        raise ArgumentError(
            "`LowPrecision(bucket_numel)` needs weights that are rounded stochastically, since only these "
            f"are stepped by the bucket, but got bucket_numel={settings.bucket_numel}, {precision} and "
            f"weight_rounding={settings.weight_rounding!r}. Leave it out."
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ArgumentError(
            f"`LowPrecision({name})` must be one of {expected}, but got {name}={value!r}. Use one of them."
        )


def validate_strategy(strategy: Any) -> None:
    """Refuse strategies that cast or step by themselves.

    Args:
        strategy: the trainer's.

    Raises:
        MisconfigurationException: naming the strategy.
    """
    for kind in type(strategy).__mro__:
        if kind.__name__ in _FOREIGN_STRATEGIES:
            raise MisconfigurationException(
                "`LowPrecision` needs a strategy that leaves weights and steps to the precision plugin, but "
                f"got {type(strategy).__name__}. Use {_FOREIGN_STRATEGIES[kind.__name__]} instead, or train "
                "with ddp or on one device."
            )


def validate_optimizer(optimizer: Optimizer, settings: PrecisionSettings) -> None:
    """Refuse optimizers whose arithmetic fails in the chosen precision.

    Args:
        optimizer: one of the run's.
        settings: of the plugin.

    Raises:
        MisconfigurationException: naming the optimizer.
    """
    if settings.precision.startswith("16") and needs_closure(optimizer):
        raise evaluates_model_error(optimizer, settings, "it calls a closure")
    if settings.precision != "16-true" or settings.rounds_stochastically or not _is_native(optimizer):
        return
    for group in optimizer.param_groups:
        eps = group.get("eps")
        if not isinstance(eps, float) or eps >= _SENSIBLE_EPS:
            continue
        if eps <= _SMALLEST_EPS:
            raise MisconfigurationException(
                "`LowPrecision(precision='16-true', weight_rounding='nearest')` lets the optimizer compute "
                f"in float16, where eps={eps:g} of {type(optimizer).__name__} becomes 0 and weights become "
                "NaN. Use weight_rounding='stochastic', whose steps are computed in float32, or eps=1e-4."
            )
        warnings.warn(
            "`LowPrecision(precision='16-true', weight_rounding='nearest')` lets the optimizer compute in "
            f"float16, where eps={eps:g} of {type(optimizer).__name__} is too small to keep its steps from "
            "becoming very large. Use weight_rounding='stochastic', or eps=1e-4.",
            stacklevel=2,
        )


def evaluates_model_error(
    optimizer: Optimizer, settings: PrecisionSettings, how: str
) -> MisconfigurationException:
    """The error for an optimizer that evaluates the model during a step that may be left out.

    Args:
        optimizer: one of the run's.
        settings: of the plugin.
        how: what shows that.

    Returns:
        The error, to be raised.
    """
    return MisconfigurationException(
        f"`LowPrecision(precision={settings.precision!r})` needs an optimizer that steps without evaluating "
        f"the model, since steps with infinite gradients are left out, but got {type(optimizer).__name__}: "
        f"{how}. Use another optimizer, or LowPrecision(precision='bf16-mixed') or "
        "LowPrecision(precision='32-true')."
    )


def _is_native(optimizer: Optimizer) -> bool:
    """Whether the arithmetic is torch's own, in the dtype of the weights."""
    return any(
        kind is not Optimizer and kind.__module__.startswith(f"{torch.__name__}.optim.")
        for kind in type(optimizer).__mro__
    )
