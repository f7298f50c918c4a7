"""Sizes in bytes, as users write them.

- A whole number is bytes; text is a number with its unit: ``"4GiB"``. Both mean the same everywhere.
- A float between 0 and 1 is a share of the memory of the device that the run is on. It is taken where a size
  is a limit of the run (:class:`ByteLimit`), and never means anything else.

Everything else is refused, ``True``, ``1.0`` and ``0.0`` among them, so that no number changes its meaning by
its type or by a point.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from lightning_memtrain.core.arguments.argument_error import ArgumentError

if TYPE_CHECKING:
    import torch

_FACTORS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", start=1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)")


def parse_bytes(value: int | str, *, argument: str = "parse_bytes(value)") -> int:
    """Read a number of bytes that a person wrote.

    Args:
        value: bytes, at least 1; or a number with a unit: ``B``, ``kB``, ``MB``, ``GB``, ``TB`` (powers
            of 1000) and ``KiB``, ``MiB``, ``GiB``, ``TiB`` (powers of 1024), spelt exactly so.
        argument: what the caller's user has written, for the error, e.g. ``"plan(budget)"``.

    Returns:
        Whole bytes; a fraction of a byte is dropped.

    Raises:
        ArgumentError: if ``value`` is no such number, has no unit or an unknown one, or is less than a byte.

    Example:
        >>> parse_bytes("1.5 GiB"), parse_bytes("800MB"), parse_bytes(4096)
        (1610612736, 800000000, 4096)
    """
    num_bytes = _whole_bytes(value)
    if num_bytes < 1:
        raise ArgumentError(
            f"`{argument}` must be a number of bytes, at least 1, or a text such as '4GiB', '512 MiB' or "
            f"'800MB', but got {value!r}. {_UNITS}"
        )
    return num_bytes


@dataclass(frozen=True)
class ByteLimit:
    """Most bytes that a run may use, as a size or as a share of what the device has.

    A share is of all the memory that torch can use on the device, whoever else uses it: see
    :func:`~lightning_memtrain.core.devices.device_memory.total_device_bytes`. What the process needs besides
    tensors (about half a GiB for CUDA) is in the rest, so a share near 1 leaves too little on small devices.

    Args:
        given: what a user wrote: bytes, at least 1; a text, see :func:`parse_bytes`; or a share as a float
            greater than 0 and less than 1.
        argument: what the user has written it for, for errors, e.g. ``"Microbatching(limit)"``.

    Raises:
        ArgumentError: if it is none of these.

    Example:
        >>> ByteLimit("4GiB").num_bytes, ByteLimit(0.9).num_bytes
        (4294967296, None)
        >>> import torch
        >>> ByteLimit("4GiB").on(torch.device("cpu"))
        4294967296
    """

    given: int | str | float
    argument: str = field(default="ByteLimit(given)", compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self._is_share and _whole_bytes(self.given) < 1:
            name = self.argument.partition("(")[2].rstrip(")")
            raise ArgumentError(
                f"`{self.argument}` must be a number of bytes, at least 1, a text such as '4GiB' or '512 "
                "MiB', or a share of the device's memory as a float greater than 0 and less than 1, such as "
                f"0.9, but got {name}={self.given!r}. {_UNITS}"
            )

    @property
    def _is_share(self) -> bool:
        number: Any = self.given
        is_float = isinstance(number, Real) and not isinstance(number, Integral)
        return is_float and math.isfinite(number) and 0 < number < 1

    @property
    def num_bytes(self) -> int | None:
        """The bytes; ``None`` for a share, which no bytes are known of before there is a device."""
        return None if self._is_share else _whole_bytes(self.given)

    def on(self, device: torch.device) -> int:
        """The bytes on a device.

        Args:
            device: where the run is.

        Returns:
            Whole bytes; a fraction of a byte is dropped.

        Raises:
            ArgumentError: for a share of a device that does not tell what it has, such as the CPU.
        """
        if self.num_bytes is not None:
            return self.num_bytes
        from lightning_memtrain.core.devices.device_memory import total_device_bytes  # imports torch

        total_bytes = total_device_bytes(device)
        if total_bytes is None:
            name = self.argument.partition("(")[2].rstrip(")")
            raise ArgumentError(
                f"`{self.argument}` must be a size on {device.type}, which does not tell what it has, but "
                f"got {name}={self.given!r}, a share of it. Write what the run may take, e.g. '4GiB'."
            )
        return int(total_bytes * Fraction(str(float(self.given))))


_UNITS = f"The units are {', '.join(_FACTORS)}; capitals matter."


def _whole_bytes(value: object) -> int:
    """The bytes that something is; 0 for what is no size."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, str) and (found := _SIZE.fullmatch(value.strip())) and found[2] in _FACTORS:
        return int(Fraction(found[1]) * _FACTORS[found[2]])
    return 0
