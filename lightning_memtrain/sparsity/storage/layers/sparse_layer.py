"""Layers that store some entries of their weight. A dense layer becomes one by changing its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from lightning_memtrain.core import ArgumentError
from lightning_memtrain.sparsity.storage.candidate_search import CandidateSearch
from lightning_memtrain.sparsity.storage.checkpoint_key import ignore_checkpoint_key
from lightning_memtrain.sparsity.storage.layers.autograd_functions import DenseWeightFunction, run_uncompiled
from lightning_memtrain.sparsity.storage.layers.dense_weight import DenseWeight
from lightning_memtrain.sparsity.storage.layers.on_demand_functions import OnDemandSlice, OnDemandWeight
from lightning_memtrain.sparsity.storage.patterns import (
    Span,
    Storage,
    decode,
    encode,
    pattern_fault,
    storage_of,
)
from lightning_memtrain.sparsity.storage.shards import full_tensor


class SparseLayer(nn.Module):
    """What sparse layers have in common: the stored values, and the pattern that says where they belong.

    Attributes:
        values: the stored entries ``(nnz,)``, by ascending flat position.
        sparsity_pattern: their positions, as the module ``patterns`` encodes them.
        dense_type: the class that the layer has without sparse weights.
        storage: the form of the pattern that was asked for.
        chunk_bytes: most bytes of a chunk of the weight's rows, or ``None`` for the whole weight at once.
        search: of :func:`~lightning_memtrain.sparsity.watch_candidates` while it is on.
    """

    values: nn.Parameter
    sparsity_pattern: Tensor
    dense_type: type[nn.Module]
    storage: Storage
    chunk_bytes: int | None
    _chunks: tuple[Span, ...]
    search: CandidateSearch | None = None

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the dense weight."""
        raise NotImplementedError

    def _weight(self) -> Tensor:
        """The dense weight, whose numbers are made for each operator; what is written in place is stored.

        Only stored entries can be written: elsewhere it stays 0.
        """
        if torch.compiler.is_compiling():
            return self.dense_with_gradient()
        made = self._apply_function(OnDemandWeight)
        if self.parts and isinstance(made, DenseWeight):
            made.split_into(lambda number: self._apply_function(OnDemandSlice, number, self.parts))
        return made

    def dense_with_gradient(self) -> Tensor:
        """The dense weight as a plain tensor with a gradient, which takes its bytes as long as it is kept."""
        return self._apply_function(DenseWeightFunction)

    def _apply_function(self, function: type[Function], *rest: Any) -> Tensor:
        arguments = self.values, self.sparsity_pattern, self.dense_shape, self.search, *rest
        if self.search is not None:
            return run_uncompiled(function.apply, *arguments)
        made: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
        return made

    @property
    def parts(self) -> tuple[Span, ...]:
        """Parts of the weight that may be looked at alone; none if they are not worth it."""
        return ()

    def _write_weight(self, dense: Tensor) -> None:
        # What `layer.weight += 1` assigns has been written already, in place.
        if not (isinstance(dense, DenseWeight) and dense.is_weight_of(self.values)):
            if not isinstance(dense, Tensor) or dense.shape != self.dense_shape:
                got = tuple(dense.shape) if isinstance(dense, Tensor) else repr(dense)
                raise ArgumentError(
                    f"The weight of a sparse layer must be a tensor of shape {tuple(self.dense_shape)}, but "
                    f"got {got}. Assign one of that shape; only stored entries are taken from it."
                )
            self.write(dense)

    weight: Tensor = property(_weight, _write_weight)  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        # A parameter would be registered beside the values, or be refused without a reason.
        if name == "weight" and isinstance(value, nn.Parameter):
            value = value.detach()
        super().__setattr__(name, value)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """The dense weight, as a plain tensor without a gradient; of divided values, all ranks ask for it."""
        values = full_tensor(self.values)
        made: Tensor = DenseWeightFunction.apply(values, self.sparsity_pattern, self.dense_shape, None)  # type: ignore[no-untyped-call]
        return made.detach()

    def positions(self) -> Tensor:
        """Int64 ``(nnz,)``: flat positions of the values, ascending."""
        numel, nnz = self.dense_shape.numel(), self.values.numel()
        return decode(self.sparsity_pattern, numel, Span(0, numel, 0, nnz)).long()

    @torch.no_grad()
    def become_sparse(self, dense: nn.Parameter, positions: Tensor) -> None:
        """Take the stored entries out of a dense weight, which is let go.

        Args:
            dense: the weight so far.
            positions: int64 of one axis, ascending, on any device.
        """
        kept = dense.detach().reshape(-1).index_select(0, positions.to(dense.device))
        self.values = nn.Parameter(kept, requires_grad=dense.requires_grad)
        self.register_buffer("sparsity_pattern", None)
        self.set_positions(positions)

    @torch.no_grad()
    def become_dense(self) -> nn.Parameter:
        """Be the layer that it was, with a dense weight.

        Returns:
            The weight.
        """
        dense = nn.Parameter(self.dense(), requires_grad=self.values.requires_grad)
        kind = self.dense_type
        del self._parameters["values"], self._buffers["sparsity_pattern"]
        for name in ("dense_type", "storage", "chunk_bytes", "_chunks", "search"):
            self.__dict__.pop(name, None)
        self.__class__ = kind  # type: ignore[assignment]
        self._parameters = {"weight": dense, **self._parameters}
        return dense

    def set_positions(self, positions: Tensor) -> None:
        """Change where the values belong.

        Args:
            positions: int64 ``(nnz,)``, ascending, as many as there are values.
        """
        self.prepare_positions(positions)()

    def prepare_positions(self, positions: Tensor) -> Callable[[], None]:
        """Prepare to change where the values belong.

        Args:
            positions: int64 ``(nnz,)``, ascending.

        Returns:
            Does it by assignments alone; may be called several times.
        """
        pattern = encode(positions, self.dense_shape.numel(), self.storage).to(self.values.device)
        chunks = self._spans(positions)

        def assign() -> None:
            self.sparsity_pattern = pattern
            self._chunks = chunks

        return assign

    @property
    def spans(self) -> tuple[Span, ...]:
        """One for each chunk of rows, or one for the whole weight."""
        # The number of values is that of the tensor, which a compiled graph may leave open.
        return self._chunks or (Span(0, self.dense_shape.numel(), 0, self.values.shape[0]),)

    def _spans(self, positions: Tensor) -> tuple[Span, ...]:
        """Of one chunk of rows each; none for the whole."""
        numel, nnz = self.dense_shape.numel(), positions.numel()
        if self.chunk_bytes is None:
            return ()
        rows, row_numel = self.dense_shape[0], numel // self.dense_shape[0]
        # Eight rows, so that chunks begin with a byte of the bitmask.
        num_rows = max(self.chunk_bytes // (row_numel * self.values.itemsize) // 8, 1) * 8
        firsts = [row * row_numel for row in range(0, rows, num_rows)] + [numel]
        if positions.is_meta:  # there is no telling, so they are taken to lie evenly
            starts = [nnz * first // numel for first in firsts]
        else:
            starts = torch.searchsorted(positions, torch.tensor(firsts, device=positions.device)).tolist()
        spans = zip(firsts[:-1], firsts[1:], starts[:-1], starts[1:], strict=True)
        return tuple(Span(*span) for span in spans)

    def set_values(self, values: Tensor) -> None:
        """Give the parameter other values, of another number; it stays the same object.

        Args:
            values: floating point, of one axis.
        """
        gradient = self.values.grad
        fits = gradient is not None and gradient.shape == values.shape
        self.prepare_values(values, gradient if fits else None)()

    def prepare_values(self, values: Tensor, gradient: Tensor | None) -> Callable[[], None]:
        """Prepare to give the parameter other values and another gradient.

        Args:
            values: floating point, of one axis.
            gradient: of the same shape, or none.

        Returns:
            Does it by assignments alone; may be called several times.
        """
        # The node that accumulates gradients knows the shape, and where something keeps it alive, it is used
        # again. It is made anew only for another dtype or device, so the values pass through another dtype.
        other = torch.float16 if values.dtype != torch.float16 else torch.float32
        nothing = torch.empty(0, dtype=other, device=values.device)

        def assign() -> None:
            self.values.grad = None
            self.values.data = nothing
            self.values.data = values
            self.values.grad = gradient

        return assign

    @torch.no_grad()
    def write(self, dense: Tensor) -> None:
        """Store the entries of a dense weight that have a place here.

        Args:
            dense: floating point, of the shape of the dense weight.
        """
        self.values.copy_(dense.detach().reshape(-1).index_select(0, self.positions()))

    def autocast(self, input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, torch.dtype]:
        """Input, bias and dtype of the weight for the product, cast as autocast does it for a dense layer.

        Args:
            input: of the layer, of any shape.
            bias: of the layer, of one axis, or none.

        Returns:
            The three; what is not float64 and floating point has the dtype of autocast where that is on.
        """
        device_type, own = self.values.device.type, self.values.dtype
        if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
            return input, bias, own
        dtype = torch.get_autocast_dtype(device_type)

        def cast(tensor: Tensor) -> Tensor:
            casts = tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if casts else tensor

        bias = None if bias is None else cast(bias)
        return cast(input), bias, own if own == torch.float64 else dtype

    def dense_key(self, prefix: str) -> str:
        """Name of the dense weight.

        Args:
            prefix: of what the layer holds, empty or with a dot at its end.

        Returns:
            The name that it has in the model without sparse layers.
        """
        return f"{prefix}weight"

    def extra_repr(self) -> str:
        """The dense layer's own, how much is stored, and how."""
        storage = storage_of(self.sparsity_pattern)
        return f"{super().extra_repr()}, nnz={self.values.numel()}, storage={storage!r}"

    def __getstate__(self) -> dict[str, Any]:
        # A copy is not watched.
        return {key: value for key, value in self.__dict__.items() if key != "search"}

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        values = state_dict.get(f"{prefix}values")
        pattern = state_dict.get(f"{prefix}sparsity_pattern")
        if values is None and f"{prefix}weight" in state_dict:
            error_msgs.append(dense_in_checkpoint(f"{prefix}weight"))
        if values is not None and pattern is not None:
            if (complaint := pattern_fault(pattern, values, self.dense_shape)) is not None:
                error_msgs.append(f'"{prefix}sparsity_pattern" {complaint}')
                return
            # Room for another number of values, and for the form of pattern that was saved.
            device = self.values.device
            if values.shape != self.values.shape:
                self.set_values(torch.empty(values.shape, dtype=self.values.dtype, device=device))
            self.sparsity_pattern = torch.empty(pattern.shape, dtype=pattern.dtype, device=device)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        ignore_checkpoint_key(unexpected_keys)
        if values is not None and pattern is not None:
            self.set_positions(self.positions())


def dense_in_checkpoint(key: str) -> str:
    """What is wrong with a dense weight for a sparse layer.

    Args:
        key: of the weight.

    Returns:
        Text for the error of ``load_state_dict``.
    """
    return (
        f'"{key}" is dense in the checkpoint, but this layer is sparse. Load it before `sparsify_` or in a '
        "model without sparse layers."
    )
