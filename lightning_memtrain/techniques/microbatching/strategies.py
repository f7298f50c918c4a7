"""Strategies that bring microbatching along, for those who choose a strategy by name."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, Strategy, StrategyRegistry

from lightning_memtrain.techniques.microbatching import _compat
from lightning_memtrain.techniques.microbatching.callback import Microbatching


class _BringsMicrobatching(Strategy):
    """Adds a :class:`Microbatching` to the trainer's callbacks before their ``setup``; adds nothing else.

    It stays there, since Lightning tears down the strategy before the callbacks, and the memory report asks
    them last.
    """

    _microbatching: Microbatching

    def setup_environment(self) -> None:
        callbacks = _compat.trainer_callbacks(self.lightning_module)
        if self._microbatching not in callbacks:
            callbacks.append(self._microbatching)
        super().setup_environment()


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


for _strategy in (MemtrainDDPStrategy, MemtrainFSDPStrategy):
    StrategyRegistry.register(
        _strategy.strategy_name,
        _strategy,
        description=f"{_strategy.__mro__[2].__name__} with Microbatching",
        override=True,
    )
