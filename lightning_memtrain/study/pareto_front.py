"""Which settings no other one beats in everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def pareto_front(costs: Mapping[str, Sequence[float]]) -> list[str]:
    """Find what is not beaten.

    Args:
        costs: by name, numbers of which less is better each; all have equally many.

    Returns:
        The names of those that no other one beats: that no other one is at most as costly in every number as
        and less costly in one. In order of their first number.

    Example:
        >>> pareto_front({"plain": (100, 9), "small": (10, 12), "worse": (20, 12), "tiny": (5, 40)})
        ['tiny', 'small', 'plain']
    """

    def beats(one: Sequence[float], other: Sequence[float]) -> bool:
        pairs = list(zip(one, other, strict=True))
        return all(mine <= theirs for mine, theirs in pairs) and any(mine < theirs for mine, theirs in pairs)

    front = [
        name
        for name, cost in costs.items()
        if not any(beats(other, cost) for key, other in costs.items() if key != name)
    ]
    return sorted(front, key=lambda name: tuple(costs[name]))
