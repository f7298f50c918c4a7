"""Sparse parameters of modules that are no linear or convolution layers: recurrent layers and experts.

Such a module has several weights, or a forward of its own. It stays the same object, and its class becomes a
subclass that shows a dense weight where a parameter was; the stored entries are in a submodule beside it.
"""

from __future__ import annotations

import weakref
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_memtrain.compat.torch_private import ConvNd
from lightning_memtrain.sparsity.storage.layers.sparse_layer import SparseLayer, dense_in_checkpoint
from lightning_memtrain.sparsity.storage.patterns import Span, Storage

#: Follows the name of a parameter in that of the submodule with its stored entries.
SPARSE_SUFFIX = "_sparse"


def can_be_sparse(module: nn.Module, attribute: str) -> bool:
    """Whether a parameter of a module is one of those that this form is for.

    Args:
        module: that has it.
        attribute: its name there.

    Returns:
        ``True`` for the weights of recurrent layers, and for parameters of three axes, one matrix for each
        expert, of modules that are no convolutions.
    """
    parameter = module._parameters.get(attribute)
    if parameter is None or isinstance(module, ConvNd):
        return False
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return fnmatchcase(attribute, "weight_*")
    return not is_lazy(parameter) and parameter.dim() == 3


class SparseParameter(SparseLayer):
    """Of one parameter, the stored entries and where they belong; called by nobody.

    Args:
        dense: the parameter so far.
        positions: int64 of one axis, ascending.
        storage: form of the pattern.
    """

    def __init__(self, dense: nn.Parameter, positions: Tensor, storage: Storage) -> None:
        super().__init__()
        self._shape = tuple(dense.shape)
        self.storage = storage
        self.chunk_bytes = None
        self.become_sparse(dense, positions)

    @property
    def dense_shape(self) -> torch.Size:
        """Shape of the parameter."""
        return torch.Size(self._shape)

    @property
    def parts(self) -> tuple[Span, ...]:
        """Where each expert is, if each can be made alone."""
        return self._chunks

    def _spans(self, positions: Tensor) -> tuple[Span, ...]:
        """Of one expert each; none where a byte of the bitmask would have entries of two."""
        part_numel = self.dense_shape[1:].numel()
        if len(self._shape) != 3 or part_numel % 8 or positions.is_meta:
            return ()
        firsts = torch.arange(self._shape[0] + 1, device=positions.device) * part_numel
        starts, borders = torch.searchsorted(positions, firsts).tolist(), firsts.tolist()
        spans = zip(borders[:-1], borders[1:], starts[:-1], starts[1:], strict=True)
        return tuple(Span(*span) for span in spans)

    def dense_key(self, prefix: str) -> str:
        """Name of the parameter beside which this module is."""
        return prefix.removesuffix(f"{SPARSE_SUFFIX}.")

    def extra_repr(self) -> str:
        """Its shape, how much is stored, and how."""
        return f"{', '.join(map(str, self._shape))}{super().extra_repr()}"


class SparseParameterOwner(nn.Module):
    """A module with sparse parameters; the classes below it are made by :func:`sparsify_parameter`."""

    sparse_names: ClassVar[tuple[str, ...]]
    dense_type: ClassVar[type[nn.Module]]
    #: Of all parameters of the dense module, in their order.
    _parameter_names: list[str]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.sparse_names:
            _sparse_parameter(self, name).weight = value
        else:
            super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        *_, error_msgs = rest
        keys = [f"{prefix}{name}" for name in self.sparse_names]
        error_msgs.extend(dense_in_checkpoint(key) for key in keys if key in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class has no name by which it could be found.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, *rest = reduced
        return _empty_owner, (self.dense_type, self.sparse_names), *rest


class _SparseRecurrent(SparseParameterOwner):
    """Makes the dense weights of a recurrent layer once for a call, which autograd keeps until backward."""

    _flat_weights: list[Tensor | None]
    _flat_weights_names: list[str]
    _made: dict[str, Tensor] | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the dense layer with weights that are made for this call."""
        self._made = {name: _sparse_parameter(self, name).dense_with_gradient() for name in self.sparse_names}
        self._flat_weights = [getattr(self, name, None) for name in self._flat_weights_names]
        self._flat_weight_refs = [None if one is None else weakref.ref(one) for one in self._flat_weights]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._made = None
            self._init_flat_weights()

    def _init_flat_weights(self) -> None:
        self._flat_weights = [None] * len(self._flat_weights_names)
        self._flat_weight_refs = [None] * len(self._flat_weights_names)

    def flatten_parameters(self) -> None:
        """Nothing: weights that are made for a call lie in no common piece of memory."""

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_flat_weight_refs"}


def _sparse_parameter(module: nn.Module, name: str) -> SparseLayer:
    return cast(SparseLayer, module._modules[f"{name}{SPARSE_SUFFIX}"])


def _weight_property(name: str) -> property:
    def get(module: nn.Module) -> Tensor:
        made: dict[str, Tensor] | None = module.__dict__.get("_made")
        return made[name] if made is not None else _sparse_parameter(module, name).weight

    return property(get)


@cache
def _sparse_type(dense_type: Any, names: tuple[str, ...]) -> type[SparseParameterOwner]:
    mixin = _SparseRecurrent if issubclass(dense_type, nn.RNNBase) else SparseParameterOwner
    namespace: dict[str, Any] = {name: _weight_property(name) for name in names}
    namespace |= {"sparse_names": names, "dense_type": dense_type, "__module__": dense_type.__module__}
    return type(f"Sparse{dense_type.__name__}", (mixin, dense_type), namespace)


def _empty_owner(dense_type: Any, names: tuple[str, ...]) -> SparseParameterOwner:
    made: type[SparseParameterOwner] = _sparse_type(dense_type, names)
    return made.__new__(made)


def sparsify_parameter(module: nn.Module, name: str, positions: Tensor, storage: Storage) -> None:
    """Make one parameter of a module sparse, in place.

    Args:
        module: changes its class.
        name: of the parameter there.
        positions: int64 of one axis, ascending.
        storage: form of the pattern.
    """
    names = module.sparse_names if isinstance(module, SparseParameterOwner) else ()
    module.__dict__.setdefault("_parameter_names", [*module._parameters])
    dense_type: Any = module.dense_type if isinstance(module, SparseParameterOwner) else type(module)
    dense = cast(nn.Parameter, module._parameters.pop(name))
    module._modules[f"{name}{SPARSE_SUFFIX}"] = SparseParameter(dense, positions, storage)
    module.__class__ = _sparse_type(dense_type, (*names, name))
    if isinstance(module, _SparseRecurrent):
        module._init_flat_weights()


def densify_parameter(module: SparseParameterOwner, name: str) -> nn.Parameter:
    """Make one parameter of a module dense again, in place.

    Args:
        module: has its own class back when this was the last.
        name: of the parameter there.

    Returns:
        The parameter.
    """
    stored, names = _sparse_parameter(module, name), tuple(one for one in module.sparse_names if one != name)
    dense = nn.Parameter(stored.dense(), requires_grad=stored.values.requires_grad)
    dense_type: Any = module.dense_type
    del module._modules[f"{name}{SPARSE_SUFFIX}"]
    parameters = {**module._parameters, name: dense}
    module._parameters = {one: parameters[one] for one in module._parameter_names if one in parameters}
    module.__class__ = _sparse_type(dense_type, names) if names else dense_type
    if not names:
        for attribute in ("_parameter_names", "_made"):
            module.__dict__.pop(attribute, None)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    return dense
