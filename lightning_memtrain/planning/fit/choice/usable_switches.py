"""Which techniques a run may have switched on, and which it may not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning_memtrain.planning.fit.techniques import Switch
from lightning_memtrain.planning.fit.trials.step_trace import RunFacts
from lightning_memtrain.planning.fit.way import Refused


class UsableSwitches:
    """Techniques, and what a run says to them before any is tried.

    Args:
        switches: all that are known.
        allow: what may change the result.
        own: class names of the callbacks that the Trainer has.
    """

    def __init__(self, switches: Sequence[Switch], allow: Collection[str], own: Collection[str]) -> None:
        self._switches = switches
        self._allow = allow
        self._own = frozenset(own)

    def is_own(self, switch: Switch, facts: RunFacts) -> bool:
        """Whether the Trainer has it already."""
        return bool(self._own & {one.name for one in switch.settings(facts, 1)})

    def usable(self, facts: RunFacts) -> tuple[list[Switch], list[Refused]]:
        """What may be tried, and what may not, with the reasons.

        Args:
            facts: about the run.

        Returns:
            Both.
        """
        found: list[Switch] = []
        refused: list[Refused] = []
        changing: dict[str, list[str]] = {}
        for switch in self._switches:
            if not switch.is_of_use(facts):
                continue
            if self._changes(switch):
                changing.setdefault(switch.allow, []).append(switch.name)
            elif self.is_own(switch, facts):
                refused.append(Refused(switch.name, "the Trainer has it already"))
            elif switch.refusal(facts, 1):
                refused.append(Refused(switch.name, switch.refusal(facts, 1)))
            else:
                found.append(switch)
        for allow, names in changing.items():
            refused.append(Refused(", ".join(names), "changes the result", allow))
        return found, refused

    def not_allowed(self, facts: RunFacts) -> list[Switch]:
        """What could be used if its change of the result were allowed.

        Args:
            facts: about the run.

        Returns:
            The techniques.
        """
        return [
            switch
            for switch in self._switches
            if self._changes(switch)
            and switch.is_of_use(facts)
            and not switch.refusal(facts, 1)
            and not self.is_own(switch, facts)
        ]

    def _changes(self, switch: Switch) -> bool:
        return bool(switch.allow) and switch.allow not in self._allow
