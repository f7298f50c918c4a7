"""How many bytes a limit is, on a device."""

from __future__ import annotations

from typing import TypeAlias

from torch import nn

from lightning_memtrain.core import ArgumentError, ByteLimit, format_bytes, parse_bytes
from lightning_memtrain.tracing.device import Device

#: Bytes, text such as ``"11GiB"``, a fraction of what the device has, or ``None`` for all of that.
Limit: TypeAlias = int | float | str | None


def check_limit(limit: Limit, argument: str) -> None:
    """Refuse what can be no limit on any device.

    Args:
        limit: what the user gave.
        argument: how the user's argument is called in an error.

    Raises:
        ArgumentError: if it is none.
    """
    if limit is not None:
        ByteLimit(limit, argument)


def limit_in_bytes(limit: Limit, device: Device, argument: str, available_bytes: int | None = None) -> int:
    """Find out how many bytes a limit is.

    Args:
        limit: what the user gave, checked by :func:`check_limit`.
        device: the device that it is meant for.
        argument: how the user's argument is called in an error.
        available_bytes: what the device has for this process, its context included; ``None`` for all that
            the driver leaves.

    Returns:
        Bytes; on a GPU its context is among them.

    Raises:
        ArgumentError: if that depends on what the CPU has, or is more than the GPU has.
    """
    has_bytes = device.total_bytes - device.driver_bytes if available_bytes is None else available_bytes
    if limit is None or isinstance(limit, float):
        if not device.is_cuda:
            raise ArgumentError(
                f"`{argument}` must be bytes on the CPU, whose memory belongs to other processes, too, but "
                f"got {limit!r}. Give e.g. limit='4GiB', or name a GPU that `memtrain devices` lists."
            )
        return has_bytes if limit is None else int(limit * has_bytes)
    limit_bytes = parse_bytes(limit, argument=argument)
    total_bytes = device.total_bytes - device.driver_bytes
    if device.is_cuda and limit_bytes > total_bytes:
        raise ArgumentError(
            f"`{argument}` must be at most the {format_bytes(total_bytes)} that {device.name} has, but got "
            f"{limit!r}. Leave it out to use all of it."
        )
    return limit_bytes


def refuse_less_than_weights(
    limit: Limit, limit_bytes: int, model: nn.Module, allow: tuple[str, ...], device: Device, argument: str
) -> None:
    """Refuse a limit that the parameters alone are above.

    Args:
        limit: what the user gave.
        limit_bytes: how many bytes that is.
        model: the module that is trained.
        allow: what may change the result; what makes weights smaller leaves the answer to the search.
        device: the device that it is meant for.
        argument: how the user's argument is called in an error.

    Raises:
        ArgumentError: with what they take.
    """
    if {"bf16", "sparsity"} & set(allow):
        return
    weights_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if weights_bytes + device.context_bytes > limit_bytes:
        context = (
            f" and CUDA's context ({format_bytes(device.context_bytes)})" if device.context_bytes else ""
        )
        raise ArgumentError(
            f"`{argument}` must be more than the parameters take, {format_bytes(weights_bytes)}{context}, "
            f"but got {limit!r}. Give a larger one, or allow smaller weights: allow=('bf16',)."
        )
