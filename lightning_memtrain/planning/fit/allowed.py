"""What may change the result of a run, if the user names it: the values of ``allow``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_memtrain.core import ArgumentError


@dataclass(frozen=True)
class Permission:
    """Something that saves memory and changes the result.

    Args:
        name: as ``allow`` wants it.
        changes: what it changes, a phrase.
        accuracy: what is known of its cost, with where that was measured.
        needs_trainer: whether it can only be given to a Trainer when that is made.
    """

    name: str
    changes: str
    accuracy: str
    needs_trainer: bool = False


_CIFAR = "WRN-16-2 on CIFAR-10, 400 steps, one seed, +-0.016"

PERMISSIONS: dict[str, Permission] = {
    one.name: one
    for one in (
        Permission(
            "bf16",
            "computes in bfloat16, which keeps 8 bits of a number",
            f"accuracy 0.449 for 0.461 with weights in bfloat16 and stochastic rounding ({_CIFAR})",
            needs_trainer=True,
        ),
        Permission(
            "8bit-state",
            "keeps the optimizer's state in 8 bits per number",
            f"accuracy 0.447 for 0.461, together with bf16 and activations in 8 bits ({_CIFAR})",
            needs_trainer=True,
        ),
        Permission(
            "compressed-activations",
            "gradients are those of activations rounded to 8 bits",
            f"accuracy 0.447 for 0.461, together with bf16 and state in 8 bits ({_CIFAR})",
        ),
        Permission(
            "sparsity",
            "trains few weights, the others are 0",
            "accuracy 66.2 % for 72.1 % with 90 % zeros (WRN-16-1, CIFAR-10 at 16x16, 15 epochs, 3 seeds)",
            needs_trainer=True,
        ),
        Permission(
            "batchnorm-statistics",
            "batch normalisation sees the samples of a microbatch, not of the batch",
            "the gradient of WRN-28-2 is off by 0.61 of its length with 4 microbatches of 16 (float64)",
        ),
    )
}


def checked_allow(allow: str | Iterable[str], argument: str) -> tuple[str, ...]:
    """Names of what may change the result, each known and there once.

    Args:
        allow: what the user gave: names, or one name.
        argument: how the user's argument is called in an error, e.g. ``"plan(allow)"``.

    Returns:
        The names in the order of :data:`PERMISSIONS`.

    Raises:
        ArgumentError: if it is something else.
        ArgumentError: if one of the names is unknown.

    Example:
        >>> checked_allow(("sparsity", "bf16"), "plan(allow)")
        ('bf16', 'sparsity')
    """
    given: tuple[object, ...]
    if isinstance(allow, str):
        given = tuple(name.strip() for name in allow.split(",") if name.strip())
    elif isinstance(allow, Iterable):
        given = tuple(allow)
    else:
        given = (allow,)
    for name in given:
        if not isinstance(name, str):
            raise ArgumentError(
                f"`{argument}` must be names such as allow=('bf16',), but got {name!r} of type "
                f"{type(name).__name__}. Known are {_known()}."
            )
        if name not in PERMISSIONS:
            near = difflib.get_close_matches(name.lower().replace("_", "-"), PERMISSIONS, n=1, cutoff=0.4)
            cure = f"Did you mean {near[0]!r}? " if near else ""
            raise ArgumentError(f"`{argument}` must be names of {_known()}, but got {name!r}. {cure}{_CURE}")
    return tuple(name for name in PERMISSIONS if name in given)


_CURE = "Leave it out to allow nothing that changes the result."


def _known() -> str:
    return ", ".join(map(repr, PERMISSIONS))
