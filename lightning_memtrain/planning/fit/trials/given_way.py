"""A way that somebody has written, tried as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.planning.fit.trials.switched_on import SwitchedOn
from lightning_memtrain.planning.fit.trials.workshop import Workshop
from lightning_memtrain.planning.fit.way import Way


class WayPredictor:
    """Predicts ways of a run that was planned.

    Args:
        workshop: tries them.
        plain: the run as it is.
        plain_seconds: of its step.
    """

    def __init__(self, workshop: Workshop, plain: Way, plain_seconds: float) -> None:
        self._workshop = workshop
        self._plain = plain
        self._plain_seconds = plain_seconds

    def __call__(self, way: Way) -> Way:
        """Try a way.

        Args:
            way: any, such as one that was edited.

        Returns:
            The way with what it needs, how long it takes, and whether its techniques say that they are exact.

        Raises:
            ArgumentError: if a trial of it fails, with what went wrong.
        """
        if way.is_plain:
            return self._plain
        num_chunks, size = self._chunks(way)
        # Only some of many chunks are run, so that their number is no part of it.
        techniques = tuple(
            replace(one, init_args={**_without(one.init_args, "num_microbatches"), "microbatch_size": size})
            if one.name == "Microbatching" and num_chunks > 1
            else one
            for one in way.techniques
        )
        on = SwitchedOn(techniques, (), way.trainer_arguments)
        try:
            tried = self._workshop.run(num_chunks, (), on, size=size)
        except Exception as error:
            said = str(error).splitlines()[0] if str(error) else repr(error)
            raise ArgumentError(
                f"`Plan.edit(changes)` must make a way that can run, but got {way}: {said}"
            ) from error
        finally:
            self._workshop.close()
        seconds = self._workshop.seconds(tried)
        inexact = [
            one.name
            for one in way.techniques
            if self._workshop.exact.get((one.name, num_chunks > 1)) is False
        ]
        inexact += [name for name in way.trainer_arguments if name == "precision"]
        return replace(
            way,
            allocated_bytes=tried.allocated_bytes,
            reserved_bytes=tried.needed_bytes - self._workshop.device.context_bytes,
            time_ratio=seconds / self._plain_seconds if self._plain_seconds else None,
            exact=not inexact,
            changes=tuple(f"{name} changes the result" for name in inexact),
        )

    def _chunks(self, way: Way) -> tuple[int, int]:
        """How many chunks, and samples of the largest."""
        batch_size = self._workshop.batch_size or 1
        settings = next((one.init_args for one in way.techniques if one.name == "Microbatching"), {})
        count, size = settings.get("num_microbatches", 1), settings.get("microbatch_size")
        if not isinstance(count, int) or not isinstance(size, (int, type(None))):
            raise ArgumentError(
                "`Plan.edit(Microbatching)` must have a number of samples or of microbatches to be "
                f"predicted, but got {dict(settings)!r}. Write e.g. Microbatching={{'microbatch_size': 4}}."
            )
        if size is not None:
            size = min(size, batch_size)
            return -(-batch_size // size), size
        return count, -(-batch_size // count)


def _without(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != name}
