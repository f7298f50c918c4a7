"""A dense weight that was made for somebody to see, and that gives back what is written into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

if TYPE_CHECKING:
    from lightning_memtrain.techniques.sparsity.layers import SparseLayer


class DenseWeight(Tensor):
    """The ``weight`` of a sparse layer, and views of it.

    ``torch.nn.init`` and other code write into a layer's weight in place. Into a tensor that is made at each
    look this would be lost without a word; so whatever is written is read back into the stored values.
    """

    _root: Tensor
    _layer: SparseLayer

    @staticmethod
    def of(dense: Tensor, layer: SparseLayer) -> DenseWeight:
        """The dense weight of a layer.

        Args:
            dense: its values, made for this.
            layer: gets what is written.

        Returns:
            The same numbers.
        """
        made = dense.as_subclass(DenseWeight)
        made._root, made._layer = dense, layer
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            return _set_data(*args)
        weights = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, DenseWeight)]
        with torch._C.DisableTorchFunctionSubclass():
            versions = [weight._version for weight in weights]
            try:
                result = func(*args, **kwargs or {})
            except RuntimeError as error:
                if "inplace" not in str(error) or not torch.is_grad_enabled():
                    raise
                raise RuntimeError(
                    "The weight of a sparse layer cannot be changed in place where gradients are recorded. "
                    "Change it under `torch.no_grad()`."
                ) from error
            for weight, version in zip(weights, versions, strict=True):
                if weight._version != version:
                    weight._layer.write(weight._root)
            return tree_map_only(Tensor, lambda tensor: _like_a_view(tensor, weights), result)


def _set_data(weight: DenseWeight, value: Tensor) -> None:
    """Write ``value`` instead of taking its memory, which nobody would look at again."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if value.shape != weight.shape:
            raise ValueError(
                f"The weight of a sparse layer must keep its shape {tuple(weight.shape)}, but got "
                f"{tuple(value.shape)}. Make another layer instead."
            )
        weight.detach().copy_(value)
        weight._layer.write(weight._root)


def _like_a_view(result: Tensor, weights: list[DenseWeight]) -> Tensor:
    """A result that shares memory with a weight writes through, too; others are plain tensors."""
    if isinstance(result, DenseWeight) and hasattr(result, "_root"):
        return result
    for weight in weights:
        if result.untyped_storage()._cdata == weight.untyped_storage()._cdata:
            view = result.as_subclass(DenseWeight)
            view._root, view._layer = weight._root, weight._layer
            return view
    return result
