"""How activations are kept for backward in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeGuard

from torch import nn

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.precision.activations.activation_packing import ActivationPacking
from lightning_memtrain.precision.activations.quantization_kernels import QuantizationKernels

#: Numbers per group where none is given. Fewer bits need smaller groups, whose numbers are closer together.
DEFAULT_GROUP_SIZE = {8: 256, 4: 64, 2: 64}


@dataclass(frozen=True)
class ActivationCodec:
    r"""Keeps what autograd saves for backward in 8, 4 or 2 bits per number.

    The forward computes with exact numbers and its result does not change; backward computes with numbers
    from a grid of :math:`2^{\text{bits}}` levels per group. Zeros stay zeros and non-zeros stay non-zeros in
    what ReLU returns, so that its backward is exact.

    Packed are float32, bfloat16 and float16 tensors, each part of a storage once however often it is saved.
    Stored as they are: parameters and buffers with their views and autocast's copies of them, small tensors,
    integers, booleans, float64, sparse tensors and subclasses.

    Args:
        bits: per number.
        group_size: consecutive numbers that share smallest number and step (6 bytes), a multiple of 8 of at
            least 8; ``None``: 256 for 8 bits, 64 otherwise.
        min_numel: tensors with fewer elements are stored as they are; at least ``group_size``.
        stochastic: round up or down at random, with the exact number as mean. A single gradient is then less
            exact, but its mean over steps more so. The noise is private: other random numbers do not change.
        seed: of the noise, in ``[0, 2**32)``.
        compiled: quantize by functions of ``torch.compile``, which give the same codes in less time;
            ``None``: where there is a compiler and so much was packed that compiling (some seconds) pays.

    Raises:
        ArgumentError: if an argument lies outside its range.

    Example:
        >>> import torch
        >>> codec = ActivationCodec(bits=8)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        >>> packing = codec.packing(model)
        >>> with packing:
        ...     loss = model(torch.randn(128, 64)).sum()
        >>> loss.backward()
        >>> packing.last
        PackedBytes(num_tensors=2, saved_bytes=65536, stored_bytes=16768)

    References:
        Chen et al., ActNN: Reducing Training Memory Footprint via 2-Bit Activation Compressed Training, ICML
        2021, arXiv:2104.14129.
    """

    bits: Literal[8, 4, 2] = 8
    group_size: int | None = None
    min_numel: int = 4096
    stochastic: bool = False
    seed: int = 0
    compiled: bool | None = None

    def __post_init__(self) -> None:
        if not is_int(self.bits) or self.bits not in DEFAULT_GROUP_SIZE:
            raise ArgumentError(
                f"`ActivationCodec(bits)` must be 8, 4 or 2, but got bits={self.bits!r}. "
                "Use 8, which hardly changes gradients, and 4 where memory is short."
            )
        if self.group_size is not None and (
            not is_int(self.group_size) or self.group_size < 8 or self.group_size % 8
        ):
            raise ArgumentError(
                f"`ActivationCodec(group_size)` must be a multiple of 8 and at least 8, but got "
                f"group_size={self.group_size!r}. Leave it out for {DEFAULT_GROUP_SIZE[self.bits]}."
            )
        if not is_int(self.min_numel) or self.min_numel < self.resolved_group_size:
            raise ArgumentError(
                f"`ActivationCodec(min_numel)` must be at least the size of a group "
                f"({self.resolved_group_size}), since groups are filled up, but got "
                f"min_numel={self.min_numel!r}. Leave it out for 4096."
            )
        if not is_int(self.seed) or not 0 <= self.seed < 2**32:
            raise ArgumentError(
                f"`ActivationCodec(seed)` must be an integer in [0, 2**32), but got seed={self.seed!r}. "
                "Leave it out for 0."
            )
        for name, choices in (("stochastic", (True, False)), ("compiled", (True, False, None))):
            value = getattr(self, name)
            if not any(value is choice for choice in choices):
                raise ArgumentError(
                    f"`ActivationCodec({name})` must be {' or '.join(map(str, choices))}, but got "
                    f"{name}={value!r}. Use one of them."
                )

    @property
    def resolved_group_size(self) -> int:
        """``group_size``, or what stands for ``None``."""
        return DEFAULT_GROUP_SIZE[self.bits] if self.group_size is None else self.group_size

    def packing(self, model: nn.Module, rank: int = 0) -> ActivationPacking:
        """A context for forward passes of a model; what they save is packed.

        Enter it outermost, around checkpointing and around a module's whole forward. Backward may be inside
        or outside of it.

        Args:
            model: its parameters and buffers are not packed.
            rank: of this process among several, so that each draws noise of its own.

        Returns:
            A context that can be entered once per step. It holds the state of the noise.
        """
        kernels = QuantizationKernels(self.bits, self.resolved_group_size, self.compiled)
        noise_seed = self.seed * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB if self.stochastic else None
        return ActivationPacking(model, kernels, self.min_numel, noise_seed)


def validate_codec(argument: str, codec: object) -> None:
    """Refuse what is no codec.

    Args:
        argument: what the user wrote, for the message.
        codec: what it got.

    Raises:
        ArgumentError: if it is something else.
    """
    if not isinstance(codec, ActivationCodec):
        name = argument.partition("(")[2].rstrip(")")
        raise ArgumentError(
            f"`{argument}` must be an ActivationCodec or None, but got {name}={codec!r}. "
            "Write e.g. ActivationCodec(bits=8)."
        )


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; ``True`` is not meant as one."""
    return isinstance(value, int) and not isinstance(value, bool)
