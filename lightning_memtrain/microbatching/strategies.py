"""Strategies that bring microbatching along, for those who choose a strategy by name."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy

from lightning_memtrain._registration import when_imported
from lightning_memtrain.compat.lightning_names import namesake, package_of
from lightning_memtrain.microbatching import training_loop
from lightning_memtrain.microbatching.microbatching_callback import Microbatching


class _BringsMicrobatching:
    """Adds a :class:`Microbatching` to the trainer's callbacks before their ``setup``; adds nothing else.

    It stays there, since Lightning tears down the strategy before the callbacks, and the memory report asks
    them last.
    """

    _microbatching: Microbatching

    @property
    def accelerator(self) -> Any:
        """The device's; the first that a trainer gives to a strategy."""
        return super().accelerator  # type: ignore[misc]

    @accelerator.setter
    def accelerator(self, accelerator: Any) -> None:
        if package_of(accelerator) == "pytorch_lightning" and package_of(self) == "lightning":
            self.__class__ = _of_pytorch_lightning(type(self))
        namesake(Strategy, like=accelerator).accelerator.fset(self, accelerator)  # type: ignore[attr-defined]

    def setup_environment(self) -> None:
        """As in the base class."""
        callbacks = training_loop.trainer_callbacks(self.lightning_module)  # type: ignore[attr-defined]
        if self._microbatching not in callbacks:
            callbacks.append(self._microbatching)
        super().setup_environment()  # type: ignore[misc]


class MemtrainDDPStrategy(_BringsMicrobatching, DDPStrategy):
    """``DDPStrategy`` with :class:`Microbatching`, by name ``strategy="memtrain_ddp"``.

    Args:
        microbatching: how to split batches; by name, and by default, ``microbatch_size="auto"``.
        **kwargs: arguments of ``DDPStrategy``.

    Example:
        >>> strategy = MemtrainDDPStrategy(Microbatching(num_microbatches=4), find_unused_parameters=True)
        >>> strategy.strategy_name
        'memtrain_ddp'
    """

    strategy_name = "memtrain_ddp"

    def __init__(self, microbatching: Microbatching | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._microbatching = microbatching or Microbatching(microbatch_size="auto")


class MemtrainFSDPStrategy(_BringsMicrobatching, FSDPStrategy):
    """``FSDPStrategy`` with :class:`Microbatching`, by name ``strategy="memtrain_fsdp"``.

    Args:
        microbatching: how to split batches; by name, and by default, ``num_microbatches=2``, since sizes
            cannot be found by running out of memory where ranks communicate in forward and backward.
        **kwargs: arguments of ``FSDPStrategy``.
    """

    strategy_name = "memtrain_fsdp"

    def __init__(self, microbatching: Microbatching | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._microbatching = microbatching or Microbatching(num_microbatches=2)


_STRATEGIES: dict[type[Any], type[Any]] = {
    DDPStrategy: MemtrainDDPStrategy,
    FSDPStrategy: MemtrainFSDPStrategy,
}
_PREFIX = "PytorchLightning"
_MADE: dict[Any, Any] = {}


def _register(package: str) -> None:
    """Let trainers of a package, which has been imported, know the strategies by name and by class."""
    module: Any = import_module(f"{package}.strategies")
    for base, kind in _STRATEGIES.items():
        description = f"{base.__name__} with Microbatching"
        module.StrategyRegistry.register(kind.strategy_name, kind, description, override=True)
        theirs = getattr(module, base.__name__)
        if theirs is not base:
            theirs.register(kind)  # until an object becomes one in truth


def _of_pytorch_lightning(kind: Any) -> Any:
    """The same strategy, derived from the class of ``pytorch_lightning``.

    An object takes this class as soon as a trainer of that package has it: what the two packages' classes
    keep in their objects is the same.
    """
    base = next((base for base, ours in _STRATEGIES.items() if ours is kind), None)
    if base is None:
        raise MisconfigurationException(
            "A Trainer of `pytorch_lightning` takes MemtrainDDPStrategy or MemtrainFSDPStrategy as they are, "
            f"but got {kind.__name__}, which is derived from them and so from `lightning`. Derive it from a "
            "strategy of `pytorch_lightning`, and give `Microbatching` to the Trainer's callbacks."
        )
    if kind not in _MADE:
        theirs = getattr(import_module("pytorch_lightning.strategies"), base.__name__)
        names = {"__module__": __name__, "__doc__": kind.__doc__, "strategy_name": kind.strategy_name}
        _MADE[kind] = type(_PREFIX + kind.__name__, (_BringsMicrobatching, theirs), names)
    return _MADE[kind]


def __getattr__(name: str) -> Any:
    """Objects of the classes that are made here can be pickled, as for processes that are spawned."""
    for kind in _STRATEGIES.values():
        if name == _PREFIX + kind.__name__:
            return _of_pytorch_lightning(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_register("lightning.pytorch")
when_imported("pytorch_lightning", partial(_register, "pytorch_lightning"))
