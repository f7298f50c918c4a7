"""Loaders whose order an interrupted run takes up again in the middle of an epoch.

Not torchdata's ``StatefulDataLoader`` (0.11): Lightning tells the epoch after it made a resumed iterator, so
a later epoch goes on in the order of the first. A sampler that waits mends it, in more lines than these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """An order for every epoch, shared out among the processes of a distributed run.

    A ``DistributedSampler``, so Lightning calls ``set_epoch`` and puts no sampler of its own in its place,
    whatever ``Trainer(use_distributed_sampler)`` says. Every process gets equally many; the fewer than
    ``num_replicas`` that are over are left out. Subclasses say the order.

    Args:
        items: what is put in order; its length counts.
        num_replicas: number of processes.
        rank: this process, in ``[0, num_replicas)``.
        seed: of the order.
    """

    def __init__(self, items: Any, *, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(items, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.skip_once = 0  # of its items, which the next iteration leaves out: a resumed run has seen them

    def order(self) -> Sequence[Any]:
        """What the processes get together in the epoch ``self.epoch``, as many as there are items."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Any]:
        mine = self.order()[self.rank : self.num_samples * self.num_replicas : self.num_replicas]
        first, self.skip_once = self.skip_once, 0
        return iter(mine[first:])


class ResumableLoader(DataLoader[Any]):
    """A loader over an :class:`EpochSampler` that knows how far it has come in its epoch.

    The sampler is the ``sampler`` of the loader's ``batch_sampler``, as it is in any loader with a
    ``batch_size``. Lightning saves the state of a loader that has one, and gives it back before it resumes.
    """

    _delivered = 0
    _resume_at = (0, 0)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, of which only the first `next` runs anything: Lightning makes the iterator of a resumed
        # epoch before it tells the sampler which epoch that is.
        epoch, batches = self._resume_at
        self._resume_at = (0, 0)
        self._delivered = 0
        sampler = self._epoch_sampler()
        if sampler is not None and epoch == sampler.epoch:
            self._delivered = batches
            sampler.skip_once = batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Which epoch this is, and how many of its batches were delivered."""
        sampler = self._epoch_sampler()
        return {"epoch": 0 if sampler is None else sampler.epoch, "batches": self._delivered}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on after the batches that were delivered, if the epoch is still the same."""
        self._resume_at = (state_dict["epoch"], state_dict["batches"])

    def _epoch_sampler(self) -> EpochSampler | None:
        # `Trainer(overfit_batches)` puts a sampler without epochs in the place of ours.
        sampler = getattr(self.batch_sampler, "sampler", None)
        return sampler if isinstance(sampler, EpochSampler) else None
