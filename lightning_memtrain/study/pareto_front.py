"""Which settings no other one beats in everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning_memtrain.core import ArgumentError


def pareto_front(costs: Mapping[str, Sequence[float]]) -> list[str]:
    """Find what is not beaten.

    Args:
        costs: by name, numbers of which less is better each; all have equally many.

    Returns:
        The names of those that no other one beats: that no other one is at most as costly in every number as
        and less costly in one. In order of their first number.

    Raises:
        ArgumentError: if one has more numbers than another.

    Example:
        >>> pareto_front({"plain": (100, 9), "small": (10, 12), "worse": (20, 12), "tiny": (5, 40)})
        ['tiny', 'small', 'plain']
    """
    if not isinstance(costs, Mapping) or len({len(cost) for cost in costs.values()}) > 1:
        raise ArgumentError(
            f"`pareto_front(costs)` must be equally many numbers by name, but got {costs!r}. Write e.g. "
            'pareto_front({"plain": (100, 9), "small": (10, 12)}).'
        )

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)

    front = [
        name
        for name, cost in costs.items()
        if not any(beats(other, cost) for key, other in costs.items() if key != name)
    ]
    return sorted(front, key=lambda name: tuple(costs[name]))
