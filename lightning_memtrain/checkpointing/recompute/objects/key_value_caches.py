"""Key-value caches of `transformers`: what of one a module needs to run again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from lightning_memtrain.checkpointing.recompute.objects.adapter_lookup import adapters_of, is_cache

# Where a cache keeps what belongs to each layer; older versions keep tensors there.
_BY_LAYER = ("layers", "key_cache", "value_cache")


class OmittedTensor:
    """Stands for a tensor that is not kept: its form is known, its values are not.

    Args:
        tensor: what it stands for, of any shape and dtype.
        name: path of the module that it is not kept for.
    """

    def __init__(self, tensor: Tensor, name: str) -> None:
        self.shape, self.dtype, self.device, self.ndim = (
            tensor.shape,
            tensor.dtype,
            tensor.device,
            tensor.ndim,
        )
        self._name = name

    def numel(self) -> int:
        """How many numbers there are."""
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        """Its shape, or how many there are along a dimension."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """How many dimensions it has."""
        return self.ndim

    def _refuse(self) -> NoReturn:
        raise RuntimeError(
            f"`ActivationCheckpointing` cannot recompute {self._name!r}: it reads from the cache what "
            "another layer put there, and that is not kept. Leave this module out, or switch the cache off "
            "(`use_cache=False`)."
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what Python asks of any object
            raise AttributeError(name)
        self._refuse()

    def __getitem__(self, key: Any) -> NoReturn:
        self._refuse()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nested = [*args, *(kwargs or {}).values()]
        while nested:
            one = nested.pop(0)
            if isinstance(one, OmittedTensor):
                one._refuse()
            nested += one if isinstance(one, (list, tuple)) else ()
        return NotImplemented


def caching_model(model: nn.Module) -> str | None:
    """Find the model that makes caches in training, since its configuration says so.

    Args:
        model: any module.

    Returns:
        Path of the outermost module with ``config.use_cache``, or ``None`` if there is none.
    """
    for name, module in model.named_modules():
        if getattr(getattr(module, "config", None), "use_cache", None) is True:
            return str(name)
    return None


class CacheLayers:
    """Which layers of a model a module belongs to, and so which part of a cache it works on.

    A cache gathers keys and values of all layers. If each call of a layer kept it as it was, all of them
    would be held until backward, which they are not without checkpoints once the model's output is gone. So
    of other layers only what is no tensor is kept.

    Args:
        modules: the module, and those within it, which say what layers they are.
        name: path of the module.
    """

    def __init__(self, modules: Sequence[nn.Module], name: str) -> None:
        self._own = {layer for one in modules if isinstance(layer := getattr(one, "layer_idx", None), int)}
        self._name = name

    def lists_in(self, value: Any, contents: Any) -> list[Any]:
        """What an object that is a cache has of each layer.

        Args:
            value: the object.
            contents: its attributes.

        Returns:
            Lists that are ordered by layer; none if the module does not say what layer it is.
        """
        if not self._own or not is_cache(type(value)) or not isinstance(contents, dict):
            return []
        return [contents[name] for name in _BY_LAYER if isinstance(contents.get(name), list)]

    def is_own(self, index: int) -> bool:
        """Whether the module belongs to a layer."""
        return index in self._own

    def without_tensors(self, value: Any, made: dict[int, Any] | None = None) -> Any:
        """What stands for something of another layer.

        Args:
            value: a tensor, or an object that holds some.
            made: what has been made of others.

        Returns:
            Another of the same class, which says how many there are, and has none.
        """
        if isinstance(value, Tensor):
            # A single number may be how many there are.
            return value.detach().clone() if value.numel() == 1 else OmittedTensor(value, self._name)
        made = made if made is not None else {}
        if id(value) not in made:
            made[id(value)] = value
            for adapter in adapters_of(type(value)):
                contents = adapter.read(value)
                if made[id(value)] is value:
                    made[id(value)] = adapter.new_empty(value, contents)
                inner = adapter.replaced(contents, partial(self.without_tensors, made=made))
                made[id(value)] = adapter.fill(made[id(value)], inner)
        return made[id(value)]
