"""Checkpoints that a run of sparse training cannot go on from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import SPARSE_SUFFIX


def refuse_layers_of(state_dict: Mapping[str, Any], expected: frozenset[str]) -> None:
    """Refuse weights that were saved with other sparse layers.

    Args:
        state_dict: to be loaded.
        expected: paths of what holds values in the model.

    Raises:
        ArgumentError: naming a layer.
    """
    ending = "sparsity_pattern"
    saved = {key.removesuffix(ending).removesuffix(".") for key in state_dict if key.endswith(ending)}
    for place in sorted(saved ^ expected):
        there, here = ("sparse", "dense") if place in saved else ("dense", "sparse")
        name = place.removesuffix(SPARSE_SUFFIX)
        cure = "Load it with the same method and `Select`."
        if not saved:
            cure = (
                "Load dense weights into the model before the Trainer sees it: "
                "`model.load_state_dict(torch.load(...)['state_dict'])`."
            )
        raise ArgumentError(
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
        ArgumentError: if the sparsity is another one.
        MisconfigurationException: if a pattern is, or a later version wrote it.
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
            raise ArgumentError(
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
