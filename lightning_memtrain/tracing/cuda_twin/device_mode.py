"""Runs operators on the twin: shapes and bytes of a GPU's kernels, values only where they can be known."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    UnsupportedOperatorException,
    disable_current_modes,
    is_fake_mode_on,
    skip_in_dynamo,
    tree_leaves,
    tree_map,
)
from lightning_memtrain.coordination import dry_run_depth
from lightning_memtrain.core import ArgumentError
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE, TwinBackend
from lightning_memtrain.tracing.cuda_twin.in_place import InPlaceGradients
from lightning_memtrain.tracing.cuda_twin.known_values import KnownValues, leaves_of
from lightning_memtrain.tracing.cuda_twin.operators.convolutions import unfolded_bytes
from lightning_memtrain.tracing.cuda_twin.operators.missing_rules import forms_from_zeros, writes_only
from lightning_memtrain.tracing.inplace_writes import written_tensors
from lightning_memtrain.tracing.step.fake_operator_rules import ANY_DEVICE_RULES
from lightning_memtrain.tracing.step.recorded_values import UnknownValueError
from lightning_memtrain.tracing.step.result_forms import DEVICE_OF, ResultForms
from lightning_memtrain.tracing.step.typical_values import TypicalValues
from lightning_memtrain.tracing.step.user_code import user_location

_aten = torch.ops.aten
_DEPENDS_ON_DATA = (DataDependentOutputException, DynamicOutputShapeException)
_NO_RULE = (NotImplementedError, UnsupportedOperatorException)
_MATRIX_PRODUCTS = frozenset(
    (_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm, _aten.addbmm, _aten.mv, _aten.dot)
)

_PIN, _IS_PINNED = _aten._pin_memory.default, _aten.is_pinned.default


class TwinDeviceMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets everything that happens on the twin happen without data; what is on the CPU is computed as always.

    A number that is asked for is answered where it does not depend on weights, or where such questions always
    get the same answer (:class:`.TypicalValues`). Any other number of floating type is "not a number", and
    noted; any other integer, truth value or shape ends the step with :class:`.AsksForValue`.

    Args:
        backend: holds what is allocated.
        on_matrix_product: called before each product of matrices.
    """

    #: Without it nothing runs on the device, so it stays in dry runs.
    is_of_device = True

    def __init__(self, backend: TwinBackend, on_matrix_product: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._backend = backend
        self._on_matrix_product = on_matrix_product
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        """Makes tensors without data, of the CPU as well."""
        self._forms = ResultForms(self.fake)
        self.known = KnownValues()
        """Values of tensors on the twin."""
        self.guessed: dict[str, str] = {}
        """What was asked that nobody knows, and taken for "not a number", by the line that asked."""
        self._pinned: dict[int, weakref.ref[Tensor]] = {}
        self.convolution_bytes = 0
        """Most that cuDNN may take for a while, see :func:`.unfolded_bytes`."""
        self._usual = TypicalValues()
        self._in_place = InPlaceGradients()
        self._in_place.calibrate_before_backward()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would wrap every operator in more calls otherwise.
        return not skip_in_dynamo(cls.__dict__["__torch_dispatch__"])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        if any(map(_holds_others, types)):
            return NotImplemented  # the operators on the tensors inside come here instead
        if func in (_PIN, _IS_PINNED) or kwargs.get("pin_memory"):
            return self._unpinned(func, args, kwargs)
        if is_fake_mode_on():  # somebody asks for shapes only, as distributed tensors do
            return func(*args, **kwargs)
        if not any(map(_is_on_twin, leaves_of(args, kwargs))):
            return func(*args, **kwargs)
        if self._in_place.takes_place(func, args):
            self.known.forget(args[0])
            return args[0]
        counts = not dry_run_depth()
        if counts and func.overloadpacket in _MATRIX_PRODUCTS:
            self._on_matrix_product()
        try:
            result = self.without_data(func, args, kwargs)
        except _DEPENDS_ON_DATA:
            result = self._answered(func, args, kwargs)
        except _NO_RULE as error:
            result = self._without_rule(func, args, kwargs, error)
        else:
            self._usual.follow(func, args, result)
            self.known.follow(func, args, kwargs, result)
        self._in_place.follow(func, result)
        self.convolution_bytes = max(self.convolution_bytes, unfolded_bytes(func, args, result))
        found = (result,) if isinstance(result, Tensor) else leaves_of((result,), None)
        for one in found if counts else ():
            if isinstance(one, Tensor) and one.device.type == DEVICE_TYPE:
                _refuse_sparse(func, one)
                self._backend.hold(one)
        return result

    def _unpinned(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Memory of the CPU that a GPU can read by itself, which there is none of without a GPU."""
        if func is _IS_PINNED:
            reference = self._pinned.get(id(args[0]))
            return reference is not None and reference() is args[0]
        pinned = args[0].clone() if func is _PIN else func(*args, **{**kwargs, "pin_memory": False})
        key = id(pinned)
        self._pinned[key] = weakref.ref(pinned, lambda _: self._pinned.pop(key, None))
        return pinned

    def without_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operator makes, without data.

        Args:
            func: the operator.
            args: its arguments; none of them is read.
            kwargs: its arguments by name.

        Returns:
            Its results, tensors without data among them.
        """
        if any(
            isinstance(one, Tensor) and not isinstance(one, FakeTensor) for one in leaves_of(args, kwargs)
        ):
            args, kwargs = tree_map(self._bare, (args, kwargs))
        return self._forms.run(func, args, kwargs, self._by_torch)

    def _by_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        rule = ANY_DEVICE_RULES.get(func)
        with self.fake:
            if rule is not None:
                return rule(func, args, kwargs, args, lambda value: self.known.of(value) is not None)
            return func(*args, **kwargs)

    def _answered(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What a question for values gets, without those of weights."""
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        if all(self.known.real_or_known(one) is not None for one in tensors):
            values = self.known.compute(func, args, kwargs)
            device = _device_of_results(args, kwargs)
            return tree_map(
                lambda one: self._with_values(one, device) if isinstance(one, Tensor) else one, values
            )
        if func is _aten.allclose.default:
            return True
        if func is _aten._local_scalar_dense.default:
            usual = self._usual.of(args[0])
            if usual is not None:
                return usual
            if args[0].is_floating_point():
                self.guessed.setdefault(str(user_location()), str(func))
                return float("nan")
        raise UnknownValueError(str(func), user_location())

    def _without_rule(self, func: Any, args: Any, kwargs: Any, error: Exception) -> Any:
        """What an operator returns that torch cannot run without data."""
        for one in written_tensors(func, args, kwargs):
            self.known.forget(one)
        if writes_only(func):
            return None
        with disable_current_modes():
            forms = forms_from_zeros(func, args, kwargs)
        if forms is None:
            raise NotImplementedError(
                f"{func} has no rule for tensors without data (at {user_location()}); register one with "
                "`torch.library.register_fake`"
            ) from error
        device = _device_of_results(args, kwargs)
        return tree_map(lambda one: self._of_form(one, device) if isinstance(one, Tensor) else one, forms)

    def _of_form(self, form: Tensor, device: str) -> Tensor:
        with self.fake:
            return torch.empty_strided(form.shape, form.stride(), dtype=form.dtype, device=device)

    def _with_values(self, real: Tensor, device: str) -> Tensor:
        made = self._of_form(real, device)
        self.known.set(made, real)
        return made

    def _bare(self, value: Any) -> Any:
        """A tensor without data in the place of one on the CPU, with which torch would go on to compute."""
        if (
            not isinstance(value, Tensor)
            or isinstance(value, FakeTensor)
            or value.layout is not torch.strided
        ):
            return value
        with self.fake:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)

    def moved(self, tensor: Tensor, device: str = DEVICE_TYPE) -> Tensor:
        """A tensor of the same form on the twin.

        Args:
            tensor: any strided one, with or without data.
            device: ``"cpu"`` for one of the CPU that has no data either.

        Returns:
            One that holds no data; its values are known if those of ``tensor`` are and are worth following.
        """
        # This mode is left, too: it would take what it makes for a constant.
        with torch.no_grad(), disable_current_modes(), self.fake:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        if device == DEVICE_TYPE and not dry_run_depth():
            self._backend.hold(made)
        return made


def _refuse_sparse(func: Any, made: Tensor) -> None:
    if made.layout is not torch.strided:
        raise ArgumentError(
            f"`predict(model)` must have dense tensors on a GPU, but {func} makes one of layout "
            f"{made.layout}, whose places nobody knows without data. Predict with `sparse=False` in "
            "Embedding and EmbeddingBag, or for device='cpu', where sparse gradients are counted."
        )


def _holds_others(kind: type) -> bool:
    """Whether tensors of a class are a shell around others, as distributed ones are."""
    return hasattr(kind, "__tensor_flatten__")


def _device_of_results(args: Any, kwargs: Any) -> str:
    """Where results are that torch makes no form of: what has been copied to the CPU stays there."""
    devices = (getattr(one, "device", one) for one in leaves_of(args, kwargs))
    on_twin = any(isinstance(one, torch.device) and one.type == DEVICE_TYPE for one in devices)
    return DEVICE_TYPE if on_twin else "cpu"


def _is_on_twin(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == DEVICE_TYPE
    return isinstance(value, FakeTensor)
