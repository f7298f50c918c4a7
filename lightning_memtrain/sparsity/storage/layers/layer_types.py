"""The sparse forms of torch's linear and convolution layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_memtrain.compat.torch_private import (
    ConvNd,
    ConvTransposeNd,
    output_padding_of,
    padding_twice_of,
)
from lightning_memtrain.sparsity.storage.layers.autograd_functions import (
    ConvolutionGeometry,
    SparseConvolutionFunction,
    SparseLinearFunction,
    run_uncompiled,
)
from lightning_memtrain.sparsity.storage.layers.sparse_layer import SparseLayer


class SparseLinear(SparseLayer, nn.Linear):
    """``torch.nn.Linear`` that stores some entries of its weight."""

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return torch.Size((self.out_features, self.in_features))

    def forward(self, input: Tensor) -> Tensor:
        """Multiply by the weight and add the bias.

        Args:
            input: of shape ``(..., in_features)``.

        Returns:
            Of shape ``(..., out_features)``.
        """
        if self.search is not None:
            return run_uncompiled(self._multiply, input)
        return self._multiply(input)

    def _multiply(self, input: Tensor) -> Tensor:
        input, bias, dtype = self.autocast(input, self.bias)
        product: Tensor = SparseLinearFunction.apply(  # type: ignore[no-untyped-call]
            input if input.dim() > 1 else input.unsqueeze(0),
            self.values,
            self.sparsity_pattern,
            bias,
            tuple(self.dense_shape),
            self.spans,
            dtype,
            self.search,
        )
        return product if input.dim() > 1 else product.squeeze(0)


class _SparseConvolution(SparseLayer, ConvNd):
    """What sparse convolutions have in common."""

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the dense weight."""
        channels = (
            (self.in_channels, self.out_channels // self.groups)
            if self.transposed
            else (self.out_channels, self.in_channels // self.groups)
        )
        return torch.Size((*channels, *self.kernel_size))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the weight and add the bias.

        Args:
            input: of shape ``(batch, in_channels, ...)`` or ``(in_channels, ...)``.

        Returns:
            Of shape ``(batch, out_channels, ...)`` or ``(out_channels, ...)``.
        """
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, padding_twice_of(self), mode=self.padding_mode)
            padding = (0,) * len(self.kernel_size)
        elif padding == "valid":
            padding = (0,) * len(self.kernel_size)
        elif padding == "same":
            # What is odd of it goes behind the image, as torch does it.
            both = [step * (size - 1) for step, size in zip(self.dilation, self.kernel_size, strict=True)]
            padding = tuple(total // 2 for total in both)
            if any(total % 2 for total in both):
                input = F.pad(input, [side for total in reversed(both) for side in (0, total % 2)])
        return self._convolved(input, padding, self.output_padding)

    def _convolved(self, input: Tensor, padding: Any, output_padding: Any) -> Tensor:
        geometry = ConvolutionGeometry(
            self.stride, padding, self.dilation, self.transposed, tuple(output_padding), self.groups
        )
        if self.search is not None:
            return run_uncompiled(self._convolve, input, geometry)
        return self._convolve(input, geometry)

    def _convolve(self, input: Tensor, geometry: ConvolutionGeometry) -> Tensor:
        input, bias, dtype = self.autocast(input, self.bias)
        is_batch = input.dim() > len(self.kernel_size) + 1
        result: Tensor = SparseConvolutionFunction.apply(  # type: ignore[no-untyped-call]
            input if is_batch else input.unsqueeze(0),
            self.values,
            self.sparsity_pattern,
            bias,
            tuple(self.dense_shape),
            geometry,
            dtype,
            self.search,
        )
        return result if is_batch else result.squeeze(0)


class _SparseTransposedConvolution(_SparseConvolution, ConvTransposeNd):
    """What sparse transposed convolutions have in common."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve with the weight and add the bias.

        Args:
            input: of shape ``(batch, in_channels, ...)`` or ``(in_channels, ...)``.
            output_size: of the image, where the stride leaves a choice.

        Returns:
            Of shape ``(batch, out_channels, ...)`` or ``(out_channels, ...)``.
        """
        output_padding = output_padding_of(self)(
            input,
            output_size,
            self.stride,
            self.padding,
            self.kernel_size,
            len(self.kernel_size),
            self.dilation,
        )
        return self._convolved(input, self.padding, output_padding)


class SparseConv1d(_SparseConvolution, nn.Conv1d):
    """``torch.nn.Conv1d`` that stores some entries of its weight."""


class SparseConv2d(_SparseConvolution, nn.Conv2d):
    """``torch.nn.Conv2d`` that stores some entries of its weight."""


class SparseConv3d(_SparseConvolution, nn.Conv3d):
    """``torch.nn.Conv3d`` that stores some entries of its weight."""


class SparseConvTranspose1d(_SparseTransposedConvolution, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` that stores some entries of its weight."""


class SparseConvTranspose2d(_SparseTransposedConvolution, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` that stores some entries of its weight."""


class SparseConvTranspose3d(_SparseTransposedConvolution, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` that stores some entries of its weight."""


SPARSE_TYPES: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: SparseLinear,
    # The output projection of `nn.MultiheadAttention`; the name keeps torch's quantisation away from it.
    NonDynamicallyQuantizableLinear: SparseLinear,
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.Conv3d: SparseConv3d,
    nn.ConvTranspose1d: SparseConvTranspose1d,
    nn.ConvTranspose2d: SparseConvTranspose2d,
    nn.ConvTranspose3d: SparseConvTranspose3d,
}
"""The sparse form of each type of layer that has one."""
