"""The sparse layers of the model that is trained, and which of them were copies when they became sparse."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer

from lightning_memtrain.sparsity import sharding
from lightning_memtrain.sparsity.initial_pattern import sparsify_at_random
from lightning_memtrain.sparsity.methods.sparse_method import SparseMethod
from lightning_memtrain.sparsity.run.run_optimizers import parameter_ids
from lightning_memtrain.sparsity.selection.layer_copies import LayerCopies, follow_trained
from lightning_memtrain.sparsity.selection.select import Select
from lightning_memtrain.sparsity.storage.patterns import Storage
from lightning_memtrain.sparsity.storage.sparse_weight import SparseWeight, sparse_weights, weights_by_path


class ConvertedModel:
    """Makes a model sparse, once, and knows its sparse layers from then on.

    Args:
        method: says how sparse.
        select: says which layers.
        seed: of the first pattern.
        storage: form of patterns.
        chunk_bytes: most bytes of a dense weight that a linear layer makes at a time.
    """

    def __init__(
        self,
        method: SparseMethod,
        select: Select,
        seed: int,
        storage: Storage,
        chunk_bytes: int | str | None,
    ) -> None:
        self._method = method
        self._select = select
        self._seed = seed
        self._storage = storage
        self._chunk_bytes = chunk_bytes
        #: Of the sparse layers, by path.
        self.weights: dict[str, SparseWeight] = {}
        #: Of the layers of the same model, when it became sparse; none if others made it sparse.
        self.copies = LayerCopies()
        self._has_converted = self._is_as_converted = False
        self._modules_before: set[int] = set()

    def begin(self) -> None:
        """Forget the modules that were there when the last model became sparse: another may come."""
        self._modules_before = set()

    def convert(self, model: nn.Module) -> None:
        """Make a model sparse before it is divided among ranks, unless it is sparse already.

        Args:
            model: becomes sparse in place.

        Raises:
            MisconfigurationException: if a weight is tied or has no data yet.
        """
        if not sparse_weights(model):
            sharding.refuse_meta(model)
            self._sparsify(model)
        self._modules_before = {id(module) for module in model.modules()}

    def _sparsify(self, model: nn.Module) -> None:
        self.copies = sparsify_at_random(
            model, self._method, self._select, self._seed, self._storage, self._chunk_bytes
        )
        self._has_converted = self._is_as_converted = True

    def adopt(self, model: nn.Module, *, is_divided: bool) -> bool:
        """Find the sparse layers of a complete model, which becomes sparse now unless it is.

        Args:
            model: after its ``configure_model``.
            is_divided: whether ranks have parts of its parameters.

        Returns:
            Whether these are other layers than those that were known before, if any were.

        Raises:
            MisconfigurationException: if layers that should be sparse are divided already.
        """
        if is_divided:
            sharding.refuse_late(self._select.layers(model), self._modules_before)
        found = weights_by_path(model)
        if not self._modules_before and not found:
            self._sparsify(model)
            found = weights_by_path(model)
        before = [id(weight.layer) for weight in self.weights.values()]
        are_others = before != [id(weight.layer) for weight in found.values()]
        if are_others and not self._has_converted:
            # This model was sparse already: what is known of copies is of the last one.
            self.copies, self._is_as_converted = LayerCopies(), False
        self.weights, self._has_converted = found, False
        return are_others and bool(before)

    def follow_trained(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        """Give layers that no optimizer has the pattern of the equal ones that are trained.

        Equal they were when the model became sparse, so nothing happens once it has been trained.

        Args:
            model: that is about to be trained for the first time.
            optimizers: of the run.

        Raises:
            MisconfigurationException: if there is no telling which layer one follows.
        """
        if self._is_as_converted:
            dense = self._select.unnamed_locations(model)
            follow_trained(self.copies, self.weights, dense, parameter_ids(optimizers))

    def note_training(self) -> None:
        """Take note that weights are not those any more that the model had when it became sparse."""
        self._is_as_converted = False

    def forget_conversion(self) -> None:
        """Take note that the model which became sparse last has not been adopted, and will not be."""
        self._has_converted = False
