"""Runs operators on tensors that hold no data, and on real ones where nothing else is involved."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    storage_key,
    tree_flatten,
    tree_map,
    tree_unflatten,
)
from lightning_memtrain.ledger.tensors.storages import tensors_in
from lightning_memtrain.tracing.inplace_writes import CopyOnWrite, returns_views, written_tensors
from lightning_memtrain.tracing.step.fake_operator_rules import FAKE_RULES, with_known_masks
from lightning_memtrain.tracing.step.random_dependence import RandomDependence
from lightning_memtrain.tracing.step.recorded_values import RecordedValues, TensorForm, needs_data
from lightning_memtrain.tracing.step.result_forms import DEVICE_OF, ResultForms
from lightning_memtrain.tracing.step.sparse_gradients import SparseGradients
from lightning_memtrain.tracing.step.typical_values import TypicalValues
from lightning_memtrain.tracing.step.user_code import is_distribution_check

#: A tensor that is made from nothing may be asked for its values if it is small, such as positions and masks.
MOST_KNOWN_BYTES = 2**24
_DEPENDS_ON_DATA = (DataDependentOutputException, DynamicOutputShapeException)
_PLAIN = (Tensor, torch.nn.Parameter)


class FakeStepMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a step run in which some tensors are fake and hold no data; a ledger goes around it.

    What depends on one holds no data either. Everything else is computed, so that a program may ask for
    it: what is in the batch, lengths, masks, counters. Tensors that were there before are not changed: what
    an operator writes to is copied first, and given back by :meth:`restore_written`.

    Args:
        fake_mode: makes the tensors without data.
        fakes: of tensors that are neither read nor written, by ``id``, what is used for them: of the same
            shapes and dtypes.
        recorded: what a step with data answered, for questions that nothing else answers.
        most_known_floats_bytes: the largest tensor of numbers of floating type that is made with data.
    """

    def __init__(
        self,
        fake_mode: FakeTensorMode,
        fakes: Mapping[int, Tensor],
        recorded: RecordedValues,
        most_known_floats_bytes: int = MOST_KNOWN_BYTES,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake_mode = fake_mode
        self._fakes = fakes
        self._recorded = recorded
        self._most_known_floats_bytes = most_known_floats_bytes
        self._forms = ResultForms(fake_mode)
        self._typical = TypicalValues()
        self._copy_on_write = CopyOnWrite()
        self._random_dependence = RandomDependence()
        # Real storages that an operator without data has written to.
        self._stale: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._sparse = SparseGradients(self._note_stale)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile functions meanwhile."""
        return True

    @property
    def depends_on_random_numbers(self) -> bool:
        """Whether a random number was asked for, so that another one may lead to another step."""
        return self._random_dependence.was_asked_for

    def restore_written(self) -> None:
        """Give tensors that were there before what they held."""
        self._copy_on_write.restore_written()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs)) if kwargs else tensors_in(args)
        if not tensors:
            return self._made_from_nothing(func, args, kwargs)
        if self._sparse.takes(func, args, tensors):
            return self._sparse.run(func, args, kwargs)
        num_fake = sum(isinstance(tensor, FakeTensor) for tensor in tensors)
        if num_fake == 0 and (returns_views(func) or all(map(self.knows, tensors))):
            return self._really(func, args, kwargs)
        if num_fake == len(tensors) and func not in FAKE_RULES:
            return self._on_fakes(func, args, kwargs)
        return self._without_data(func, args, kwargs)

    def knows(self, value: Any) -> bool:
        """Whether a tensor's values are known.

        Args:
            value: anything.

        Returns:
            Whether it is a tensor that holds what it would hold in a real step.
        """
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor) or id(value) in self._fakes:
            return False
        if not self._stale or value.layout is not torch.strided or type(value) not in _PLAIN:
            return True
        return storage_key(value.untyped_storage()) not in self._stale

    # ------------------------------------------------------------------ three ways to run an operator

    def _made_from_nothing(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self._fake_mode:
            made = func(*args, **kwargs)
        if isinstance(made, FakeTensor):
            is_float = made.is_floating_point()
            if made.nbytes > (self._most_known_floats_bytes if is_float else MOST_KNOWN_BYTES):
                return made
        return self._really(func, args, kwargs)

    def _really(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._copy_on_write.before(func, args, kwargs)
        if needs_data(func):
            self._recorded.skip(str(func))
        result = func(*args, **kwargs)
        self._copy_on_write.after(func, result)
        self._random_dependence.follow(func, args, result)
        return result

    def _on_fakes(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            result = self._forms.run(func, args, kwargs, _by_torch)
        except _DEPENDS_ON_DATA:
            return self._answered(func, args)
        self._typical.follow(func, args, result)
        return result

    def _without_data(self, func: Any, args: Any, kwargs: Any) -> Any:
        for tensor in written_tensors(func, args, kwargs):
            self._note_stale(tensor)
        masked = with_known_masks(func, args, self.knows)
        flat, structure = tree_flatten((masked, kwargs))
        bare = [self._bare(leaf) for leaf in flat]
        bare_args, bare_kwargs = tree_unflatten(bare, structure)
        rule = FAKE_RULES.get(func)
        try:
            if rule is not None:
                result = rule(func, bare_args, bare_kwargs, args, self.knows)
            else:
                result = self._forms.run(func, bare_args, bare_kwargs, _by_torch)
        except _DEPENDS_ON_DATA:
            return self._answered(func, args)
        self._typical.follow(func, args, result)
        # An operator that returns what it was given returns the very thing.
        given = {id(now): leaf for leaf, now in zip(flat, bare, strict=True) if now is not leaf}
        return tree_map(lambda value: given.get(id(value), value), result) if given else result

    def _answered(self, func: Any, args: Any) -> Any:
        typical = self._typical.of(args[0]) if args else None
        if func is torch.ops.aten.allclose.default:
            typical = True
        elif func is not torch.ops.aten._local_scalar_dense.default:
            typical = None
        elif args[0].dtype is torch.bool and is_distribution_check():
            typical = True
        if typical is not None:
            self._recorded.skip(str(func))
            return typical
        answer = self._recorded.replay(str(func), args[0] if args else None)
        with self._fake_mode:
            return tree_map(lambda value: value.make() if isinstance(value, TensorForm) else value, answer)

    # ------------------------------------------------------------------ tensors

    def _bare(self, value: Any) -> Any:
        """A tensor that holds no data in the place of a real one."""
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        fake = self._fakes.get(id(value))
        if fake is not None:
            return fake
        if value.layout is torch.strided and type(value) in _PLAIN:
            with self._fake_mode:
                return torch.empty_strided(
                    value.size(), value.stride(), dtype=value.dtype, device=value.device
                )
        return self._fake_mode.fake_tensor_converter.from_real_tensor(self._fake_mode, value)

    def _note_stale(self, tensor: Tensor) -> None:
        if isinstance(tensor, FakeTensor) or tensor.layout is not torch.strided or type(tensor) not in _PLAIN:
            return
        storage = tensor.untyped_storage()
        key = storage_key(storage)
        self._stale[key] = weakref.ref(storage, lambda _: self._stale.pop(key, None))


def _by_torch(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


class RecordingMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets a real step run that is none: notes what its data answers, and gives back what it wrote to.

    Args:
        recorded: where to note them.
    """

    def __init__(self, recorded: RecordedValues) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorded = recorded
        self._copy_on_write = CopyOnWrite()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch compile functions meanwhile."""
        return True

    def restore_written(self) -> None:
        """Give tensors that were there before what they held."""
        self._copy_on_write.restore_written()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._copy_on_write.before(func, args, kwargs)
        result = func(*args, **kwargs)
        self._copy_on_write.after(func, result)
        if needs_data(func):
            self._recorded.record(str(func), tree_map(_without_values, result))
        return result


def _without_values(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point() or value.is_complex() or value.nbytes > MOST_KNOWN_BYTES:
        return TensorForm(tuple(value.shape), value.stride(), value.dtype, value.device)
    return value.detach().clone()
