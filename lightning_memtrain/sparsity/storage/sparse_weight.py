"""Sparse layers, seen as weights to choose and to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memtrain.compat.torch_private import is_traceable_wrapper_subclass
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.core.arguments.value_checks import check_modules, wrong
from lightning_memtrain.sparsity.storage.layers.sparse_layer import SparseLayer
from lightning_memtrain.sparsity.storage.layers.sparse_parameters import SPARSE_SUFFIX, SparseParameter
from lightning_memtrain.sparsity.storage.optimizer_state import Reindexing, check_reindexable, prepare_state
from lightning_memtrain.sparsity.storage.shards import full_tensor, prepare_write


class SparseWeight:
    """The weight of one sparse layer: which entries are stored, and how others take their place.

    Args:
        name: of the dense weight in its model, e.g. ``"blocks.3.conv1.weight"``.
        layer: that holds it.
    """

    def __init__(self, name: str, layer: SparseLayer) -> None:
        self.name = name
        self.layer = layer

    def __repr__(self) -> str:
        return f"SparseWeight({self.name!r}, shape={tuple(self.shape)}, nnz={self.nnz})"

    @property
    def path(self) -> str:
        """Of the layer, or the name of a parameter of another module."""
        if isinstance(self.layer, SparseParameter):
            return self.name
        return self.name.removesuffix("weight").removesuffix(".")

    @property
    def module_path(self) -> str:
        """Path of the module that holds the values."""
        return f"{self.name}{SPARSE_SUFFIX}" if isinstance(self.layer, SparseParameter) else self.path

    @property
    def shape(self) -> torch.Size:
        """Shape of the dense weight."""
        return self.layer.dense_shape

    @property
    def numel(self) -> int:
        """Entries of the dense weight."""
        return self.shape.numel()

    @property
    def nnz(self) -> int:
        """Entries that are stored; some of their values may be 0."""
        return self.values.numel()

    @property
    def values(self) -> nn.Parameter:
        """What is stored, of shape ``(nnz,)``, by ascending flat position. The same object for life.

        After ``fully_shard``, a ``DTensor`` outside of forward and backward.
        """
        return self.layer.values

    def positions(self) -> Tensor:
        """Int64 ``(nnz,)``: flat positions of the values, ascending, on their device."""
        return self.layer.positions()

    @torch.no_grad()
    def replace(self, kept: Tensor, grown: Tensor, optimizers: Sequence[Optimizer] = ()) -> None:
        """Drop some entries and grow others, optimizer state and gradient included.

        What stays keeps its value, gradient and state. What is new starts at 0, with momentum 0 and with the
        mean of the layer for what scales its step: see the page on storage. The parameter stays the same
        object. All of it changes or nothing: an error (out of memory, say) leaves everything as it was.

        Of values that ``fully_shard`` divided among ranks, all ranks have to call this with the same
        arguments; each has all values of this layer while it runs.

        Args:
            kept: bool ``(nnz,)``: which of the present entries stay.
            grown: int64 of one axis: flat positions of new entries, ascending, none of them kept. One that is
                dropped in the same call starts anew.
            optimizers: all that may hold state of the values.

        Raises:
            ArgumentError: if ``kept`` or ``grown`` is no such choice.
            TypeError: if an optimizer's state cannot follow, or the values are no plain tensor, or divided
                among ranks and would become more or fewer. Nothing has changed then.
        """
        assign_all(self.prepare_replace(kept, grown, optimizers))

    @torch.no_grad()
    def prepare_replace(
        self, kept: Tensor, grown: Tensor, optimizers: Sequence[Optimizer] = ()
    ) -> list[Callable[[], None]]:
        """Make all that :meth:`replace` needs, and change nothing.

        Args:
            kept: bool ``(nnz,)``, as there.
            grown: int64 of one axis, as there.
            optimizers: as there.

        Returns:
            What is to be called for the change; each makes no tensor and may be called several times.

        Raises:
            ArgumentError: as there.
            TypeError: as there.
        """
        values, device = self.values, self.values.device
        is_sharded = isinstance(values.data, DTensor)
        if is_traceable_wrapper_subclass(values.data) and not is_sharded:
            raise TypeError(
                f"`SparseWeight.replace` needs the values of {self.name!r} as a plain tensor or divided by "
                f"`fully_shard`, but they are a {type(values.data).__name__}. Use a method that moves none."
            )
        if kept.dtype != torch.bool or kept.shape != values.shape:
            raise ArgumentError(
                f"`SparseWeight.replace(kept)` must be bool of shape {tuple(values.shape)}, one per entry of "
                f"{self.name!r}, but got {kept.dtype} of shape {tuple(kept.shape)}."
            )
        check_positions(f"`SparseWeight.replace(grown)` of {self.name!r}", grown, self.numel)
        staying = kept.to(device).nonzero().view(-1)
        positions, source = _merge_positions(
            self.positions().index_select(0, staying), staying, grown.to(device)
        )
        if not bool((positions.diff() > 0).all()):
            raise ArgumentError(
                f"`SparseWeight.replace(grown)` of {self.name!r} must hold positions, ascending and none of "
                "them kept, but some come twice. Leave them out, or drop them from `kept`."
            )
        if is_sharded and len(positions) != len(kept):
            raise ArgumentError(
                f"`SparseWeight.replace` must keep the number of values of {self.name!r}, which are divided "
                f"among ranks in shards of fixed size, but got {len(positions)} for {len(kept)}. Grow as "
                "many as are dropped."
            )
        check_reindexable(optimizers, values)
        # All that is new exists before anything changes.
        move = Reindexing(source)
        assignments = prepare_state(optimizers, values, move)
        gradient = values.grad
        if isinstance(values.data, DTensor):
            for divided in (values.data, gradient):
                if isinstance(divided, DTensor):
                    assignments.append(prepare_write(divided, move(full_tensor(divided))))
        else:
            new_gradient = None if gradient is None else move(gradient)
            assignments.append(self.layer.prepare_values(move(values.detach()), new_gradient))
        return [*assignments, self.layer.prepare_positions(positions)]


def assign_all(assignments: Sequence[Callable[[], Any]]) -> None:
    """Change everything, even if an interrupt comes in between: half a change would mix weights.

    Args:
        assignments: each may be called several times.
    """
    try:
        for assign in assignments:
            assign()
    except BaseException:
        for assign in assignments:
            assign()
        raise


def _merge_positions(old: Tensor, numbers: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending positions of two kinds in one order, and the numbers of the old ones, -1 for the new."""
    at_new = torch.searchsorted(old, new).add_(torch.arange(len(new), device=new.device))
    is_old = torch.ones(len(old) + len(new), dtype=torch.bool, device=new.device)
    is_old[at_new] = False
    positions = old.new_empty(len(is_old)).masked_scatter_(is_old, old).index_copy_(0, at_new, new)
    return positions, numbers.new_full((len(is_old),), -1).masked_scatter_(is_old, numbers)


def sparse_weights(module: nn.Module) -> dict[str, SparseWeight]:
    """The weights of all sparse layers.

    Args:
        module: a model.

    Returns:
        By the name of the dense weight, in the order of the modules.

    Example:
        >>> from lightning_memtrain.sparsity import sparsify_
        >>> model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1))
        >>> _ = sparsify_(model, {"0.weight": torch.tensor([1, 6])})
        >>> sparse_weights(model)
        {'0.weight': SparseWeight('0.weight', shape=(2, 4), nnz=2)}
    """
    check_modules("sparse_weights", module=module)
    return {
        (name := layer.dense_key(f"{path}." if path else "")): SparseWeight(name, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, SparseLayer)
    }


def weights_by_path(module: nn.Module) -> dict[str, SparseWeight]:
    """As :func:`sparse_weights`, by the path of the layer and not by the name of its weight.

    Args:
        module: a model.

    Returns:
        In the order of the modules.
    """
    return {weight.path: weight for weight in sparse_weights(module).values()}


def check_positions(subject: str, positions: Tensor, numel: int) -> None:
    """Refuse what are no flat positions, each once, in order.

    Args:
        subject: of the error.
        positions: what was given, of any dtype and shape.
        numel: entries of the weight.

    Raises:
        ArgumentError: naming the subject.
    """
    if positions.dim() != 1 or positions.dtype != torch.int64:
        raise ArgumentError(
            f"{subject} must be flat positions, integers of one axis, but got {positions.dtype} of shape "
            f"{tuple(positions.shape)}. Use `mask.flatten().nonzero().flatten()` for a mask."
        )
    if positions.is_meta or not len(positions):
        return
    if int(positions.min()) < 0 or int(positions.max()) >= numel:
        raise ArgumentError(
            f"{subject} must be from 0 to {numel - 1}, but got {int(positions.min())} to "
            f"{int(positions.max())}. Count positions in the flattened weight."
        )
    if not bool((positions.diff() > 0).all()):
        raise ArgumentError(
            f"{subject} must be ascending, each position once, but got a repetition or a descent."
        )


def check_weights(owner: str, weights: Any) -> None:
    """Refuse what are no sparse weights by name.

    Args:
        owner: what the user has called.
        weights: the argument.

    Raises:
        ArgumentError: naming the argument.
    """
    if not isinstance(weights, Mapping) or not all(isinstance(w, SparseWeight) for w in weights.values()):
        raise wrong(owner, "weights", "sparse weights by name", weights, "Pass `sparse_weights(model)`.")
