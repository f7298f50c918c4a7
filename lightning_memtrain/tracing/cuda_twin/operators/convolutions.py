"""What cuDNN may take for a while in a convolution, which nobody can tell without the GPU: a stated bound."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
_FORWARD = _aten.convolution.default
_BACKWARD = _aten.convolution_backward.default


def unfolded_bytes(func: Any, args: Any, result: Any) -> int:
    """The matrix of a convolution that is computed as one explicit product of matrices.

    By its reference, cuDNN has algorithms without any workspace, with one for indices or transformed tiles,
    and with one for this matrix (``CUDNN_CONVOLUTION_FWD_ALGO_GEMM``, and their like for gradients). Which
    one torch gets is cuDNN's choice: by heuristics, or, with ``torch.backends.cudnn.benchmark``, by trying
    all that fit into what is free. Those by Fourier transforms may take more than this matrix.

    Args:
        func: an operator.
        args: its arguments.
        result: what it returned.

    Returns:
        The bytes; of the larger one of both gradients in backward, 0 for other operators.
    """
    if func is _FORWARD:
        (image, weight), output, gradients = args[:2], result, False
    elif func is _BACKWARD:
        output, image, weight = args[:3]
        gradients = True
    else:
        return 0
    wide = _matrix_bytes(image, output, weight)
    return max(wide, _matrix_bytes(output, image, weight)) if gradients else wide


def _matrix_bytes(source: Tensor, target: Tensor, weight: Tensor) -> int:
    """A row for each entry of ``target``'s area, with the part of ``source`` that it comes from."""
    area, kernel = math.prod(target.shape[2:]), math.prod(weight.shape[2:])
    return source.shape[0] * area * source.shape[1] * kernel * source.element_size()
