r"""Numbers in 8 bits, scaled by the block.

Of a block :math:`x_1, \dots, x_{256}` with :math:`s = \max_i |x_i| / 127`, the codes are
:math:`q_i = \mathrm{round}(x_i / s)`, in 8 bits, and :math:`s` is kept in float32: 1.016 bytes per number.
:math:`s q_i` is within :math:`s / 2` of :math:`x_i`, and 0 stays 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE = 256
_LARGEST_CODE = 127


def num_blocks(numel: int) -> int:
    """Blocks that so many numbers make; the last one may be short.

    Args:
        numel: at least 0.

    Returns:
        The number of scales.
    """
    return -(-numel // BLOCK_SIZE)


def quantize_blockwise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of numbers.

    Args:
        values: float32, of one axis.

    Returns:
        One int8 code per number, and one float32 scale per block. A block with an infinite or undefined
        number gets an undefined scale, so that this is not hidden.

    Example:
        >>> codes, scales = quantize_blockwise(torch.tensor([0.0, 0.5, -1.27]))
        >>> codes.tolist(), round(scales.item(), 4)
        ([0, 50, -127], 0.01)
    """
    blocks = _blocks(values)
    scales = blocks.abs().amax(dim=1, keepdim=True).div_(_LARGEST_CODE)
    # An empty block, and one whose largest number is too small to be divided by, become zeros.
    scaled = torch.where(scales > 0, blocks / scales, blocks.sign()).nan_to_num_(0.0, 0.0, 0.0)
    codes = scaled.round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
    finite = scales.isfinite()
    scales = torch.where(finite, scales, torch.full_like(scales, torch.nan))
    codes = torch.where(finite, codes, torch.ones_like(codes))
    return codes.flatten()[: values.numel()], scales.flatten()


def dequantize_blockwise(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers that codes and scales stand for.

    Args:
        codes: of :func:`quantize_blockwise`: int8, of one axis.
        scales: of :func:`quantize_blockwise`: float32, of one axis, one per block.

    Returns:
        float32, of one axis.

    Example:
        >>> dequantize_blockwise(torch.tensor([0, 50, -127], dtype=torch.int8), torch.tensor([0.01])).tolist()
        [0.0, 0.5, -1.2699999809265137]
    """
    return (_blocks(codes.float()) * scales.unsqueeze(1)).flatten()[: codes.numel()]


def _blocks(values: Tensor) -> Tensor:
    missing = num_blocks(values.numel()) * BLOCK_SIZE - values.numel()
    return (F.pad(values, (0, missing)) if missing else values).view(-1, BLOCK_SIZE)
