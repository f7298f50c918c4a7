"""The tensors that Python holds beside a step: copies of weights, second models, what callbacks keep."""

from __future__ import annotations

import collections
import functools
import gc
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset

from lightning_memtrain.tracing.user_state.boundaries import (
    PLAIN,
    is_left_alone,
    is_lightnings,
    module_of,
    push,
)

# What is not looked into: no state of a run, or found by other ways, or for ever full.
_NO_PARTS = (
    types.ModuleType,
    type,
    types.BuiltinFunctionType,
    types.GeneratorType,
    types.CoroutineType,
    weakref.ReferenceType,
)
# A user's object may lead to millions of others, such as the tokens of a data set.
_MOST_OBJECTS = 1_000_000
# Modules have a dozen of these for hooks, nearly always empty.
_CONTAINERS = frozenset({dict, collections.OrderedDict, list, set, tuple})


class HeldTensors:
    """Finds what can be reached from some objects: through attributes, items, closures and methods.

    Globals are not searched, nor data sets, loaders and what they hold ready, and classes of this library.
    What autograd keeps for a graph is no object of Python.

    Example:
        >>> import torch
        >>> average = types.SimpleNamespace(kept={"weight": torch.ones(3)})
        >>> [tensor.numel() for tensor in HeldTensors().within([average])]
        [3]
    """

    def __init__(self) -> None:
        self._is_passed_over: dict[type, bool] = {}

    def __reduce__(self) -> tuple[type[HeldTensors], tuple[()]]:
        # What is known of classes is found out again; some of them cannot be named in another process.
        return HeldTensors, ()

    def beside_steps(self, trainer: Trainer, model: LightningModule) -> list[Tensor]:
        """What a fit holds beside its steps, parameters and buffers among it, without optimizers' state.

        Args:
            trainer: fits.
            model: its module.

        Returns:
            The tensors, of any shape, dtype and device.
        """
        states = [one.state for one in trainer.optimizers if hasattr(one, "state")]
        return self.within([model, trainer, trainer.strategy], leave=states)

    def within(self, roots: Iterable[Any], leave: Iterable[Any] = ()) -> list[Tensor]:
        """All tensors within reach, each once.

        Args:
            roots: where to begin.
            leave: objects that are not looked into.

        Returns:
            The tensors, of any shape, dtype and device.
        """
        found: list[Tensor] = []
        # What is seen is kept, so that its id stays its own.
        seen: dict[int, Any] = {id(one): one for one in leave}
        waiting = [*roots]
        # Objects that are only made here should not make the collector look at everything.
        collects = gc.isenabled()
        gc.disable()
        try:
            while waiting and len(seen) < _MOST_OBJECTS:
                one = waiting.pop()
                kind = type(one)
                if kind in PLAIN or id(one) in seen:
                    continue
                seen[id(one)] = one
                if issubclass(kind, Tensor):
                    found.append(one)
                if not self._passes_over(kind):
                    push(waiting, self._parts(one, kind))
        finally:
            if collects:
                gc.enable()
        return found

    def _parts(self, one: Any, kind: type) -> list[Any]:
        if kind is types.FunctionType:
            return [one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__]
        if issubclass(kind, Tensor):
            own = getattr(one, "__dict__", None)
            return [own] if own else []
        if kind is functools.partial:
            return [one.func, one.args, one.keywords]
        if issubclass(kind, torch.nn.Module) and kind.__basicsize__ == torch.nn.Module.__basicsize__:
            # As below, in a third of the time: there may be thousands.
            values = vars(one).values()
            return [value for value in values if value.__class__ not in _CONTAINERS or value]
        return gc.get_referents(one)

    def _passes_over(self, kind: type) -> bool:
        known = self._is_passed_over.get(kind)
        if known is None:
            known = self._is_passed_over[kind] = _is_passed_over(kind)
        return known


def _is_passed_over(kind: type) -> bool:
    if issubclass(kind, Tensor) or issubclass(kind, torch.nn.Module):
        return False
    if issubclass(kind, (*_NO_PARTS, Dataset, LightningDataModule)) or is_left_alone(kind):
        return not is_lightnings(kind, "Callback") or module_of(kind).startswith("lightning_memtrain")
    return module_of(kind).partition(".")[0] == "lightning_memtrain"
