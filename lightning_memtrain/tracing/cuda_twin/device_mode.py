"""Runs operators on the twin: shapes and bytes of a GPU's kernels, values only where they can be known."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend
from lightning_memtrain.tracing.cuda_twin.known_values import KnownValues
from lightning_memtrain.tracing.questions import AsksForValue, user_site
from lightning_memtrain.tracing.usual import UsualValues

_aten = torch.ops.aten
_DEPENDS_ON_DATA = (DataDependentOutputException, DynamicOutputShapeException)
# What autograd does in place, unless a mode or a tensor's class keeps it from it.
_SCATTERS = frozenset((_aten.scatter, _aten.scatter_add, _aten.index_add, _aten.index_put, _aten.masked_scatter))
_MATRIX_PRODUCTS = frozenset((_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.addbmm, _aten.mv, _aten.dot))


class TwinDeviceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets everything that happens on the twin happen without data; what is on the CPU is computed as always.

    Args:
        backend: holds what is allocated.
        on_matrix_product: called with the operator before each product of matrices.
    """

    def __init__(
        self, backend: TwinBackend, on_matrix_product: Callable[[Any], None] = lambda func: None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._backend = backend
        self._on_matrix_product = on_matrix_product
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.known = KnownValues()
        self._usual = UsualValues()
        self._zeros: weakref.ref[Tensor] | None = None
        self._alone: tuple[int, int] | None = None
        self.guessed: dict[str, str] = {}
        """Lines of the user's code that asked for a number that nobody knows, and what was asked."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        on_twin = any(
            isinstance(one, FakeTensor) or (isinstance(one, torch.device) and one.type == DEVICE_TYPE)
            for one in flat
        )
        if not on_twin:
            return func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1 and self._is_in_place_on_a_device(func, args):
            self.known.forget(args[0])
            return args[0]
        if func.overloadpacket in _MATRIX_PRODUCTS:
            self._on_matrix_product(func)
        try:
            bare_args, bare_kwargs = tree_map(self._bare, (args, kwargs))
            with self.fake:
                result = func(*bare_args, **bare_kwargs)
        except _DEPENDS_ON_DATA:
            result = self._answered(func, args, kwargs, flat)
        else:
            self._usual.follow(func, args, result)
            self.known.follow(func, args, kwargs, result)
        if func is _aten.new_zeros.default:
            self._zeros = weakref.ref(result)
        for one in tree_flatten(result)[0]:
            if isinstance(one, Tensor) and one.device.type == DEVICE_TYPE:
                self._backend.hold(one)
        return result

    def _is_in_place_on_a_device(self, func: Any, args: Any) -> bool:
        """Whether autograd would write the result into the first argument, if no mode were on.

        It adds gradients up in place if nobody else holds the first one, and scatters into zeros that it has
        just made.
        """
        if func is _aten.add.Tensor:
            first, other = args[:2]
            return (
                isinstance(other, Tensor)
                and first.shape == other.shape
                and first.dtype is other.dtype
                and self._counts(first) == self._alone
            )
        return func.overloadpacket in _SCATTERS and self._zeros is not None and self._zeros() is args[0]

    def _counts(self, tensor: Tensor) -> tuple[int, int]:
        return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)

    def calibrate(self) -> None:
        """See what a gradient that autograd alone holds looks like; within this mode."""
        seen: list[tuple[int, int]] = []
        self._is_in_place_on_a_device = lambda func, args: (  # type: ignore[method-assign]
            seen.append(self._counts(args[0])) if func is _aten.add.Tensor else None
        )
        weight = torch.ones(2, device=DEVICE_TYPE, requires_grad=True)
        middle = weight * 2
        (middle.tanh() * middle.exp()).sum().backward()
        del self._is_in_place_on_a_device
        self._alone = seen[0]

    def _answered(self, func: Any, args: Any, kwargs: Any, flat: list[Any]) -> Any:
        if all(self.known.real_or_known(one) is not None for one in flat if isinstance(one, Tensor)):
            values = self.known.compute(func, args, kwargs)
            return tree_map(lambda one: self._on_twin(one) if isinstance(one, Tensor) else one, values)
        usual = self._usual.of(args[0]) if args else None
        if func is _aten.allclose.default:
            return True
        if func is _aten._local_scalar_dense.default:
            if usual is not None:
                return usual
            if args[0].is_floating_point():
                site = user_site()
                self.guessed.setdefault(str(site), str(func))
                return float("nan")
        raise AsksForValue(str(func), user_site())

    def _on_twin(self, real: Tensor) -> Tensor:
        with self.fake:
            made = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=DEVICE_TYPE)
        self.known.set(made, real)
        return made

    def _bare(self, value: Any) -> Any:
        """A tensor without data in the place of one on the CPU, with which torch would go on to compute."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or value.layout is not torch.strided:
            return value
        with self.fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def moved(self, tensor: Tensor) -> Tensor:
        """A tensor of the same form on the twin.

        Args:
            tensor: any strided one; that it requires gradients is kept.

        Returns:
            One that holds no data; its values are known if ``tensor`` has data and is small.
        """
        with torch.no_grad(), self.fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE_TYPE)
        self._backend.hold(made)
        return made
