"""Weights whose candidates are searched for in backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_memtrain.coordination import register_restorable
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import is_whole, wrong
from lightning_memtrain.sparsity.storage.candidate_search import Candidates, CandidateSearch
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, check_weights


class CandidateWatch:
    """Searches that are going on; ended by :meth:`close`, or by leaving its ``with`` block.

    Args:
        weights: the weights that are watched.
        searches: the search of each.
    """

    def __init__(self, weights: Mapping[str, SparseWeight], searches: Mapping[str, CandidateSearch]) -> None:
        self._weights = dict(weights)
        self._searches = dict(searches)
        for name, search in searches.items():
            weights[name].layer.search = search
        self._undo: list[Callable[[], None]] = [
            register_restorable(search.restorable_state) for search in searches.values()
        ]

    def __enter__(self) -> CandidateWatch:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def candidates(self, name: str) -> Candidates:
        """What was found for one weight, which stays there after :meth:`close`.

        Args:
            name: of a weight that is watched.

        Returns:
            As many as were asked for, or all entries that are not stored if these are fewer.

        Raises:
            RuntimeError: if no backward came through the layer.
        """
        return self._searches[name].result()

    def close(self) -> None:
        """End the search; further calls do nothing."""
        for name, search in self._searches.items():
            layer = self._weights[name].layer
            if layer.search is search:
                layer.search = None
        for undo in self._undo:
            undo()


def watch_candidates(
    weights: Mapping[str, SparseWeight], num_candidates: Mapping[str, int]
) -> CandidateWatch:
    """Find the largest gradients among entries that are not stored, without keeping a dense gradient.

    Each backward through a watched layer reduces the dense gradient while the layer's own backward holds it.
    The first pass picks the candidates; further ones (micro-batches, accumulated batches, a layer that is
    called twice) add up the gradients of these only. So give a multiple of what will be chosen where several
    passes make one step. Gradients that are not finite rank first, so that a caller can see them.

    A watched layer runs outside ``torch.compile``: its module goes on with a graph break.

    Args:
        weights: of :func:`~lightning_memtrain.sparsity.sparse_weights`.
        num_candidates: how many to find for each name that is to be watched, at least 1.

    Returns:
        The watch, which is on already.

    Raises:
        ArgumentError: if a name is unknown or a number is less than 1.
        ValueError: if a weight is watched already.

    Example:
        >>> import torch
        >>> from lightning_memtrain.sparsity import sparsify_
        >>> layer = torch.nn.Linear(3, 1, bias=False)
        >>> weights = sparsify_(layer, {"weight": torch.tensor([1])})
        >>> with watch_candidates(weights, {"weight": 1}) as watch:
        ...     layer(torch.tensor([[1.0, 5.0, 3.0]])).sum().backward()
        >>> watch.candidates("weight")
        Candidates(positions=tensor([2]), gradients=tensor([3.]))

    References:
        Evci et al., Rigging the Lottery: Making All Tickets Winners, ICML 2020, arXiv:1911.11134.
        Ansell et al., Scaling Sparse Fine-Tuning to Large Language Models, 2024, arXiv:2401.16405.
    """
    check_weights("watch_candidates", weights)
    if not isinstance(num_candidates, Mapping):
        cure = "Write e.g. {'0.weight': 100}."
        raise wrong("watch_candidates", "num_candidates", "numbers by name", num_candidates, cure)
    for name, count in num_candidates.items():
        if name not in weights:
            raise ArgumentError(
                f"`watch_candidates(num_candidates)` must name sparse weights, but got {name!r}. "
                f"There are {', '.join(map(repr, weights))}."
            )
        if not is_whole(count) or count < 1:
            raise ArgumentError(
                f"`watch_candidates(num_candidates)` must be at least 1, but got {count!r} "
                f"for {name!r}. Leave the weight out to not watch it."
            )
        if weights[name].layer.search is not None:
            raise ValueError(f"{name!r} is watched already. Close the other watch first.")
    return CandidateWatch(
        weights, {name: CandidateSearch(name, count) for name, count in num_candidates.items()}
    )
