"""What a plan says of where its times come from."""

from __future__ import annotations

from lightning_memtrain.checkpointing.selection.step_profile import Times
from lightning_memtrain.planning.fit.seconds.roofline import RooflineSeconds


def note_on_times(times: Times, num_timed: int) -> str:
    """Say how good the times of a plan are.

    Args:
        times: of operators.
        num_timed: ways that were run for real.

    Returns:
        A sentence; empty if there is nothing to say.
    """
    if isinstance(times, RooflineSeconds):
        if not times.is_known:
            return "Times come from round figures for any GPU: nominal speeds of this one are not known."
        return (
            "Times come from nominal speeds of this GPU (operations, bytes, launches) and assumed shares "
            "of them; nobody has checked them on a device."
        )
    if num_timed:
        return (
            "The fastest ways were run for real for some chunks, to see how long they take; times of the "
            "others, and of the run as it is, follow from that and from their operators."
        )
    return ""
