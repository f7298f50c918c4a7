"""Quantizing whole tensors piece by piece, by eager operations or by compiled ones.

What is needed beside tensor and codes is a few times a piece, so that packing does not lift the peak that it
is to lower. Compiled, quantizing needs nothing beside its result, and one pass over memory.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from torch import Tensor

from lightning_memtrain.compat.torch_private import get_current_dispatch_mode_stack
from lightning_memtrain.precision.activations.group_quantization import (
    QuantizedGroups,
    dequantize,
    dequantize_any,
    quantize,
    quantize_any,
)
from lightning_memtrain.precision.activations.memory_order import MemoryOrder, row_pieces

#: Elements that are quantized at a time. On CPU a piece and what is made of it stay in a core's cache.
PIECE_CPU = 1 << 15
PIECE_DEVICE = 1 << 20
PIECE_COMPILED = 1 << 20
#: Compiling takes about as long as quantizing so many elements by eager operations does.
WORTH_COMPILING = 1 << 29
#: Below so many groups a piece is not worth the call of a compiled function, or a compilation of its own.
_FEWEST_GROUPS = 16


class QuantizationKernels:
    """Quantizes tensors to a number of bits.

    Args:
        bits: per number; 8, 4 or 2.
        group_size: numbers per group.
        compiled: whether to compile; ``None``: where there is a compiler, once so much was quantized that
            compiling pays.
    """

    def __init__(self, bits: int, group_size: int, compiled: bool | None) -> None:
        self._bits = bits
        self._group_size = group_size
        self._compiled = compiled
        self._num_quantized = 0
        self._functions: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._met: set[tuple[int, torch.dtype]] = set()

    def quantize(
        self, tensor: Tensor, order: MemoryOrder, generator: torch.Generator | None
    ) -> QuantizedGroups:
        """Quantize the elements of a tensor.

        Args:
            tensor: float32, bfloat16 or float16, of any shape and strides.
            order: its memory order.
            generator: of noise for stochastic rounding.

        Returns:
            Codes in memory order.
        """
        self._num_quantized += order.numel
        groups = self._empty(order.numel, tensor.device)
        rows, first = order.view(tensor), 0
        function = self._function(0, tensor.device)
        for start, end in row_pieces(order.sizes, self._group_size, self._piece(function, tensor.device)):
            flat = rows[start:end].reshape(-1)
            full, num_left = divmod(len(flat), self._group_size)
            for part in (flat[: full * self._group_size], self._filled_up(flat[len(flat) - num_left :])):
                if not len(part):
                    continue
                values = part.view(-1, self._group_size)
                noise = None
                if generator is not None:
                    noise = torch.rand(values.shape, generator=generator, device=values.device)
                into = QuantizedGroups(*(x[first : first + len(values)] for x in groups))
                self._run(0, function, len(values), values, into, noise)
                first += len(values)
        return groups

    def dequantize(self, groups: QuantizedGroups, into: Tensor, order: MemoryOrder) -> None:
        """Write the numbers that codes stand for.

        Args:
            groups: codes in memory order.
            into: the tensor to be written: float32, bfloat16 or float16, of any shape and strides.
            order: its memory order.
        """
        rows, first = order.view(into), 0
        function = self._function(1, into.device)
        for start, end in row_pieces(order.sizes, self._group_size, self._piece(function, into.device)):
            piece = rows[start:end]
            flat = (
                piece
                if piece.dim() == 1
                else torch.empty(piece.numel(), dtype=into.dtype, device=into.device)
            )
            full, num_left = divmod(len(flat), self._group_size)
            if full:
                part = QuantizedGroups(*(x[first : first + full] for x in groups))
                self._run(1, function, full, part, flat[: full * self._group_size].view(-1, self._group_size))
            if num_left:
                last = QuantizedGroups(*(x[first + full : first + full + 1] for x in groups))
                flat[full * self._group_size :].copy_(dequantize(last, self._bits, into.dtype)[0, :num_left])
            first += full + bool(num_left)
            if flat is not piece:
                piece.copy_(flat.view(piece.shape))

    def _empty(self, numel: int, device: torch.device) -> QuantizedGroups:
        num_groups = -(-numel // self._group_size)
        return QuantizedGroups(
            torch.empty(num_groups, self._group_size * self._bits // 8, dtype=torch.uint8, device=device),
            torch.empty(num_groups, 1, dtype=torch.float32, device=device),
            torch.empty(num_groups, 1, dtype=torch.bfloat16, device=device),
        )

    def _filled_up(self, values: Tensor) -> Tensor:
        """The last group, filled with what it has already."""
        if not len(values):
            return values
        return torch.cat([values, values[-1:].expand(self._group_size - len(values))])

    def _piece(self, function: Callable[..., Any] | None, device: torch.device) -> int:
        if function is not None:
            return PIECE_COMPILED
        return PIECE_CPU if device.type == "cpu" else PIECE_DEVICE

    def _function(self, which: int, device: torch.device) -> Callable[..., Any] | None:
        """A compiled function, where one is wanted; under a dispatch mode it would not run compiled."""
        if self._compiled is False or device.type not in ("cpu", "cuda"):
            return None
        if which == 1 and device.type == "cpu":
            return None  # where it gains nothing
        if self._compiled is None and self._num_quantized < WORTH_COMPILING:
            return None
        if get_current_dispatch_mode_stack() or torch.compiler.is_compiling():
            return None
        if self._functions is None:
            if not has_compiler(device):
                self._give_up(f"there is no compiler for {device.type}")
                return None
            self._functions = _compile(self._bits)
        return self._functions[which]

    def _run(self, which: int, function: Callable[..., Any] | None, num_groups: int, *args: Any) -> None:
        eager = (_quantize_into, _dequantize_into)[which]
        if function is None or self._compiled is False or num_groups < _FEWEST_GROUPS:
            eager(self._bits, *args)
            return
        dtype, device = (args[0] if which == 0 else args[1]).dtype, args[0][0].device
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.autocast(device.type, enabled=False))  # it is compiled in
                if (which, dtype) not in self._met:
                    self._met.add((which, dtype))
                    stack.enter_context(warnings.catch_warnings())
                    warnings.simplefilter("ignore")  # the compiler's hints are about code that is ours
                function(*args)
        except Exception as error:  # of any kind: a compiler that does not start, an operator that it lacks
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self._give_up(
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            )
            eager(self._bits, *args)

    def _give_up(self, why: str) -> None:
        if self._compiled:
            rank_zero_info(
                f"ActivationCodec: the quantizer could not be compiled ({why}); eager operations with the "
                "same result, several times slower, are used."
            )
        else:
            rank_zero_info(f"ActivationCodec: quantizing by eager operations, since {why}.")
        self._compiled = False


def has_compiler(device: torch.device) -> bool:
    """Whether what ``torch.compile`` needs on a device seems to be there."""
    if device.type == "cuda":
        from importlib.util import find_spec

        return find_spec("triton") is not None
    from lightning_memtrain.compat.torch_private import inductor_cpp_settings  # takes a second to import

    names = inductor_cpp_settings.cxx
    names = names if isinstance(names, (list, tuple)) else [names]
    return any(name and shutil.which(name) for name in [*names, "g++", "clang++"])


def _quantize_into(bits: int, values: Tensor, into: QuantizedGroups, noise: Tensor | None) -> None:
    for target, source in zip(into, quantize(values, bits, noise), strict=True):
        target.copy_(source)


def _dequantize_into(bits: int, groups: QuantizedGroups, into: Tensor) -> None:
    into.copy_(dequantize(groups, bits, into.dtype))


def _compile(bits: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def quantize_into(values: Tensor, into: QuantizedGroups, noise: Tensor | None) -> None:
        for target, source in zip(into, quantize_any(values, bits, noise), strict=True):
            target.copy_(source)

    def dequantize_into(groups: QuantizedGroups, into: Tensor) -> None:
        into.copy_(dequantize_any(groups, bits, into.dtype))

    functions = (quantize_into, dequantize_into)
    for function in functions:
        # The compiler counts compilations by code object, and stops at eight: dtypes, with and without noise.
        function.__code__ = function.__code__.replace()
    options: dict[str, Any] = {"dynamic": True, "fullgraph": True}
    return torch.compile(quantize_into, **options), torch.compile(dequantize_into, **options)
