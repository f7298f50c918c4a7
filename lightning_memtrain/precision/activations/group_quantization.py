r"""From numbers to codes of 8, 4 or 2 bits and back: pure functions on groups of consecutive numbers.

A group :math:`x_1, \dots, x_g` is kept as its smallest number :math:`b`, a step
:math:`s \ge (\max x - b) / (2^{\text{bits}} - 1)` and a code per number,

.. math:: c_i = \operatorname{round}((x_i - b) / s), \qquad \hat x_i = b + c_i s.

In a group whose smallest number is 0, which is what ReLU makes, :math:`c_i = 0` exactly where
:math:`x_i = 0`: backward of ReLU asks which results are positive, and small ones that became 0 would bias
every gradient. There a number may be off by a whole step, elsewhere by half of one, or with noise by a whole
one.

A group with infinities or NaN keeps them: three codes are set aside for them, and the others hold the finite
numbers (with 2 bits one is left, the smallest number). The step of such a group is negative.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Most bits that a float32 has after those of a bfloat16.
_BITS_CUT = 0xFFFF
#: Smallest and largest steps. At the smallest a multiple of the step is no zero in the tensor's own dtype.
_SMALLEST_STEP = 2.0**-126
_SMALLEST_STEP_FLOAT16 = 2.0**-24
_LARGEST_STEP = 2.0**120
#: Codes for infinity, minus infinity and NaN in groups that have any.
_NUM_SPECIAL = 3


class QuantizedGroups(NamedTuple):
    """Quantized numbers.

    Args:
        codes: of shape ``(num_groups, group_size * bits / 8)``, uint8; each byte holds ``8 / bits`` codes.
        base: smallest number per group, float32.
        step: difference between neighbouring codes per group, bfloat16; negative where a group has
            infinities or NaN.
    """

    codes: Tensor
    base: Tensor
    step: Tensor


def quantize(values: Tensor, bits: int, noise: Tensor | None = None) -> QuantizedGroups:
    """Quantize groups of numbers.

    Args:
        values: of shape ``(num_groups, group_size)``; float32, bfloat16 or float16.
        bits: 8, 4 or 2.
        noise: of the shape of ``values``, uniform in ``[0, 1)``: codes are then rounded up or down at
            random, with the exact number as their mean (but for the smallest in a group that begins at 0).

    Returns:
        Codes and what they mean.

    Example:
        >>> quantize(torch.tensor([[0.0, 0.01, 1.0, 3.0]]), bits=2).codes  # the codes 0, 1, 1, 3
        tensor([[212]], dtype=torch.uint8)
    """
    x = values.float()
    low, high = x.aminmax(dim=1, keepdim=True)
    if _on_cpu(values) and bool((high - low).isfinite().all()):
        return _quantize_finite(x, low, high, bits, noise, values.dtype)
    return quantize_any(values, bits, noise)


def quantize_any(values: Tensor, bits: int, noise: Tensor | None = None) -> QuantizedGroups:
    """Quantize as :func:`quantize`, by operations that do not depend on the numbers, which a compiler needs.

    Args:
        values: of shape ``(num_groups, group_size)``; float32, bfloat16 or float16.
        bits: 8, 4 or 2.
        noise: of the shape of ``values``, float32, see :func:`quantize`.

    Returns:
        Codes and what they mean.
    """
    levels = 2**bits - 1
    x = values.float()
    finite = x.isfinite()
    low = torch.where(finite, x, torch.inf).amin(1, keepdim=True)
    high = torch.where(finite, x, -torch.inf).amax(1, keepdim=True)
    empty = low > high
    low = torch.where(empty, 0.0, low)
    high = torch.where(empty, 0.0, high)
    special = ~finite.all(1, keepdim=True)
    usable = levels - _NUM_SPECIAL
    top = torch.where(special, float(usable), float(levels))
    step = _step((high - low) / top.clamp_min(1), values.dtype)
    codes = _codes(torch.where(finite, x, low), low, step, noise).minimum(top)
    codes = torch.where(finite, codes, torch.where(x > 0, float(levels), float(levels - 1)))
    codes = torch.where(x.isnan(), float(levels - 2), codes)
    signed = torch.where(special, -step, step)
    return QuantizedGroups(pack_bits(codes.to(torch.uint8), bits), low, signed.to(torch.bfloat16))


def _quantize_finite(
    x: Tensor, low: Tensor, high: Tensor, bits: int, noise: Tensor | None, dtype: torch.dtype
) -> QuantizedGroups:
    levels = 2**bits - 1
    step = _step((high - low) / levels, dtype)
    codes = _codes(x, low, step, noise).clamp_(max=levels)
    return QuantizedGroups(pack_bits(codes.to(torch.uint8), bits), low, step.to(torch.bfloat16))


def _step(step: Tensor, dtype: torch.dtype) -> Tensor:
    """The next larger number that a bfloat16 can hold, so that the codes reach the largest number."""
    smallest = _SMALLEST_STEP_FLOAT16 if dtype == torch.float16 else _SMALLEST_STEP
    step = step.clamp(smallest, _LARGEST_STEP)
    return ((step.view(torch.int32) + _BITS_CUT) & ~_BITS_CUT).view(torch.float32)


def _codes(x: Tensor, low: Tensor, step: Tensor, noise: Tensor | None) -> Tensor:
    codes = (x - low).mul_(1.0 / step)
    codes = codes.round_() if noise is None else codes.add_(noise).floor_()
    # Where the smallest is 0, 0 is code 0 and nothing else is.
    return codes.maximum((x > 0).logical_and_(low == 0))


def dequantize(groups: QuantizedGroups, bits: int, dtype: torch.dtype) -> Tensor:
    """The numbers that codes stand for.

    Args:
        groups: of :func:`quantize`.
        bits: 8, 4 or 2.
        dtype: of the result.

    Returns:
        Of shape ``(num_groups, group_size)``.

    Example:
        >>> groups = quantize(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), bits=2)
        >>> dequantize(groups, bits=2, dtype=torch.float32)
        tensor([[0., 1., 2., 3.]])
    """
    if _on_cpu(groups.step) and not bool((groups.step < 0).any()):
        values = unpack_bits(groups.codes, bits).float().mul_(groups.step.float()).add_(groups.base)
        return _within(values, dtype)
    return dequantize_any(groups, bits, dtype)


def dequantize_any(groups: QuantizedGroups, bits: int, dtype: torch.dtype) -> Tensor:
    """Dequantize as :func:`dequantize`, by operations that do not depend on the numbers.

    Args:
        groups: of :func:`quantize`.
        bits: 8, 4 or 2.
        dtype: of the result.

    Returns:
        Of shape ``(num_groups, group_size)``.
    """
    levels = 2**bits - 1
    codes = unpack_bits(groups.codes, bits)
    step = groups.step.float()
    values = _within(codes.float() * step.abs() + groups.base, dtype)
    special = (step < 0).logical_and(codes >= levels - 2)
    infinite = torch.where(codes == levels, torch.inf, -torch.inf)
    return torch.where(special, torch.where(codes == levels - 2, torch.nan, infinite).to(dtype), values)


def _within(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast; what lies half a step beyond the largest number of a dtype becomes that, not infinity."""
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Put ``8 / bits`` codes into each byte: the first part of a row, then the second above it, and so on.

    Args:
        codes: of shape ``(num_groups, group_size)``, uint8, each less than ``2**bits``.
        bits: 8, 4 or 2.

    Returns:
        Of shape ``(num_groups, group_size * bits / 8)``, uint8.
    """
    if bits == 8:
        return codes
    parts = codes.chunk(8 // bits, dim=1)
    packed = parts[0].clone()
    for index, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * index)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Take codes out of bytes, the inverse of :func:`pack_bits`.

    Args:
        packed: of shape ``(num_groups, group_size * bits / 8)``, uint8.
        bits: 8, 4 or 2.

    Returns:
        Of shape ``(num_groups, group_size)``, uint8.
    """
    if bits == 8:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * index)) & mask for index in range(8 // bits)], dim=1)


def _on_cpu(tensor: Tensor) -> bool:
    """Whether asking for a number costs nothing; elsewhere it would wait for the device."""
    return tensor.device.type == "cpu"
