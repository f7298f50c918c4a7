"""Ways that no curve leads to: networks recomputed as a whole, and what more could be allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product

from lightning_memtrain.planning.fit.choice.family import BATCHNORM, Family
from lightning_memtrain.planning.fit.choice.pairs import Pair
from lightning_memtrain.planning.fit.techniques import Switch
from lightning_memtrain.planning.fit.trials.tried_ways import Segments, Tried

Found = tuple[Family, Pair]

# With more networks each is recomputed as a whole or not at all.
_FEW_NETWORKS = 2
_MOST_NETWORKS = 3


def recomputed_networks(family: Family, plain: Tried, limit_bytes: int) -> Found | None:
    """Recompute networks of a module that steps by itself, such as a GAN.

    Its step has several backwards, and curves follow the first of them. So networks are recomputed as wholes
    or child by child, all in turn.

    Args:
        family: what is switched on.
        plain: the run as it is.
        limit_bytes: most bytes that the device must have.

    Returns:
        The fastest pair within the limit; ``None`` if there is none, or the module does not step by itself.
    """
    facts = plain.trace.facts
    if facts.automatic_optimization:
        return None
    found = []
    for segments in _of_networks(facts.networks):
        with suppress(Exception):  # such as a network that cannot be recomputed
            found.append(family.explorer.at(1, segments))
    fitting = [pair for pair in found if pair.peak_bytes <= limit_bytes]
    best = min(fitting, key=lambda pair: (pair.seconds, pair.peak_bytes), default=None)
    return None if best is None else (family, best)


def _of_networks(networks: Sequence[tuple[str, tuple[str, ...]]]) -> list[Segments]:
    choices: list[list[Segments]] = []
    for name, children in networks[:_MOST_NETWORKS]:
        choices.append([(), ((name,),)])
        if len(networks) <= _FEW_NETWORKS and len(children) > 1:
            choices[-1].append(tuple((child,) for child in children))
    ways = [tuple(segment for one in choice for segment in one) for choice in product(*choices)]
    return [segments for segments in ways if segments]


@dataclass(frozen=True)
class Unlocked:
    """What could be reached if more were allowed.

    Args:
        ways: one or more for each permission.
        least_bytes: by what ``allow`` would have to name, least first; of several names with commas.
    """

    ways: tuple[Found, ...]
    least_bytes: tuple[tuple[str, int], ...]


def unlocks(
    lowest: Family,
    with_batchnorm: Family | None,
    switches: Sequence[Switch],
    make: Callable[..., Family],
    limit_bytes: int,
) -> Unlocked:
    """Try the way that needs least with what was not allowed, one by one and all together.

    Args:
        lowest: has the way that needs least of those that are allowed.
        with_batchnorm: microbatches where layers look across samples; ``None`` where they do not, or that is
            allowed.
        switches: what is not allowed, and could be used.
        make: makes a family with some switches on.
        limit_bytes: where one form of a technique keeps it, stronger ones are not tried.

    Returns:
        What that came to.
    """
    pair = lowest.explorer.floor()
    if lowest.explorer.least_bytes > limit_bytes:  # what saves activations alone is of no help
        switches = [switch for switch in switches if switch.lowers_state]
    found: list[tuple[str, Found]] = []
    if with_batchnorm is not None:
        explorer = with_batchnorm.explorer
        with suppress(Exception):
            found.append((BATCHNORM, (with_batchnorm, explorer.best_tried(limit_bytes) or explorer.floor())))
    late: set[str] = set()
    for name in dict.fromkeys(switch.allow for switch in switches):
        for switch in switches:
            if switch.allow != name or name in late or any(_fits(one, name, limit_bytes) for one in found):
                continue
            family = make(*_beside(lowest.switches, switch), switch)
            for segments in (pair.segments, ()) if switch.replaces_recomputation else (pair.segments,):
                try:
                    found.append((name, (family, family.explorer.at(pair.num_chunks, segments))))
                except TimeoutError:  # other forms of it would take as long
                    late.add(name)
                    break
                except Exception:  # then it does not go with the others
                    continue
    least: dict[str, int] = {}
    for name, (family, reached) in found:
        if not family.by_hand and reached.peak_bytes < min(pair.peak_bytes, least.get(name, pair.peak_bytes)):
            least[name] = reached.peak_bytes
    ranked = sorted(least.items(), key=lambda one: one[1])
    if len(ranked) > 1 and ranked[0][1] > limit_bytes:
        best = {
            name: min(
                (switch for switch in switches if switch.allow == name and not _is_by_hand(found, switch)),
                key=lambda switch: _reached(found, switch),
                default=None,
            )
            for name, _ in ranked
        }
        with suppress(Exception):
            together = [switch for switch in best.values() if switch is not None]
            family = make(*lowest.switches, *together)
            chunks = found[0][1][1] if BATCHNORM in least else pair
            reached = family.explorer.at(chunks.num_chunks, chunks.segments)
            found.append(("", (family, reached)))
            if reached.peak_bytes < ranked[0][1]:
                ranked.append((",".join(least), reached.peak_bytes))
    return Unlocked(tuple(one for _, one in found), tuple(ranked))


def _fits(one: tuple[str, Found], name: str, limit_bytes: int) -> bool:
    return one[0] == name and one[1][1].peak_bytes <= limit_bytes and not one[1][0].by_hand


def _beside(switches: Sequence[Switch], other: Switch) -> list[Switch]:
    return [one for one in switches if not one.instead_of or one.instead_of != other.instead_of]


def _is_by_hand(found: Sequence[tuple[str, Found]], switch: Switch) -> bool:
    return any(switch in family.switches and family.by_hand for _, (family, _) in found)


def _reached(found: Sequence[tuple[str, Found]], switch: Switch) -> int:
    return min((pair.peak_bytes for _, (family, pair) in found if switch in family.switches), default=2**62)
