"""Optimizers of a run: which one counts, and which ones cannot follow weights that move."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import LBFGS, Optimizer

from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.sparsity.storage.optimizer_state import check_reindexable


def leading_optimizer(
    optimizers: Iterable[Optimizer], values: Mapping[str, nn.Parameter]
) -> Optimizer | None:
    """The first optimizer that has weights of sparse layers, whose steps are those of the run.

    Args:
        optimizers: of the run.
        values: of sparse layers, by layer.

    Returns:
        ``None`` after a warning if there are sparse layers that none has.
    """
    for optimizer in optimizers:
        if held_paths([optimizer], values):
            return optimizer
    if values:
        warnings.warn(
            "`SparseTraining` does not change the pattern, since no optimizer has the weights of a "
            "sparse layer. Give the optimizer `self.parameters()`.",
            NoEffectWarning,
            stacklevel=2,
        )
    return None


def held_paths(optimizers: Iterable[Optimizer], values: Mapping[str, nn.Parameter]) -> set[str]:
    """Layers whose weights optimizers step.

    Args:
        optimizers: of the run.
        values: of sparse layers, by layer.

    Returns:
        Those that are not frozen and that one of the optimizers has.
    """
    held = parameter_ids(optimizers)
    return {path for path, parameter in values.items() if parameter.requires_grad and id(parameter) in held}


def parameter_ids(optimizers: Iterable[Optimizer]) -> set[int]:
    """Parameters of optimizers, by ``id``.

    Args:
        optimizers: of the run.

    Returns:
        All, frozen ones included.
    """
    return {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def stepped_paths(
    optimizers: Sequence[Optimizer], values: Mapping[str, nn.Parameter], with_gradient: Collection[str]
) -> set[str]:
    """Layers whose weights have been stepped: an optimizer that has all parameters leaves some alone.

    Args:
        optimizers: of the run.
        values: of sparse layers, by layer.
        with_gradient: layers that have had a gradient.

    Returns:
        Those of :func:`held_paths` that had a gradient or have state; all of them if none is known to.
    """
    held = held_paths(optimizers, values)
    stateful = {path for path, one in values.items() if any(each.state.get(one) for each in optimizers)}
    return held & (stateful | set(with_gradient)) or held


def refuse_optimizers(optimizers: Sequence[Optimizer], values: Mapping[str, nn.Parameter]) -> None:
    """Refuse state that cannot follow weights that move, as far as it is there or known by its class.

    Args:
        optimizers: of the run.
        values: of sparse layers, by layer.

    Raises:
        MisconfigurationException: if an optimizer mixes the entries of all parameters.
        TypeError: if it has state of another form than one number per entry.
    """
    for optimizer in optimizers:
        if values and isinstance(optimizer, LBFGS):
            raise MisconfigurationException(
                "`SparseTraining` cannot move weights under LBFGS, whose state is that of all parameters in "
                "a row. Use an elementwise optimizer (SGD, Adam, AdamW, RMSprop, Adagrad), or StaticSparse."
            )
    for parameter in values.values():
        check_reindexable(optimizers, parameter)


def warn_of_groups(optimizers: Iterable[Optimizer], values: Mapping[str, nn.Parameter]) -> None:
    """Warn of sparse weights that are in a group without weight decay because they have one axis.

    Args:
        optimizers: of the run.
        values: of sparse layers, by layer.
    """
    by_id = {id(parameter): name for name, parameter in values.items()}
    for optimizer in optimizers:
        decays = [group.get("weight_decay", 0) for group in optimizer.param_groups]
        for index, group in enumerate(optimizer.param_groups):
            caught = [by_id[id(p)] for p in group["params"] if id(p) in by_id]
            if caught and not decays[index] and any(decays):
                warnings.warn(
                    f"Weights of {len(caught)} sparse layers ({caught[0]!r} ...) are in "
                    f"param_groups[{index}] of {type(optimizer).__name__}, which has no weight decay, while "
                    "another group has. Values of sparse layers have one axis, so `parameter.ndim < 2` takes "
                    "them for biases. Choose by name instead: they end in '.values'.",
                    stacklevel=2,
                )
