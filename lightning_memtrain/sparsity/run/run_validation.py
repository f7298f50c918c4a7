"""Runs that sparse training would spoil, each with the reason and a way out."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.core import NoEffectWarning
from lightning_memtrain.sparsity import sharding
from lightning_memtrain.sparsity.methods.rules.layer_updates import Moment
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.methods.update_schedules import RunLength, Ticks, UpdateClock
from lightning_memtrain.sparsity.selection.select import Select
from lightning_memtrain.sparsity.selection.weight_locations import Place
from lightning_memtrain.sparsity.storage.layers.layer_types import SPARSE_TYPES
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import SUFFIX, can_be_sparse
from lightning_memtrain.sparsity.storage.patterns import Storage

_STRATEGIES = (
    "FSDPStrategy",
    "DeepSpeedStrategy",
    "XLAStrategy",
    "XLAFSDPStrategy",
    "SingleDeviceXLAStrategy",
)
_AVERAGES = ("StochasticWeightAveraging", "WeightAveraging")


def refuse_arguments(
    method: Any, update: Any, layers: Any, storage: Any, chunk_bytes: Any, leave: Any
) -> None:
    """Refuse arguments of the callback that are of another type or out of their range.

    Args:
        method: see the callback, as the others.
        update: see there.
        layers: see there.
        storage: see there.
        chunk_bytes: see there.
        leave: see there.

    Raises:
        MisconfigurationException: naming the argument.
    """
    _check_type("method", method, SparseMethod, "a method such as RigL(0.9)")
    _check_type("update", update, (UpdateClock, type(None)), "a clock such as UpdateEvery(100)")
    _check_type("layers", layers, (Select, type(None)), "a Select(...)")
    if storage not in get_args(Storage):
        expected = ", ".join(repr(choice) for choice in get_args(Storage))
        raise MisconfigurationException(
            f"`SparseTraining(storage)` must be one of {expected}, but got storage={storage!r}. Use one."
        )
    if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
        raise MisconfigurationException(
            "`SparseTraining(chunk_bytes)` must be a number of bytes of at least 1, or None, but got "
            f"chunk_bytes={chunk_bytes!r}. Leave it out for whole weights."
        )
    if leave not in ("sparse", "dense"):
        raise MisconfigurationException(
            f"`SparseTraining(leave)` must be 'sparse' or 'dense', but got leave={leave!r}. Use 'dense' for "
            "a model that code without sparse layers can use after the run."
        )


def warn_of_update(method: SparseMethod, update: UpdateClock | None) -> None:
    """Warn of a clock for a pattern that never changes.

    Args:
        method: of the callback.
        update: of the callback.
    """
    if method.clock is None and update is not None:
        warnings.warn(
            f"`SparseTraining(update)` has no effect with `{type(method).__name__}`, whose pattern never "
            "changes. Leave it out.",
            NoEffectWarning,
            stacklevel=3,
        )


def _check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    if not isinstance(value, kind):
        raise MisconfigurationException(
            f"`SparseTraining({name})` must be {expected}, but got {name}={value!r}. Use one."
        )


def refuse_run(trainer: Trainer, num_given: int, method: SparseMethod, leave: str = "sparse") -> None:
    """Refuse strategies that shard, and callbacks that look at weights by their place.

    Args:
        trainer: of the run.
        num_given: how many callbacks of the kind it has.
        method: that is at work.
        leave: what the run leaves.

    Raises:
        MisconfigurationException: naming the strategy or the callback.
    """
    if num_given > 1:
        raise MisconfigurationException(
            "`SparseTraining` must be given once, but got it twice. Give layers sparsities of their own by "
            "Select(overrides=...)."
        )
    if _kind(trainer.strategy, _STRATEGIES):
        raise MisconfigurationException(
            "`SparseTraining` needs parameters that are whole on each device, since weights move between "
            f"positions, but got {type(trainer.strategy).__name__}. Train with ddp or on one device, or with "
            "ModelParallelStrategy and `fully_shard`."
        )
    if sharding.shards(trainer.strategy) and method.changes_counts:
        raise MisconfigurationException(
            "`SparseTraining(method)` must keep the number of weights of each layer under "
            f"{type(trainer.strategy).__name__}, whose shards keep their size, but got {method!r}. Use RigL, "
            "SET or StaticSparse, or train with ddp or on one device."
        )
    if sharding.shards(trainer.strategy) and leave == "dense":
        raise MisconfigurationException(
            "`SparseTraining(leave='dense')` needs weights that are whole on each device, but got "
            f"{type(trainer.strategy).__name__}. Use leave='sparse', and load `export_dense(model)` after it."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _kind(callback, _AVERAGES):
            raise MisconfigurationException(
                f"`SparseTraining` cannot be combined with {type(callback).__name__}: an average of values "
                "whose positions moved mixes different weights. Leave it out, or average "
                "`export_dense(model)` yourself."
            )
        if _kind(callback, ("ModelPruning",)):
            raise MisconfigurationException(
                f"`SparseTraining` cannot be combined with {type(callback).__name__}, which masks dense "
                "weights. Leave it out; GradualMagnitudePruning prunes during sparse training."
            )


def _kind(candidate: Any, names: Iterable[str]) -> bool:
    return any(base.__name__ in names for base in type(candidate).__mro__)


def refuse_layers(model: nn.Module, layers: Mapping[str, Place]) -> None:
    """Refuse weights that cannot be taken out of their layer.

    Args:
        model: the module that is trained.
        layers: what is to become sparse.

    Raises:
        MisconfigurationException: naming the layer.
    """
    weights = {id(place.parameter): path for path, place in layers.items()}
    for path, place in layers.items():
        kind = type(place.module)
        if is_lazy(place.parameter):
            raise MisconfigurationException(
                f"`SparseTraining` needs layers whose weights exist, but {path!r} is {kind.__name__}. "
                "Run the model on one batch in `__init__`, or name it in Select(dense=...)."
            )
        if kind not in SPARSE_TYPES and not can_be_sparse(place.module, place.attribute):
            raise MisconfigurationException(
                f"`SparseTraining` cannot make {path!r} sparse, since {kind.__name__} is a class of "
                f"its own, whose methods would be lost or would not know sparse values. Add {path!r} to "
                "Select(dense=[...]), or use torch's own layer."
            )
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied = weights.get(id(parameter))
        if tied is not None and name != layers[tied].name:
            raise MisconfigurationException(
                f"`SparseTraining` cannot make {tied!r} sparse, since its weight is tied to {name!r} and "
                f"would no longer be. Add {tied!r} to Select(dense=...), or untie them."
            )


def warn_of_recompiling(model: LightningModule, method: SparseMethod) -> None:
    """Warn of compiled layers that would soon not be compiled any more.

    Args:
        model: that is trained.
        method: that is at work.
    """
    # torch.compile brings it; without it nothing is compiled.
    config = getattr(sys.modules.get("torch._dynamo"), "config", None)
    if not method.changes_counts or not getattr(config, "force_parameter_static_shapes", False):
        return
    if getattr(model, "_compiler_ctx", None) is not None or any(_is_compiled(one) for one in model.modules()):
        warnings.warn(
            f"{type(method).__name__} changes the number of weights of compiled layers, each of which is "
            "compiled again then, until torch.compile gives up after "
            f"{getattr(config, 'recompile_limit', 8)} times. Set "
            "`torch._dynamo.config.force_parameter_static_shapes = False` before the run: then it is once.",
            stacklevel=2,
        )


def _is_compiled(module: nn.Module) -> bool:
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def run_length(trainer: Trainer) -> RunLength:
    """How long a run is.

    Args:
        trainer: whose training data is set up.

    Returns:
        In optimizer steps, as far as it is known.
    """
    total, num_batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    return RunLength(
        int(total) if 0 < total < float("inf") else None,
        None
        if num_batches == float("inf")
        else max(1, math.ceil(num_batches / trainer.accumulate_grad_batches)),
    )


def refuse_ticks(ticks: Ticks, run: RunLength, method: SparseMethod, nnz: Mapping[str, int]) -> None:
    """Refuse schedules without an end, and warn where the pattern does not change as was meant.

    Args:
        ticks: when it changes.
        run: its length.
        method: that is at work.
        nnz: weights by layer.

    Raises:
        MisconfigurationException: if the method's schedule needs an end, and there is none.
    """
    if ticks.last is None and method.needs_end:
        raise MisconfigurationException(
            f"`{method}` changes until updates end, so the updates need an end, but there is none. Set "
            "Trainer(max_steps=...), or update=UpdateEvery(..., stop=...) to a number of steps."
        )
    if run.total_steps is None:
        return
    steps = range(1, run.total_steps + 1)  # of which the first that is due answers both questions, as a rule
    if not any(ticks.is_due(step) for step in steps):
        warnings.warn(
            f"`SparseTraining(update)` has no effect: no update is due in the {run.total_steps} steps of the "
            "run. Update more often, e.g. UpdateEvery(100).",
            NoEffectWarning,
            stacklevel=2,
        )
        return
    moments = (Moment(step, step - ticks.start, method.span(ticks)) for step in steps if ticks.is_due(step))
    if not any(method.has_effect(nnz, moment) for moment in moments):
        warnings.warn(
            f"`SparseTraining(update)` has no effect: `{method}` moves less than one weight of each layer at "
            f"every update, and updates stop at step {ticks.stop}. "
            "Update more often or stop later, so that the fraction is not 0 yet, or raise `drop`.",
            NoEffectWarning,
            stacklevel=2,
        )
    if ticks.stop is not None and ticks.stop > run.total_steps:
        warnings.warn(
            f"`SparseTraining(update)` stops at step {ticks.stop}, but the run ends at step "
            f"{run.total_steps}, so schedules do not reach their end. Train longer, or use a fraction "
            "such as stop=0.75.",
            stacklevel=2,
        )


def refuse_layers_of(state_dict: Mapping[str, Any], expected: frozenset[str]) -> None:
    """Refuse weights that were saved with other sparse layers.

    Args:
        state_dict: to be loaded.
        expected: paths of what holds values in the model.

    Raises:
        MisconfigurationException: naming a layer.
    """
    ending = "sparsity_pattern"
    saved = {key.removesuffix(ending).removesuffix(".") for key in state_dict if key.endswith(ending)}
    for place in sorted(saved ^ expected):
        there, here = ("sparse", "dense") if place in saved else ("dense", "sparse")
        name = place.removesuffix(SUFFIX)
        cure = "Load it with the same method and `Select`."
        if not saved:
            cure = (
                "Load dense weights into the model before the Trainer sees it: "
                "`model.load_state_dict(torch.load(...)['state_dict'])`."
            )
        raise MisconfigurationException(
            "`SparseTraining(layers)` must choose the layers that are sparse in the checkpoint, but "
            f"{name!r} is {there} there and {here} here. {cure}"
        )


def identity(method: SparseMethod, overrides: Mapping[str, float], seed: int, version: int) -> dict[str, Any]:
    """What a checkpoint says of the training that it is of, see :func:`refuse_checkpoint`.

    Args:
        method: in force.
        overrides: in force, sparsities of single layers.
        seed: in force.
        version: of what is saved.

    Returns:
        Names and values.
    """
    return {
        "version": version,
        "method": type(method).__name__,
        "sparsity": repr(method.sparsity),
        "distribution": repr(method.distribution),
        "overrides": dict(overrides),
        "seed": seed,
    }


def refuse_checkpoint(
    saved: Mapping[str, Any],
    method: SparseMethod,
    overrides: Mapping[str, float],
    seed: int,
    version: int,
    patterns: Mapping[str, int],
) -> None:
    """Refuse to go on with another sparsity of layers, and warn of another method or seed.

    Args:
        saved: of the callback in the checkpoint.
        method: in force.
        overrides: in force, sparsities of single layers.
        seed: in force.
        version: the highest that can be read.
        patterns: fingerprints of the patterns that the model has, by layer.

    Raises:
        MisconfigurationException: if the sparsity or a pattern is another one.
    """
    if saved["version"] > version:
        raise MisconfigurationException(
            f"The state of `SparseTraining` in a checkpoint must have version {version} or less, but got "
            f"version {saved['version']}. Install the lightning_memtrain that wrote it, or a later one."
        )
    name = type(method).__name__
    for argument, key, given in (
        (f"{name}(sparsity)", "sparsity", repr(method.sparsity)),
        (f"{name}(distribution)", "distribution", repr(method.distribution)),
        ("Select(overrides)", "overrides", dict(overrides)),
    ):
        if saved[key] != given:
            raise MisconfigurationException(
                f"`{argument}` must be that of the checkpoint, whose patterns are loaded, {saved[key]}, but "
                f"got {given}. Resume with that, or start a new run from weights of `export_dense(model)`."
            )
    for name, number in patterns.items():
        if saved["patterns"].get(name) != number:
            raise MisconfigurationException(
                f"The pattern of {name!r} must be the one that was saved, but another is in the checkpoint's "
                "`state_dict`. Resume from a checkpoint that was not changed."
            )
    if saved["method"] != type(method).__name__:
        warnings.warn(
            f"The checkpoint was written by `{saved['method']}`, but the run goes on with "
            f"`{type(method).__name__}`, from the pattern of the checkpoint. Resume with the method that it "
            "was written with, or go on if the change is intended.",
            stacklevel=2,
        )
    if saved["seed"] != seed:
        warnings.warn(
            f"The checkpoint was written with `SparseTraining(seed={saved['seed']})`, but got seed={seed}, "
            "so weights grow elsewhere than in the uninterrupted run. Resume with the seed that it was "
            "written with, or go on if the change is intended.",
            stacklevel=2,
        )
