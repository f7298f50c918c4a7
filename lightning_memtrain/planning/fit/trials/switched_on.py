"""What is switched on beside microbatches and recomputation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_memtrain.planning.fit.way import TechniqueSettings


@dataclass(frozen=True)
class SwitchedOn:
    """What is switched on beside microbatches and recomputation.

    Args:
        techniques: as Trainer takes them.
        stand_ins: callbacks for what only the user can write.
        trainer_arguments: plain arguments of Trainer.
    """

    techniques: tuple[TechniqueSettings, ...] = ()
    stand_ins: tuple[TechniqueSettings, ...] = ()
    trainer_arguments: Mapping[str, Any] = field(default_factory=dict)
