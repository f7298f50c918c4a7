"""Products with a weight of which some entries are stored, and their gradients.

The dense weight exists while a product runs, and is made again for the backward one; its dense gradient
exists until the stored entries are read out of it. Neither is ever kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_memtrain.compat.torch_private import disable_dynamo
from lightning_memtrain.sparsity.storage.candidate_search import CandidateSearch
from lightning_memtrain.sparsity.storage.patterns import Span, decode


class ConvolutionGeometry(NamedTuple):
    """How a convolution goes over its input, one number per axis of the image.

    Args:
        stride: step of the kernel.
        padding: zeros on both sides.
        dilation: step within the kernel.
        transposed: whether it is the transposed convolution.
        output_padding: of a transposed convolution.
        groups: that channels are divided into.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def scatter_to_dense(values: Tensor, positions: Tensor, numel: int) -> Tensor:
    """Values at their positions, zeros elsewhere.

    Args:
        values: floating point ``(nnz,)``.
        positions: int32 ``(nnz,)``, each once.
        numel: length of the result.

    Returns:
        A new tensor ``(numel,)`` of the dtype of the values.
    """
    return values.new_zeros(numel).index_add_(0, positions, values)


@disable_dynamo
def run_uncompiled(function: Callable[..., Any], *arguments: Any) -> Tensor:
    """Run what looks for candidates, which a compiled backward cannot.

    Args:
        function: gives a tensor.
        *arguments: of it.

    Returns:
        What it gives.
    """
    result: Tensor = function(*arguments)
    return result


class DenseWeightFunction(Function):
    """The dense weight itself, for code that asks for it."""

    @staticmethod
    def forward(
        values: Tensor, pattern: Tensor, shape: Sequence[int], search: CandidateSearch | None
    ) -> Tensor:
        """Make the dense weight, of the given shape, from values and pattern."""
        numel = math.prod(shape)
        return scatter_to_dense(values, decode(pattern, numel, _whole(values, numel)), numel).view(shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the pattern for backward."""
        values, pattern, _, ctx.search = inputs
        ctx.save_for_backward(pattern)
        ctx.nnz = values.numel()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Read the stored entries out of the gradient."""
        (pattern,) = ctx.saved_tensors
        positions = decode(pattern, gradient.numel(), Span(0, gradient.numel(), 0, ctx.nnz))
        gradient = gradient.reshape(-1)
        if ctx.search is not None:
            ctx.search.observe(gradient, positions, 0)
            ctx.search.end_pass()
        return gradient.index_select(0, positions), None, None, None


class SparseLinearFunction(Function):
    """``torch.nn.functional.linear``, whole or by chunks of rows of the weight."""

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        pattern: Tensor,
        bias: Tensor | None,
        shape: tuple[int, int],
        spans: tuple[Span, ...],
        dtype: torch.dtype,
        search: CandidateSearch | None,
    ) -> Tensor:
        """The product of ``x`` ``(..., in_features)`` with the dense weight, in ``dtype``, and the bias."""
        if len(spans) == 1:
            weight = _dense(values, pattern, math.prod(shape), spans[0], dtype)
            output = torch.nn.functional.linear(x, weight.view(shape), bias)
            # Of a matrix it is torch's own result, else a view of it, which nobody could change in place.
            return output if x.dim() == 2 else torch.ops.aten._unsafe_view(output, output.shape)
        output = x.new_empty(*x.shape[:-1], shape[0])
        for span, rows in _row_chunks(spans, shape):
            weight = _dense(values, pattern, math.prod(shape), span, dtype).view(-1, shape[1])
            output[..., rows] = torch.nn.functional.linear(x, weight, None if bias is None else bias[rows])
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward products need; of the weight, what is stored."""
        x, values, pattern, _, *ctx.settings = inputs
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, values, pattern)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the values and the bias."""
        x, values, pattern = ctx.saved_tensors
        (out_features, in_features), spans, dtype, search = ctx.settings
        needs_x, needs_values, _, needs_bias, *_ = ctx.needs_input_grad
        numel = out_features * in_features
        leading = gradient.shape[:-1]
        of_values: list[Tensor] = []
        of_x: Tensor | None = None
        with _without_autocast(gradient):
            gradient = gradient.reshape(-1, out_features)
            for span, rows in _row_chunks(spans, (out_features, in_features)):
                part = gradient if len(spans) == 1 else gradient[:, rows]
                positions = decode(pattern, numel, span)
                if needs_x:
                    weight = scatter_to_dense(
                        _part(values, span, dtype), positions, span.position_stop - span.position_start
                    )
                    product = part @ weight.view(-1, in_features)
                    del weight  # before the gradient of the same size comes
                    of_x = product if of_x is None else of_x.add_(product)
                    del product
                if needs_values:
                    of_weight = (part.t() @ x.reshape(-1, in_features)).view(-1)
                    of_values.append(of_weight.index_select(0, positions).to(values.dtype))
                    if search is not None:
                        search.observe(of_weight, positions, span.position_start)
                    del of_weight
            if search is not None and needs_values:
                search.end_pass()
            return (
                of_x.view(*leading, in_features) if of_x is not None else None,
                _joined(of_values),
                None,
                gradient.sum(0) if needs_bias else None,
                *(None,) * 4,
            )


class SparseConvolutionFunction(Function):
    """``torch.convolution``: one to three axes, transposed or not."""

    @staticmethod
    def forward(
        x: Tensor,
        values: Tensor,
        pattern: Tensor,
        bias: Tensor | None,
        shape: tuple[int, ...],
        geometry: ConvolutionGeometry,
        dtype: torch.dtype,
        search: CandidateSearch | None,
    ) -> Tensor:
        """The convolution of ``x`` ``(batch, channels, ...)`` with the dense weight, in ``dtype``."""
        numel = math.prod(shape)
        weight = _dense(values, pattern, numel, _whole(values, numel), dtype).view(shape)
        return torch.convolution(x, weight, bias, *geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep what the backward convolutions need; of the weight, what is stored."""
        x, values, pattern, bias, *ctx.settings = inputs
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.save_for_backward(x, values, pattern)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the input, the values and the bias."""
        x, values, pattern = ctx.saved_tensors
        shape, geometry, dtype, search = ctx.settings
        needs_x, needs_values, _, needs_bias, *_ = ctx.needs_input_grad
        numel = math.prod(shape)
        span = _whole(values, numel)

        def products(weight: Tensor, *mask: bool) -> tuple[Any, ...]:
            made: tuple[Any, ...] = torch.ops.aten.convolution_backward(
                gradient, x, weight, ctx.bias_shape, *geometry, mask
            )
            return made

        of_x = of_values = of_bias = None
        with _without_autocast(gradient):
            positions = decode(pattern, numel, span)
            if needs_x:
                weight = scatter_to_dense(_part(values, span, dtype), positions, numel).view(shape)
                of_x, _, _ = products(weight, True, False, False)
                del weight  # before the gradient of the same size comes
            if needs_values or needs_bias:
                # Of the weight, these need the shape only.
                shape_only = values.new_empty(1, dtype=dtype).expand(shape)
                _, of_weight, of_bias = products(shape_only, False, needs_values, needs_bias)
            if needs_values:
                of_weight = of_weight.reshape(-1)
                of_values = of_weight.index_select(0, positions).to(values.dtype)
                if search is not None:
                    search.observe(of_weight, positions, 0)
                    search.end_pass()
        return of_x, of_values, None, of_bias, *(None,) * 4


def _whole(values: Tensor, numel: int) -> Span:
    return Span(0, numel, 0, values.numel())


def _part(values: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """The values of a span, in the dtype of the product: theirs, or that of autocast."""
    return values[span.value_start : span.value_stop].to(dtype)


def _dense(values: Tensor, pattern: Tensor, numel: int, span: Span, dtype: torch.dtype) -> Tensor:
    positions = decode(pattern, numel, span)
    return scatter_to_dense(_part(values, span, dtype), positions, span.position_stop - span.position_start)


def _row_chunks(spans: tuple[Span, ...], shape: tuple[int, int]) -> Iterator[tuple[Span, slice]]:
    for span in spans:
        yield span, slice(span.position_start // shape[1], span.position_stop // shape[1])


def _joined(parts: list[Tensor]) -> Tensor | None:
    if len(parts) > 1:
        return torch.cat(parts)
    return parts[0] if parts else None


def _without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Backward runs in the dtypes of forward, even where somebody calls it under autocast."""
    device_type = like.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
