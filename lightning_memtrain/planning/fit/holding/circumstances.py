"""What of a run a plan depends on, cheap enough to be looked at before each batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_memtrain.checkpointing.selection.held_beside import HeldBeside
from lightning_memtrain.core import KIB, format_bytes
from lightning_memtrain.ledger.tensors.tensor_search import find_tensors
from lightning_memtrain.microbatching.automatic_size.fitting_size import Shapes, shape_growth
from lightning_memtrain.microbatching.splitting.batches import batch_size_of
from lightning_memtrain.planning.fit.way import FoundWays

#: What the first step has logged, which the trial of a plan holds, too, is no more than was planned for.
LOGGED_BYTES = 4 * KIB


@dataclass(frozen=True)
class Circumstances:
    """What decides on the memory of a batch.

    Args:
        batch_size: samples; ``None`` where they cannot be told.
        shapes: of the batch's tensors, in the order in which they are found.
        batch_bytes: of these tensors.
        trained: for each parameter of the model, whether it is trained.
        optimized: parameters of each optimizer.
        accumulated: batches per update.
        held_bytes: what lives on beside the steps; 0 where nobody looked.
        stateful: for each optimizer, how many parameters it keeps something for; none if unknown. It begins
            to do so with its first step, as that of a GAN's generator which is trained later.
    """

    batch_size: int | None
    shapes: Shapes
    batch_bytes: int
    trained: tuple[bool, ...]
    optimized: tuple[int, ...]
    accumulated: int
    held_bytes: int = 0
    stateful: tuple[int, ...] = ()

    @classmethod
    def of(
        cls, trainer: pl.Trainer, model: pl.LightningModule, batch: Any, held: HeldBeside | None = None
    ) -> Circumstances:
        """Look at a run right before a batch.

        Args:
            trainer: the trainer that fits.
            model: its module.
            batch: the batch, on its device.
            held: looks for what lives on beside the steps.

        Returns:
            What was found.
        """
        tensors = find_tensors(batch)
        return cls(
            batch_size=samples_of(batch),
            shapes=tuple(tuple(tensor.shape) for tensor in tensors),
            batch_bytes=sum(tensor.nbytes for tensor in tensors),
            trained=tuple(parameter.requires_grad for parameter in model.parameters()),
            optimized=tuple(
                sum(len(group["params"]) for group in optimizer.param_groups)
                for optimizer in trainer.optimizers
            ),
            accumulated=trainer.accumulate_grad_batches,
            held_bytes=0 if held is None else held.num_bytes(tensors),
            stateful=tuple(len(getattr(optimizer, "state", ())) for optimizer in trainer.optimizers),
        )

    def beyond(self, planned: Circumstances) -> list[str]:
        """What is more than what was planned for.

        Args:
            planned: what a plan was made for.

        Returns:
            A phrase for each; none if the plan holds.
        """
        found = []
        if len(self.shapes) != len(planned.shapes):
            found.append(f"a batch has {len(self.shapes)} tensors, not {len(planned.shapes)}")
        elif shape_growth(self.shapes, planned.shapes) > 1:
            now, then = next(
                (now, then)
                for now, then in zip(self.shapes, planned.shapes, strict=True)
                if len(now) != len(then) or any(one > other for one, other in zip(now, then, strict=True))
            )
            found.append(f"a tensor of the batch is {list(now)}, not {list(then)}")
        thawed = sum(now and not then for now, then in zip(self.trained, planned.trained, strict=False))
        thawed += sum(self.trained[len(planned.trained) :])
        if thawed:
            found.append(f"{thawed} more {_plural('parameter', thawed)} in training")
        if len(self.optimized) > len(planned.optimized):
            found.append(f"there are {len(self.optimized)} optimizers, not {len(planned.optimized)}")
        more = sum(self.optimized) - sum(planned.optimized)
        if more > 0:
            found.append(f"the optimizer has {more} more {_plural('parameter', more)}")
        begun = self._newly_stepped(planned)
        if begun:
            found.append(f"optimizer {begun[0]} steps parameters that it did not step before")
        if self.accumulated > 1 >= planned.accumulated:
            found.append(f"gradients of {self.accumulated} batches are accumulated")
        if more_bytes := self.more_held_bytes(planned):
            found.append(f"{format_bytes(more_bytes)} more are held beside the steps")
        return found

    def more_held_bytes(self, planned: Circumstances) -> int:
        """What lives on beside the steps that did not when a plan was made.

        Args:
            planned: what it was made for.

        Returns:
            The bytes.
        """
        return max(0, self.held_bytes - planned.held_bytes - LOGGED_BYTES)

    def _newly_stepped(self, planned: Circumstances) -> list[int]:
        """Optimizers that keep something for more parameters than planned."""
        if len(planned.stateful) != len(self.stateful):
            return []
        both = enumerate(zip(self.stateful, planned.stateful, strict=True))
        return [place for place, (now, then) in both if now > then]

    def with_steps_of(self, found: FoundWays) -> Circumstances:
        """What a search has planned for: its trials have stepped what the next steps will step.

        Args:
            found: what it came to.

        Returns:
            The same circumstances, with what optimizers keep then.
        """
        if len(found.stateful) != len(self.stateful):
            return replace(self, stateful=())
        return replace(self, stateful=tuple(map(max, self.stateful, found.stateful)))

    def growth(self, planned: Circumstances) -> float:
        """How many times more memory than planned a batch may take at most, if only its shapes are others.

        Args:
            planned: what a plan was made for.

        Returns:
            At least 1; infinity where nothing can be said.
        """
        if (self.trained, self.optimized) != (planned.trained, planned.optimized):
            return float("inf")
        if self._newly_stepped(planned):
            return float("inf")
        if self.accumulated > 1 >= planned.accumulated or len(self.shapes) != len(planned.shapes):
            return float("inf")
        return shape_growth(self.shapes, planned.shapes)


def samples_of(batch: Any) -> int | None:
    """Count the samples of a batch.

    Args:
        batch: as a loader yields it.

    Returns:
        The number; ``None`` where it cannot be told.
    """
    try:
        return batch_size_of(batch)
    except MisconfigurationException:
        return None


def _plural(word: str, number: int) -> str:
    return f"{word} is" if number == 1 else f"{word}s are"
