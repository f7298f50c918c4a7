"""Positions drawn at random among those that are free."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_free_positions(numel: int, taken: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw positions that are not taken, uniformly and without repetition.

    Memory is in proportion to ``taken`` and ``count``, never to ``numel``: the ``r``-th free position is
    ``r`` plus the number of taken ones before it, which a search in the gaps between them finds.

    Args:
        numel: positions in all.
        taken: int64 of one axis, ascending: those that are not free.
        count: how many to draw, at most all free ones.
        generator: on the CPU.

    Returns:
        Int64 ``(count,)``, ascending, on the device of ``taken``.

    Example:
        >>> sample_free_positions(6, torch.tensor([1, 2, 4]), 3, torch.Generator())
        tensor([0, 3, 5])
    """
    num_free = numel - taken.numel()
    ranks = _sample_sorted(num_free, count, generator).to(taken.device)
    free_before = taken - torch.arange(taken.numel(), device=taken.device)
    return ranks + torch.searchsorted(free_before, ranks, right=True)


def _sample_sorted(total: int, count: int, generator: torch.Generator) -> Tensor:
    """A sorted uniform sample of ``range(total)``, in memory for ``count`` numbers."""
    if count > total // 2:
        left_out = _sample_sorted(total, total - count, generator)
        keep = torch.ones(total, dtype=torch.bool)
        keep[left_out] = False
        return keep.nonzero().flatten()
    drawn = torch.empty(0, dtype=torch.int64)
    # Drawing only as many as are missing never draws too many, so no choice among them can be unfair.
    while (missing := count - drawn.numel()) > 0:
        drawn = torch.cat([drawn, torch.randint(total, (missing,), generator=generator)]).unique()  # type: ignore[no-untyped-call]
    return drawn
