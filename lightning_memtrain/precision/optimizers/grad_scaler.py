"""Loss scaling for weights and gradients that are float16 themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import per_optimizer_states
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import as_device, check_counts, check_kinds, check_numbers

# Halved as often, any sensible scale is far below 1.
_MOST_SKIPPED = 40


@dataclass(frozen=True)
class ScalerConfig:
    """How the loss is scaled in float16, so that small gradients do not become zero.

    Args:
        init_scale: at first; a power of two loses nothing.
        growth_interval: steps without infinite gradients after which the scale doubles.
        max_scale: the scale grows no further. A loss in float16 allows 32768 at most, since its own gradient
            is the scale; ``None`` for no limit.

    Raises:
        ArgumentError: if a number is out of its range.

    Example:
        >>> ScalerConfig(init_scale=2.0**10, growth_interval=500)
        ScalerConfig(init_scale=1024.0, growth_interval=500, max_scale=32768.0)
    """

    init_scale: float = 2.0**15
    growth_interval: int = 2000
    max_scale: float | None = 2.0**15

    def __post_init__(self) -> None:
        cure = "Use a power of two, e.g. 2.0**15."
        check_numbers("ScalerConfig", "greater than 0", lambda x: x > 0, cure, init_scale=self.init_scale)
        check_counts("ScalerConfig", cure="Use e.g. 2000.", growth_interval=self.growth_interval)
        if self.max_scale is not None:
            expected, cure = "a number or None", "None is no limit."
            check_numbers("ScalerConfig", expected, lambda x: True, cure, max_scale=self.max_scale)
        if self.max_scale is not None and not self.max_scale >= self.init_scale:
            raise ArgumentError(
                f"`ScalerConfig(max_scale)` must be at least init_scale={self.init_scale}, but got "
                f"max_scale={self.max_scale}. Lower init_scale, or raise max_scale; None is no limit."
            )


class CappedGradScaler(GradScaler):
    """torch's loss scaler with a scale that has an upper limit.

    Args:
        device: type of the device, e.g. ``"cuda"``.
        config: scale and growth.
    """

    def __init__(self, device: str, config: ScalerConfig) -> None:
        super().__init__(device, init_scale=config.init_scale, growth_interval=config.growth_interval)
        self._max_scale = config.max_scale

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Change the scale by what the last steps found.

        Args:
            new_scale: set it to this instead; a tensor is float32, of one number.
        """
        super().update(new_scale)
        if self._max_scale is not None and self._scale is not None:
            self._scale.clamp_(max=self._max_scale)


class HalfGradScaler(CappedGradScaler):
    """A loss scaler for gradients that are float16 themselves.

    ``torch.amp.GradScaler`` refuses these, since under autocast they would be a mistake. Scale, growth, and
    the skipping of steps with infinite gradients are its own.

    Args:
        device: type of the device, e.g. ``"cuda"``.
        config: scale and growth.
    """

    def __init__(self, device: str, config: ScalerConfig) -> None:
        as_device("HalfGradScaler", device=device)
        cure = "Write e.g. ScalerConfig(init_scale=1024.0)."
        check_kinds("HalfGradScaler", ScalerConfig, "a ScalerConfig", cure, config=config)
        super().__init__(device, config)
        self.num_skipped = 0
        self._scales_in_a_row: list[float] = []

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        return super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16=True)

    def unscale_once_(self, optimizer: Optimizer) -> None:
        """Unscale gradients, unless that was done since the optimizer's last step.

        Args:
            optimizer: whose gradients are meant.
        """
        if per_optimizer_states(self)[id(optimizer)]["stage"] is OptState.READY:
            self.unscale_(optimizer)

    @property
    def awaits_step(self) -> bool:
        """Whether there are unscaled gradients that no step has used."""
        return bool(self._unscaled())

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Change the scale by what the last steps found.

        Other optimizers' gradients that are unscaled already stay so; they count when these step.

        Args:
            new_scale: set it to this instead; a tensor is float32, of one number.
        """
        unscaled = self._unscaled()
        for key in unscaled:
            del per_optimizer_states(self)[key]
        super().update(new_scale)
        per_optimizer_states(self).update(unscaled)

    def _unscaled(self) -> dict[int, dict[str, Any]]:
        states = per_optimizer_states(self)
        return {key: state for key, state in states.items() if state["stage"] is OptState.UNSCALED}

    def step_if_finite(self, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        """Step unless a gradient is infinite; ``unscale_`` comes first, ``update`` afterwards.

        Args:
            optimizer: whose gradients decide.
            step: does the step.

        Raises:
            FloatingPointError: if this left out as many steps in a row as no scale can explain.
        """
        state = per_optimizer_states(self)[id(optimizer)]
        found = any(found_inf.item() for found_inf in state["found_inf_per_device"].values())
        state["stage"] = OptState.STEPPED
        if not found:
            self._scales_in_a_row.clear()
            step()
            return
        self.num_skipped += 1
        self._scales_in_a_row.append(self.get_scale())
        if len(self._scales_in_a_row) >= _MOST_SKIPPED:
            first, last = self._scales_in_a_row[0], self._scales_in_a_row[-1]
            raise FloatingPointError(
                f"Gradients were infinite or not a number in {_MOST_SKIPPED} steps in a row, while the loss "
                f"scale fell from {first:g} to {last:g}: the reason is the loss or a layer, not the scale. "
                "Look at the loss for NaN, keep the layer that overflows in float32 with "
                "LowPrecision(keep_in_fp32=...), or use precision='bf16-true'. The scales of these steps: "
                f"{', '.join(f'{scale:g}' for scale in self._scales_in_a_row)}."
            )
