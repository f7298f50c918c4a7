"""Gradual magnitude pruning: from dense to sparse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_choices, check_kinds
from lightning_memtrain.sparsity.methods.distributions import Distribution, Shapes, Uniform, check_sparsity
from lightning_memtrain.sparsity.methods.rules.drop_rules import (
    all_but_smallest,
)
from lightning_memtrain.sparsity.methods.rules.layer_updates import (
    LayerChange,
    LayerView,
    MethodState,
    UpdateTime,
)
from lightning_memtrain.sparsity.methods.sparse_method import PatternUpdate, SparseMethod
from lightning_memtrain.sparsity.methods.update_schedules import UpdateSteps
from lightning_memtrain.sparsity.methods.value_schedules import CubicSchedule, Schedule, to_schedule

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class GradualMagnitudePruning(SparseMethod):
    r"""Starts dense, and drops the smallest weights until the model is as sparse as wanted; none grow.

    Between the first and the last update, the sparsity is
    :math:`s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / T)^3`. Memory falls as the model becomes sparse, but
    **its peak is that of dense training**, plus the pattern: use it for a small model at the end, not to
    train in little memory.

    Args:
        sparsity: fraction of zeros at the end :math:`s_f`, in ``[0, 1)``; or a schedule from first to last.
        scope: ``"layer"``: each layer is as sparse as the distribution says; ``"global"``: the smallest of
            all layers go, a layer keeps at least one.
        distribution: spreads the sparsity over layers.

    Raises:
        ArgumentError: if an argument is out of its range.

    Example:
        >>> method = GradualMagnitudePruning(0.8)
        >>> [round(method.sparsity.value(step, 4), 3) for step in range(5)]
        [0.0, 0.463, 0.7, 0.788, 0.8]

    References:
        Zhu and Gupta, To Prune, or Not to Prune, ICLR Workshop 2018, arXiv:1710.01878.
    """

    sparsity: Schedule | float
    scope: Scope = "layer"
    distribution: Distribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        argument = f"{type(self).__name__}(sparsity)"
        if not isinstance(self.sparsity, Schedule):
            object.__setattr__(self, "sparsity", CubicSchedule(0.0, check_sparsity(self.sparsity, argument)))
        to_schedule(self.sparsity, argument)
        if self._at(1, 1) < self._at(0, 1):
            raise ArgumentError(
                f"`{argument}` must not fall, since nothing grows, but got {self.sparsity!r}. "
                "Exchange begin and end."
            )
        owner, cure = type(self).__name__, "Use e.g. Uniform() or ErdosRenyiKernel()."
        check_choices(owner, get_args(Scope), scope=self.scope)
        check_kinds(owner, Distribution, "a Distribution", cure, distribution=self.distribution)

    def _at(self, step: int, total: int) -> float:
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity.value(step, total)

    @property
    def changes_nnz(self) -> bool:
        """The number of weights of a layer changes, since layers lose weights."""
        return True

    @property
    def needs_end(self) -> bool:
        """Whether the schedule of the sparsity does."""
        assert isinstance(self.sparsity, Schedule)
        return self.sparsity.needs_end

    def schedule_length(self, update_steps: UpdateSteps) -> int:
        """To the last update, after which the model is exactly as sparse as was said."""
        return 0 if update_steps.last is None else max(0, update_steps.last - update_steps.start)

    @property
    def starts_dense(self) -> bool:
        """Memory peaks at the start, unless the schedule begins elsewhere."""
        return self._at(0, 1) == 0

    def counts(self, shapes: Shapes, overrides: Mapping[str, float]) -> dict[str, int]:
        """Weights of each layer at the start: all of them, as a rule."""
        if overrides:
            raise ArgumentError(
                f"`Select(overrides)` cannot be combined with `{type(self).__name__}`, whose sparsity "
                f"changes, but got overrides={dict(overrides)!r}. Leave them out, or use "
                "distribution=ErdosRenyiKernel()."
            )
        return self.distribution.counts(shapes, self._at(0, 1))

    def update(self, layers: Mapping[str, LayerView], now: UpdateTime, state: MethodState) -> PatternUpdate:
        """Drop what is too much by now."""
        shapes = {name: layer.shape for name, layer in layers.items()}
        target = self.distribution.counts(shapes, self._at(now.elapsed, now.total))
        if self.scope == "layer":
            kept = {
                name: all_but_smallest(layer.values, max(0, layer.nnz - target[name]))
                for name, layer in layers.items()
            }
        else:
            kept = _all_but_smallest_of_all(layers, sum(target.values()))
        return PatternUpdate(
            {
                name: LayerChange(stays, torch.empty(0, dtype=torch.int64, device=stays.device))
                for name, stays in kept.items()
                if not stays.all()
            },
            state,
        )


def _all_but_smallest_of_all(layers: Mapping[str, LayerView], target: int) -> dict[str, torch.Tensor]:
    """Drop the smallest of all layers, but never the largest of one."""
    magnitudes = [layer.values.abs().clone() for layer in layers.values()]
    for layer in magnitudes:
        layer[layer.argmax()] = float("inf")
    sizes = [layer.numel() for layer in magnitudes]
    kept = all_but_smallest(torch.cat(magnitudes), max(0, sum(sizes) - max(target, len(sizes))))
    return dict(zip(layers, torch.split(kept, sizes), strict=True))
