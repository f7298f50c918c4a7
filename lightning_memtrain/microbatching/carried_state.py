"""Models that carry tensors from one ``training_step`` to the next, which chunks would pass to each other.

A recurrent model that goes on with the hidden state of the batch before takes sample 1 of a batch for the
continuation of sample 1 of the batch before. The second chunk would go on with the state of the first, that
is, of other samples, and nothing would fail.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import Metric

from lightning_memtrain.compat.torch_private import version_counter
from lightning_memtrain.core import is_out_of_memory
from lightning_memtrain.microbatching.splitting.chunks import Chunk

# Objects of these packages keep no state of samples; a trainer, for instance, leads to everything.
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "lightning_memtrain", "torchmetrics", "numpy")
_MOST_ITEMS = 1000
# A tensor is used if another one comes of it, or if its values leave torch; its shape may be asked for.
_READ_VALUES = {"item", "tolist", "numpy", "equal", "allclose", "__bool__", "__float__", "__int__"}
_ONLY_WRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_"}


class _Left(NamedTuple):
    """A tensor that a chunk has made, or written to, and left in the model."""

    place: str
    tensor: weakref.ref[Tensor]
    version: int
    shape: tuple[int, ...]
    has_axis_of_samples: bool


class CarriedState:
    """Watches chunks of some batches: of the first ones, and then of ever fewer.

    Args:
        model: the module that is trained.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._num_batches = 0
        self._num_samples: int | None = None
        self._watches = False
        self._uses = _Uses()
        self._left: dict[int, _Left] = {}
        self._warned = False

    def begin(self, chunks: Sequence[Chunk]) -> None:
        """Begin a batch, and decide whether it is watched.

        Args:
            chunks: to be run; a single one is not watched.
        """
        sizes = [chunk.num_samples for chunk in chunks]
        self._num_samples = None if None in sizes else sum(size for size in sizes if size is not None)
        self._num_batches += len(chunks) > 1
        # Powers of two and the batch after each: what one batch has left is used in the next at the earliest.
        number = self._num_batches
        is_due = number & (number - 1) == 0 or (number - 1) & (number - 2) == 0
        self._watches = len(chunks) > 1 and is_due
        if not self._watches:
            self._left = {}

    @contextmanager
    def watch(self, chunk: Chunk) -> Iterator[None]:
        """Around ``training_step`` of one chunk.

        Args:
            chunk: which one.

        Raises:
            MisconfigurationException: if it goes on with a state of the samples of the one before.
        """
        if not self._watches:
            yield
            return
        # With references: another tensor may get the identity of one that is gone.
        before = {
            id(tensor): (weakref.ref(tensor), _version(tensor)) for _, tensor in _tensors_in(self._model)
        }
        carried, self._left = self._left, {}
        uses = self._uses.watching(carried)
        try:
            with uses if carried else nullcontext():
                yield
        except Exception as error:
            # A layer that is given the state of another number of samples fails, and does not say whose.
            if is_out_of_memory(error):
                raise
            _refuse(uses.touched.values(), error)
            raise
        after = {id(tensor): (place, tensor) for place, tensor in _tensors_in(self._model)}
        # What is still there as it was is no state but made once, such as a mask or a table of positions.
        replaced = [
            left
            for number, left in uses.touched.items()
            if number in uses.read and not _is_as_left(left, after.get(number))
        ]
        _refuse(replaced)
        self._warn(replaced)
        for number, (place, tensor) in after.items():
            reference, version = before.get(number, (None, -1))
            was_there = reference is not None and reference() is tensor
            if tensor.ndim and (not was_there or version < _version(tensor)):
                sizes = {self._num_samples} if was_there else {self._num_samples, chunk.num_samples}
                of_samples = bool(sizes.intersection(tensor.shape))
                shape = tuple(tensor.shape)
                left = _Left(place, weakref.ref(tensor), _version(tensor), shape, of_samples)
                self._left[number] = left

    def _warn(self, replaced: Iterable[_Left]) -> None:
        if self._warned or not (places := [f"{left.place}, {list(left.shape)}" for left in replaced]):
            return
        self._warned = True
        warnings.warn(
            "`Microbatching` moves a state that `training_step` carries from one call to the next once per "
            f"microbatch, not once per batch ({'; '.join(places)}), so the result is not that of whole "
            "batches. Move it once per batch, in `on_train_batch_end` or `on_before_zero_grad`.",
            stacklevel=2,
        )


def _is_as_left(left: _Left, now: tuple[str, Tensor] | None) -> bool:
    return now is not None and left.tensor() is now[1] and _version(now[1]) == left.version


def _refuse(used: Iterable[_Left], error: Exception | None = None) -> None:
    for left in used:
        if left.has_axis_of_samples:
            raise MisconfigurationException(
                "`Microbatching` needs a model whose `training_step` goes on with nothing of the samples of "
                "the call before, since a microbatch would go on with the state of the one before it, that "
                f"is, of other samples, but got {left.place} of shape {left.shape}, which one microbatch has "
                "left and the next one has used. Give the state to `training_step` in the batch, sample by "
                "sample, or train without `Microbatching`, e.g. with `ActivationCheckpointing`."
            ) from error


class _Uses(TorchFunctionMode):
    """Notes which of some tensors are used outside of compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: Mapping[int, _Left] = {}
        self.touched: dict[int, _Left] = {}
        self.read: set[int] = set()

    def watching(self, watched: Mapping[int, _Left]) -> _Uses:
        """Begin anew; always the same mode, since compiled code is made once for each.

        Args:
            watched: tensors by their identity.

        Returns:
            Itself.
        """
        self._watched, self.touched, self.read = watched, {}, set()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))  # what is noted here would be compiled in
        name = getattr(func, "__name__", "")
        written = args[0] if name in _ONLY_WRITE else None
        touched = {}
        for tensor in _tensors_among((args, kwargs)):
            left = self._watched.get(id(tensor))
            if left is not None and left.tensor() is tensor and tensor is not written:
                touched[id(tensor)] = left
        self.touched |= touched
        result = func(*args, **(kwargs or {}))
        if touched and (name in _READ_VALUES or any(True for _ in _tensors_among(result))):
            self.read |= touched.keys()
        return result


def _tensors_among(items: Any) -> Iterator[Tensor]:
    if isinstance(items, Tensor):
        yield items
    elif isinstance(items, (list, tuple)):
        for item in items:
            yield from _tensors_among(item)
    elif isinstance(items, dict):
        yield from _tensors_among(list(items.values()))


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else version_counter(tensor)


def _tensors_in(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules have in attributes or buffers, with their places; not those of metrics."""
    modules = list(model.named_modules())
    metrics = [module for _, module in modules if isinstance(module, Metric)]
    within_metrics = {id(part) for metric in metrics for part in metric.modules()}
    for path, module in modules:
        package = _package(module)
        if id(module) in within_metrics or package == "lightning_memtrain":
            continue
        held = {
            name: value
            for name, value in vars(module).items()
            if name not in _OF_MODULES and not _is_plain(value)
        }
        if package != "torch":  # statistics of its normalisations, which have their own rules
            held |= module._buffers
        if held:
            yield from _inside(f"{type(model).__name__}.{path}" if path else type(model).__name__, held)


_OF_MODULES = frozenset(vars(nn.Module()))


# Most of what modules hold is of these kinds, with nothing in it. It is asked before each chunk.
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device))


def _inside(place: str, held: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    waiting: deque[tuple[str, Any]] = deque((f"{place}.{name}", value) for name, value in held.items())
    seen: set[int] = set()
    num_left = _MOST_ITEMS
    while waiting and num_left:
        num_left -= 1
        path, item = waiting.popleft()
        if isinstance(item, nn.Parameter) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield path, item
        elif isinstance(item, Mapping):
            items = islice(item.items(), _MOST_ITEMS)
            waiting.extend((f"{path}[{key!r}]", value) for key, value in items if not _is_plain(value))
        elif isinstance(item, (list, tuple, deque)):
            numbered = enumerate(islice(item, _MOST_ITEMS))
            waiting.extend((f"{path}[{i}]", value) for i, value in numbered if not _is_plain(value))
        elif _is_object_of_the_user(item):
            waiting.extend((f"{path}.{name}", value) for name, value in vars(item).items())


def _is_plain(value: Any) -> bool:
    kind = type(value)
    return kind in _PLAIN or (kind in (tuple, list) and all(type(one) in _PLAIN for one in value))


def _is_object_of_the_user(item: Any) -> bool:
    is_code = isinstance(item, (type, ModuleType, FunctionType, nn.Module))
    return not is_code and hasattr(item, "__dict__") and _package(item) not in _FOREIGN


def _package(item: Any) -> str:
    return type(item).__module__.split(".")[0]
