"""A dense model made sparse, as a method and a selection say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.techniques.sparsity.methods import SparseMethod
from lightning_memtrain.techniques.sparsity.patterns import Storage
from lightning_memtrain.techniques.sparsity.refusals import refuse_layers
from lightning_memtrain.techniques.sparsity.rules import Moment, sample_inactive
from lightning_memtrain.techniques.sparsity.selection import Select
from lightning_memtrain.techniques.sparsity.weights import sparsify_


def sparsify_at_random(
    model: nn.Module,
    method: SparseMethod,
    select: Select,
    seed: int,
    storage: Storage = "auto",
    chunk_bytes: int | None = None,
) -> None:
    """Keep as many weights of each layer as a method says, at random positions, with their values.

    Args:
        model: becomes sparse in place.
        method: says how many.
        select: says in which layers.
        seed: of the positions, which depend on nothing else.
        storage: form of the pattern.
        chunk_bytes: most bytes of a dense weight that a linear layer makes at a time.

    Raises:
        MisconfigurationException: if a weight is tied or not yet made.

    Example:
        >>> from lightning_memtrain.techniques.sparsity.methods import StaticSparse
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> sparsify_at_random(model, StaticSparse(0.75), Select(dense=["1"]), seed=0)
        >>> model[0]
        SparseLinear(in_features=4, out_features=4, bias=True, nnz=4, storage='bitmask')
    """
    layers = select.layers(model)
    refuse_layers(model, layers)
    weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    start, none = Moment(0, 0, 0, seed), torch.empty(0, dtype=torch.int64)
    positions = {}
    for name, count in (method.counts(shapes, select.overrides) if layers else {}).items():
        numel = weights[name].numel()
        # A layer that keeps all of its weights for good needs no pattern.
        if count < numel or method.changes_counts:
            drawn = sample_inactive(numel, none, count, start.generator(name))
            positions[f"{name}.weight" if name else "weight"] = drawn
    if positions:
        sparsify_(model, positions, storage=storage, chunk_bytes=chunk_bytes)
        return
    what = f"leaves all of {', '.join(layers)} dense" if layers else f"matched no layer: {select}"
    warnings.warn(
        f"`SparseTraining` has no effect: {method} {what}. Raise the sparsity, or choose layers by "
        "Select(types=..., dense_ends=False).",
        NoEffectWarning,
        stacklevel=2,
    )


def around_configure_model(
    model: LightningModule, before: Callable[[], None], after: Callable[[], None]
) -> Callable[[], None]:
    """Do something before and after a model's own ``configure_model``.

    Args:
        model: whose hook it is.
        before: called first.
        after: called last.

    Returns:
        A function that takes it back if that has not been called.
    """
    inner, replaced = model.configure_model, model.__dict__.get("configure_model")

    def configure_model() -> None:
        before()
        inner()
        undo()  # nothing of this is in a copy of the model that is made during the run
        after()

    def undo() -> None:
        if model.__dict__.get("configure_model") is not configure_model:
            return
        del model.__dict__["configure_model"]
        if replaced is not None:
            model.__dict__["configure_model"] = replaced

    model.__dict__["configure_model"] = configure_model
    return undo
