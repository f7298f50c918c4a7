"""Batch norm by statistics that are given, with the gradient of one that has made them itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class GradientSums(NamedTuple):
    """Sums over one chunk of one call's output gradient, plain and times the normalised input."""

    plain: Tensor
    normalised: Tensor
    num_values: int


class NormaliseByGiven(torch.autograd.Function):
    """Batch norm by given statistics, differentiated as if the input had made them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
        correction: tuple[Tensor, Tensor] | None,
        record: Any,
    ) -> Tensor:
        """Normalise an input as batch norm does in evaluation.

        Args:
            ctx: of autograd.
            x: floating-point, of shape ``(samples, channels, ...)``.
            weight: of shape ``(channels,)``; ``None`` for ones.
            bias: of shape ``(channels,)``; ``None`` for zeros.
            mean: of shape ``(channels,)``.
            variance: of shape ``(channels,)``.
            eps: added to the variance.
            correction: means of the two sums over the batch less those over ``x``, each of shape
                ``(channels,)``; ``None`` if they are not known.
            record: called in backward with the sums over ``x``.

        Returns:
            Of the shape and dtype of ``x``.
        """
        inverse_deviation = (variance + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse_deviation)
        ctx.eps, ctx.correction, ctx.record = eps, correction, record
        # In half precision the statistics stay in float32, and torch wants the parameters to be like them.
        weight, bias = (None if p is None else p.to(mean.dtype) for p in (weight, bias))
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, weight and bias, from that of the output, of its shape and dtype."""
        x, weight, mean, inverse_deviation = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        # Torch's own kernel takes the sums over the chunk.
        x_grad, weight_grad, bias_grad = torch.ops.aten.native_batch_norm_backward(
            grad, x, scale, None, None, mean, inverse_deviation, True, ctx.eps, [True, True, True]
        )
        ctx.record(GradientSums(bias_grad, weight_grad, x.numel() // x.size(1)))
        if ctx.correction is not None:
            plain, normalised = ctx.correction
            slope = scale * inverse_deviation.square() * normalised
            offset = scale * inverse_deviation * plain - slope * mean
            shape = [-1 if axis == 1 else 1 for axis in range(x.dim())]
            x_grad.addcmul_(x, slope.view(shape).to(x.dtype), value=-1)
            x_grad.sub_(offset.view(shape).to(x.dtype))
        return (
            x_grad,
            weight_grad.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            bias_grad.to(weight.dtype) if ctx.needs_input_grad[2] else None,
            *(None,) * 5,
        )
