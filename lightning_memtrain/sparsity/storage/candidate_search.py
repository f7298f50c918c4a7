"""The largest gradients of entries that are not stored, found while a backward holds the dense gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memtrain.coordination import RestorableState, dry_run_depth, stand_in_values
from lightning_memtrain.sparsity.radix_select import are_largest, keys_of, level_of_largest

# Entries of a dense gradient that are ranked at a time.
_PIECE_NUMEL = 1 << 17


@dataclass(frozen=True)
class Candidates:
    """Entries that are not stored, and the gradient that the loss would have for them.

    Args:
        positions: int64 flat positions in the dense weight, ascending.
        gradients: float32, as many.
    """

    positions: Tensor
    gradients: Tensor


class CandidateSearch:
    """Reduces the dense gradients of one layer to its candidates.

    Args:
        name: of the weight, for errors.
        num_candidates: how many to find, at least 1.
    """

    def __init__(self, name: str, num_candidates: int) -> None:
        self._name = name
        self._num_candidates = num_candidates
        self._found: Candidates | None = None
        self._best: list[Candidates] = []
        self._parts: dict[int, CandidateSearch] = {}

    def part(self, first: int) -> CandidateSearch:
        """The search in a part of the weight that has passes of its own.

        Args:
            first: flat position that it begins with.

        Returns:
            The same one at each call.
        """
        if first not in self._parts:
            self._parts[first] = CandidateSearch(self._name, self._num_candidates)
        return self._parts[first]

    @stand_in_values()
    @torch.no_grad()
    def observe(self, gradient: Tensor, active: Tensor, first: int) -> None:
        """Look through a part of the dense gradient for candidates.

        Args:
            gradient: floating point ``(n,)``: of consecutive entries, behind those that this pass has seen.
            active: int32, ascending: which of them are stored.
            first: flat position of the first of them.
        """
        if dry_run_depth():  # a step without data, which chooses nothing
            return
        gradient = gradient.detach()
        if self._found is not None:
            self._add(gradient, first)
            return
        found = _largest(gradient, active, self._num_candidates)
        self._best.append(Candidates(found.positions.add_(first), found.gradients))
        # Only when there are so many, so that all cuts together take time in proportion to what was seen.
        if sum(len(one.positions) for one in self._best) > 2 * self._num_candidates:
            self._best = [_best(self._best, self._num_candidates)]

    def _add(self, gradient: Tensor, first: int) -> None:
        assert self._found is not None
        low, high = _bounds(self._found.positions, first, first + gradient.numel())
        here = self._found.positions[low:high] - first
        self._found.gradients[low:high] += gradient.index_select(0, here).float()

    @stand_in_values()
    def end_pass(self) -> None:
        """The dense gradient has been seen as a whole: from now on, only the candidates are."""
        if self._best:
            self._found = _best(self._best, self._num_candidates)
            self._best = []

    def restorable_state(self) -> RestorableState:
        """Keep what passes have found so far, since the batch that follows may be begun again."""
        found = self._found
        gradients = None if found is None else found.gradients.clone()
        parts = {first: (search, search.restorable_state()) for first, search in self._parts.items()}

        def restore() -> None:
            self._found, self._best = found, []
            if found is not None and gradients is not None:
                found.gradients.copy_(gradients)
            self._parts = {first: search for first, (search, _) in parts.items()}
            for _, kept in parts.values():
                kept.restore()

        tensors = () if gradients is None else (gradients,)
        return RestorableState(
            tensors + tuple(one for _, kept in parts.values() for one in kept.tensors), restore
        )

    @stand_in_values()
    def result(self) -> Candidates:
        """The candidates that all passes have found.

        Returns:
            The candidates, ascending.

        Raises:
            RuntimeError: if no backward came through the layer.
        """
        found = [one._found for one in (self, *self._parts.values()) if one._found is not None]
        if not found:
            raise RuntimeError(
                f"No candidates for {self._name!r}: no backward came through its layer while it was watched. "
                "Watch before the forward of the step, and leave out layers that take no part in the loss or "
                "are frozen."
            )
        return found[0] if len(found) == 1 else _merged(found, self._num_candidates)


def _bounds(ascending: Tensor, *borders: int) -> list[int]:
    found = torch.tensor(borders, dtype=ascending.dtype, device=ascending.device)
    places: list[int] = torch.searchsorted(ascending, found).tolist()
    return places


def _largest(gradient: Tensor, active: Tensor, count: int) -> Candidates:
    """At least so many that are not active, ascending, and at most twice as many, the largest among them.

    The gradient is gone through by the piece, two or three times.
    """
    firsts = range(0, gradient.numel(), _PIECE_NUMEL)
    borders = _bounds(active, *firsts, gradient.numel())
    room = gradient.new_empty(min(_PIECE_NUMEL, gradient.numel()), dtype=torch.float32)

    def keys_without_active(fill: int) -> Iterator[Tensor]:
        for first, low, high in zip(firsts, borders[:-1], borders[1:], strict=True):
            piece = gradient[first : first + _PIECE_NUMEL]
            keys = room[: len(piece)].copy_(piece).abs_().view(torch.int32)
            yield keys.index_fill_(0, active[low:high].sub(first).long(), fill)

    num_free = gradient.numel() - len(active)
    if not num_free:
        return Candidates(active.new_empty(0, dtype=torch.int64), gradient.new_empty(0, dtype=torch.float32))
    level = level_of_largest(
        lambda: keys_without_active(0), min(count, num_free), num_void=len(active), most_tied=count
    )
    are_few_tied, chosen = level.num_tied <= count, []
    num_equal = 0 if are_few_tied else level.num_equal
    for first, keys in zip(firsts, keys_without_active(-1), strict=True):
        is_chosen = keys >= level.key if are_few_tied else keys > level.key
        if num_equal:  # so many are equal that the first of them have to do
            equal = (keys == level.key).nonzero().view(-1)[:num_equal]
            is_chosen[equal] = True
            num_equal -= len(equal)
        chosen.append(is_chosen.nonzero().view(-1).add_(first))
    positions = torch.cat(chosen)
    return Candidates(positions, gradient.index_select(0, positions).float())


def _best(parts: list[Candidates], count: int) -> Candidates:
    """Of all parts, in their order."""
    positions = torch.cat([part.positions for part in parts])
    gradients = torch.cat([part.gradients for part in parts])
    if len(positions) <= count:
        return Candidates(positions, gradients)
    chosen = are_largest(keys_of(gradients), count, first=True)
    return Candidates(positions[chosen], gradients[chosen])


def _merged(parts: list[Candidates], count: int) -> Candidates:
    """The best of several searches, ascending; a position that two have found has the sum of both."""
    positions, where = torch.unique(torch.cat([part.positions for part in parts]), return_inverse=True)
    gradients = torch.cat([part.gradients for part in parts])
    summed = gradients.new_zeros(len(positions)).index_add_(0, where, gradients)
    return _best([Candidates(positions, summed)], count)
