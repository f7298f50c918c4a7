"""The dense weight of a layer as autograd knows it: without numbers in forward, read out in backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lightning_memtrain.sparsity.storage.candidate_search import CandidateSearch
from lightning_memtrain.sparsity.storage.layers.autograd_functions import DenseWeightFunction
from lightning_memtrain.sparsity.storage.layers.dense_weight import DenseWeight, StoredEntries
from lightning_memtrain.sparsity.storage.patterns import Span, decode


class OnDemandWeight(DenseWeightFunction):
    """The dense weight as a whole."""

    @staticmethod
    def forward(
        values: Tensor, pattern: Tensor, shape: Sequence[int], search: CandidateSearch | None
    ) -> Tensor:
        """A dense weight that has no numbers yet."""
        numel = math.prod(shape)
        whole = Span(0, numel, 0, values.shape[0])
        return DenseWeight.of_parameter(StoredEntries(values, pattern, numel, whole, tuple(shape)))


class OnDemandSlice(Function):
    """One matrix of a dense weight of three axes."""

    @staticmethod
    def forward(
        values: Tensor,
        pattern: Tensor,
        shape: Sequence[int],
        search: CandidateSearch | None,
        number: int,
        spans: tuple[Span, ...],
    ) -> Tensor:
        """One matrix of the dense weight, which has no numbers yet."""
        return DenseWeight(StoredEntries(values, pattern, math.prod(shape), spans[number], tuple(shape[1:])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the pattern for backward."""
        values, pattern, shape, ctx.search, number, spans = inputs
        ctx.save_for_backward(pattern)
        ctx.where = math.prod(shape), spans[number], values.shape[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Read the stored entries out of the gradient; those of the other matrices are 0."""
        (pattern,) = ctx.saved_tensors
        numel, span, nnz = ctx.where
        positions, gradient = decode(pattern, numel, span), gradient.reshape(-1)
        if ctx.search is not None:
            search = ctx.search.part(span.position_start)
            search.observe(gradient, positions, span.position_start)
            search.end_pass()
        before, behind = gradient.new_zeros(span.value_start), gradient.new_zeros(nnz - span.value_stop)
        of_values = torch.cat([before, gradient.index_select(0, positions), behind])
        return of_values, *(None,) * 5
