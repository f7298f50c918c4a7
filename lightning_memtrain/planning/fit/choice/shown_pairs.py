"""Which of all pairs are shown."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_memtrain.planning.fit.choice.family import Family
from lightning_memtrain.planning.fit.choice.pairs import Pair

_MOST_ROWS = 8


def lowest_of(families: Sequence[Family]) -> Family:
    """The one that can need least.

    Args:
        families: at least one.

    Returns:
        That whose front ends lowest.
    """
    return min(families, key=lambda family: family.explorer.front()[-1].peak_bytes)


def front_of(families: Sequence[Family], chosen: tuple[Family, Pair] | None) -> list[tuple[Family, Pair]]:
    """The pairs of all families that no other one beats.

    Args:
        families: at least one.
        chosen: a pair that is not in its family's front; ``None`` for no other.

    Returns:
        Fastest first, so most bytes first.
    """
    pairs = [(family, pair) for family in families for pair in family.explorer.front()]
    if chosen is not None:
        pairs.append(chosen)
    best: list[tuple[Family, Pair]] = []
    for family, pair in sorted(pairs, key=lambda one: (one[1].seconds, one[1].peak_bytes)):
        if not best or pair.peak_bytes < best[-1][1].peak_bytes:
            best.append((family, pair))
    return best


def thinned(
    pairs: list[tuple[Family, Pair]], chosen: tuple[Family, Pair] | None
) -> list[tuple[Family, Pair]]:
    """Leave out pairs that are near others.

    Args:
        pairs: of a front, most bytes first.
        chosen: the one to take.

    Returns:
        About so many as a table has rows, at even steps of bytes, with both ends and what was chosen.
    """
    if len(pairs) <= _MOST_ROWS:
        return pairs
    most, least = pairs[0][1].peak_bytes, pairs[-1][1].peak_bytes
    kept = {0, len(pairs) - 1}
    for row in range(1, _MOST_ROWS - 1):
        wanted = most - (most - least) * row / (_MOST_ROWS - 1)
        kept.add(min(range(len(pairs)), key=lambda place: abs(pairs[place][1].peak_bytes - wanted)))
    if chosen in pairs:
        kept.add(pairs.index(chosen))
    return [pairs[place] for place in sorted(kept)]
