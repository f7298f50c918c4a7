"""Optimizer state that follows the entries of a weight when they move."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_memtrain.core.plain_tensors import is_plain
from lightning_memtrain.optimizer_steps import SupportsReindexing
from lightning_memtrain.sparsity.storage.shards import full_tensor, prepare_write

# State that scales the step of an entry: it would be too long, by far, for one that starts at 0. Adam's with
# both moments at 0 under a step counter that has gone on is 15 times as long as its neighbours'.
_SCALES = frozenset(
    {
        "exp_avg_sq",  # Adam and its relatives
        "max_exp_avg_sq",  # with amsgrad
        "exp_inf",  # Adamax
        "square_avg",  # RMSprop, Adadelta
        "acc_delta",  # Adadelta: numerator of the step
        "sum",  # Adagrad
        "step_size",  # Rprop
        "variance",  # Adafactor, which does not factor what has one axis
        "state2",  # bitsandbytes
    }
)
# State that adds up gradients or steps, or follows the entry's own value, which starts at 0.
_SUMS = frozenset({"momentum_buffer", "exp_avg", "mu", "grad_avg", "prev", "ax", "z"})

_BITSANDBYTES_BLOCK_NUMEL = 256


def check_reindexable(optimizers: Iterable[Optimizer], parameter: Tensor) -> None:
    """Make sure that :func:`prepare_state` can move all state of a parameter.

    Args:
        optimizers: all that may step it.
        parameter: values ``(nnz,)``.

    Raises:
        TypeError: if an optimizer has state of another form than one number per entry; names it.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, SupportsReindexing):
            if isinstance(parameter.data, DTensor):
                raise TypeError(
                    f"The state of {type(optimizer).__name__} cannot follow weights that move between the "
                    "shards of ranks. Use an elementwise optimizer (SGD, Adam, AdamW, RMSprop, Adagrad), or "
                    "a method that moves no weights."
                )
            continue
        state = optimizer.state.get(parameter, {})
        coded = _bitsandbytes_keys(state, parameter)
        for key, value in state.items():
            if key not in coded and not _is_elementwise(value, parameter) and not _is_scalar(value):
                raise TypeError(
                    f"The state {key!r} of {type(optimizer).__name__} ({_described(value)}) cannot follow "
                    f"weights that move: the parameter has {parameter.numel()} entries, and this is not one "
                    "plain number for each. Use an elementwise optimizer (SGD, Adam, AdamW, RMSprop, "
                    "Adagrad, `SGD8bit`), a method that moves no weights, or give the optimizer a "
                    "`reindex_state`."
                )


def prepare_state(
    optimizers: Iterable[Optimizer], parameter: Tensor, move: Reindexing
) -> list[Callable[[], None]]:
    """Prepare to give each entry the state that it had at its former number.

    Entries that are new start with momentum 0, and with the mean over the entries that stay for what scales
    their step: the second moments of Adam and its relatives (``exp_avg_sq``, ``max_exp_avg_sq``,
    ``exp_inf``), RMSprop's and Adadelta's ``square_avg``, Adadelta's ``acc_delta``, Adagrad's ``sum``,
    Rprop's ``step_size``. Of an entry by another name, the mean if it is nowhere negative and 0 otherwise.
    Scalars, such as the number of steps, stay.

    Args:
        optimizers: which :func:`check_reindexable` has found no fault with; none has changed afterwards.
        parameter: before it changes its size, which it cannot where it is divided among ranks.
        move: of its entries.

    Returns:
        What is to be called for the change; each makes no tensor and may be called several times.
    """
    assignments: list[Callable[[], None]] = []
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        if isinstance(optimizer, SupportsReindexing):
            assignments.append(partial(_refill, state, _reindexed(optimizer, parameter, move.source)))
            continue
        coded = _bitsandbytes_keys(state, parameter)
        new: dict[str, Tensor] = {}
        for number in "12":
            if f"state{number}" in coded:
                new |= _moved_bitsandbytes(state, number, move)
        for key, value in state.items():
            if key in coded or not _is_elementwise(value, parameter):
                continue
            entries = full_tensor(value)
            entries = move(entries, mean=_is_scale(key, entries))
            if isinstance(value, DTensor):
                assignments.append(prepare_write(value, entries))
            else:
                new[key] = entries
        assignments.append(partial(state.update, new))
    return assignments


def _reindexed(optimizer: Any, parameter: Tensor, source: Tensor) -> dict[str, Any]:
    """The state that an optimizer makes by itself, while it keeps the one that it has."""
    twin = object.__new__(type(optimizer))
    own = optimizer.state.get(parameter, {})
    twin.__dict__ |= {**vars(optimizer), "state": defaultdict(dict, {parameter: dict(own)})}
    twin.reindex_state(parameter, source)
    moved_by_itself: dict[str, Any] = twin.state[parameter]
    return moved_by_itself


def _refill(state: dict[str, Any], new: dict[str, Any]) -> None:
    state.clear()
    state.update(new)


class Reindexing:
    """Puts entries in the places of others.

    Args:
        source: int64 ``(new nnz,)``: for each entry to be, the number of the one that it was, or -1 if it is
            new.

    Example:
        >>> move = Reindexing(torch.tensor([2, -1, 1]))
        >>> move(torch.tensor([1.0, 2.0, 6.0])), move(torch.tensor([1.0, 2.0, 6.0]), mean=True)
        (tensor([6., 0., 2.]), tensor([6., 4., 2.]))
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self._is_new, self._numbers = source < 0, source.clamp(min=0)

    def __call__(self, entries: Tensor, *, mean: bool = False) -> Tensor:
        """Put entries in their new places.

        Args:
            entries: floating point ``(old nnz,)``.
            mean: new ones are the mean of those that stay (of all, if none stays) instead of 0.

        Returns:
            A new tensor ``(new nnz,)`` of the same dtype.
        """
        if not len(entries):
            return entries.new_zeros(len(self.source))
        result = entries.index_select(0, self._numbers)
        if not mean:
            return result.masked_fill_(self._is_new, 0)
        staying = result[~self._is_new]
        exact = torch.promote_types(entries.dtype, torch.float32)
        level = (staying if len(staying) else entries).mean(dtype=exact)
        return result.masked_fill_(self._is_new, level.to(entries.dtype))


def _is_scale(key: str, value: Tensor) -> bool:
    return key in _SCALES or (key not in _SUMS and bool((value >= 0).all()))


def _is_scalar(value: Any) -> bool:
    """One number for the whole parameter, or a setting."""
    if isinstance(value, Tensor):
        return is_plain(value) and value.numel() == 1
    return value is None or isinstance(value, (bool, int, float, str))


def _is_elementwise(value: Any, parameter: Tensor) -> bool:
    if isinstance(parameter.data, DTensor):
        if not isinstance(value, DTensor) or value.placements != parameter.data.placements:
            return False
    elif not is_plain(value):
        return False
    return bool(value.is_floating_point() and value.shape == parameter.shape)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    return type(value).__name__


# ---------------------------------------------------------------------- bitsandbytes' 8-bit state


def _bitsandbytes_keys(state: dict[str, Any], parameter: Tensor) -> set[str]:
    """Entries that are coded by blocks: an 8-bit code per number into a table, times a scale per block."""
    coded: set[str] = set()
    for number in "12":
        codes, table, scales = (state.get(f"{part}{number}") for part in ("state", "qmap", "absmax"))
        if (
            isinstance(codes, Tensor)
            and isinstance(table, Tensor)
            and isinstance(scales, Tensor)
            and codes.dtype == torch.uint8
            and codes.shape == parameter.shape
            and table.numel() == 256
            and scales.numel() == -(-codes.numel() // _BITSANDBYTES_BLOCK_NUMEL)
        ):
            coded |= {f"{part}{number}" for part in ("state", "qmap", "absmax")}
    return coded


def _moved_bitsandbytes(state: dict[str, Any], number: str, move: Reindexing) -> dict[str, Tensor]:
    """Decode, move and encode again, by way of one layer's numbers in float32."""
    codes, table, scales = (state[f"{part}{number}"] for part in ("state", "qmap", "absmax"))
    size = _BITSANDBYTES_BLOCK_NUMEL
    numbers = table[codes.int()] * scales.repeat_interleave(size)[: codes.numel()]
    numbers = move(numbers, mean=_is_scale(f"state{number}", numbers))
    blocks = torch.nn.functional.pad(numbers, (0, -len(numbers) % size)).view(-1, size)
    scales = blocks.abs().amax(1)
    parts = (blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).view(-1)[: len(numbers)]
    codes = torch.bucketize(parts, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    return {f"state{number}": codes, f"absmax{number}": scales}
