"""Operators that torch's own rules for tensors without data refuse or get wrong.

The results of most have a shape that depends on data, which is known here; of one, bytes are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_memtrain.compat.torch_private import disable_current_modes
from lightning_memtrain.core.random_state import torch_random_kept
from lightning_memtrain.ledger.operators.workspace import OpCall, op_call

_aten = torch.ops.aten
_HALF_DTYPES = (torch.bfloat16, torch.float16)
Knows = Callable[[Any], bool]


def with_known_masks(func: Any, args: tuple[Any, ...], knows: Knows) -> tuple[Any, ...]:
    """Arguments with the places that masks select, where an operator is indexed by masks that are known.

    Args:
        func: the operator.
        args: its arguments.
        knows: whether a tensor's values are known.

    Returns:
        The arguments to call it with.
    """
    if func is not _aten.index.Tensor:
        return args
    indices: list[Any] = []
    for index in args[1]:
        is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        indices += index.nonzero().unbind(1) if is_mask and knows(index) else [index]
    return args[0], indices, *args[2:]


def _masked_select(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    tensor, mask = args
    if not knows(given[1]):
        return func(*args, **kwargs)
    shape = torch.broadcast_tensors(tensor, mask)[0].shape  # type: ignore[no-untyped-call]
    return tensor.new_empty(int(given[1].expand(shape).sum()))


def _pack_padded_sequence(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    padded, lengths, batch_first = given
    if not knows(lengths):
        return func(*args, **kwargs)
    # One number per step tells how many steps there are in all, and which.
    slim = torch.empty(*padded.shape[:2], 1)
    packed, batch_sizes = func(slim, lengths, batch_first)
    return args[0].new_empty(len(packed), *padded.shape[2:]), batch_sizes


def _ctc_loss(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    log_probs, target_lengths = args[0], given[3]
    if isinstance(target_lengths, Tensor):
        if not knows(target_lengths):
            return func(*args, **kwargs)
        target_lengths = target_lengths.tolist()
    num_steps, batch_size = log_probs.shape[:2] if log_probs.dim() == 3 else (len(log_probs), 1)
    longest = max(target_lengths, default=0)
    return log_probs.new_empty(batch_size), log_probs.new_empty(batch_size, num_steps, 2 * longest + 1)


_scratch_bytes: dict[OpCall, int] = {}


def _mkldnn_rnn_layer(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    """A layer of an LSTM on a CPU: what it keeps for backward has a size that only the library knows."""
    output, hidden, cell, scratch = func(*args, **kwargs)
    if not torch.is_grad_enabled():
        return output, hidden, cell, scratch
    call = op_call(func, args, kwargs)
    if call not in _scratch_bytes:
        with disable_current_modes(), torch_random_kept(torch.device("cpu")):
            made_up, _ = call.make_arguments(torch.device("cpu"))
            _scratch_bytes[call] = func(*made_up)[3].numel()
    return output, hidden, cell, scratch.new_empty(_scratch_bytes[call])


def _mkldnn_rnn_layer_backward(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    """Gradients of both biases: torch's rule gives the same tensor for both, the library two."""
    results = [*func(*args, **kwargs)]
    if results[3] is results[4]:
        results[4] = torch.empty_like(results[3])
    return tuple(results)


def _grouped_mm(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    """Products of experts' weights, which torch's rule has for bfloat16 alone."""
    one, other, offsets = [*args, *(kwargs.get(name) for name in ("self", "mat2", "offs"))][:3]
    offsets = kwargs.get("offs", offsets)
    columns = other.shape[-1]
    if one.dim() == 3:
        shape = [one.shape[0], one.shape[1], columns] if other.dim() == 3 else [one.shape[1], columns]
    else:
        shape = [len(one), columns] if other.dim() == 3 else [len(offsets), len(one), columns]
    dtype = kwargs.get("out_dtype") or one.dtype
    # Rows begin at multiples of 16 bytes.
    aligned = 16 // dtype.itemsize
    row = -(-columns // aligned) * aligned
    strides = [shape[1] * row, row, 1][-len(shape) :]
    return torch.empty_strided(shape, strides, dtype=dtype, device=one.device)


def _batch_norm(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    """On a CPU the result is contiguous, where torch's rule keeps the strides of the input."""
    results = func(*args, **kwargs)
    if args[0].device.type != "cpu" or results[0].is_contiguous():
        return results
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(args[0].dim())
    if channels_last is not None and args[0].is_contiguous(memory_format=channels_last):
        return results
    return results[0].new_empty(results[0].shape), *results[1:]


def _statistics_in_float32(func: Any, args: Any, kwargs: Any, given: Any, knows: Knows) -> Any:
    """On a CPU statistics of half-precision inputs are float32 where weights are, unlike in torch's rule."""
    is_of_batches = func is _aten.native_batch_norm.default
    results = _batch_norm(func, args, kwargs, given, knows) if is_of_batches else func(*args, **kwargs)
    others = [*args[1:], *kwargs.values()]
    are_mixed = any(isinstance(one, Tensor) and one.dtype is torch.float32 for one in others)
    if args[0].device.type != "cpu" or args[0].dtype not in _HALF_DTYPES or not are_mixed:
        return results
    return results[0], *(one.new_empty(one.shape, dtype=torch.float32) for one in results[1:])


FAKE_RULES: dict[Any, Callable[[Any, Any, Any, Any, Knows], Any]] = {
    _aten.masked_select.default: _masked_select,
    _aten._pack_padded_sequence.default: _pack_padded_sequence,
    _aten._ctc_loss.default: _ctc_loss,
    _aten._ctc_loss.Tensor: _ctc_loss,
    _aten.mkldnn_rnn_layer.default: _mkldnn_rnn_layer,
    _aten.mkldnn_rnn_layer_backward.default: _mkldnn_rnn_layer_backward,
    _aten.native_batch_norm.default: _statistics_in_float32,
    _aten.native_layer_norm.default: _statistics_in_float32,
    _aten.native_group_norm.default: _statistics_in_float32,
}
"""What to call in place of an operator: with it, its arguments without data, and the arguments as given."""

ANY_DEVICE_RULES: dict[Any, Callable[[Any, Any, Any, Any, Knows], Any]] = {}
"""Those of :data:`FAKE_RULES` that hold on every device."""

# Of newer versions of torch only.
_packet = getattr(_aten, "_grouped_mm", None)
if _packet is not None:
    ANY_DEVICE_RULES[_packet.default] = FAKE_RULES[_packet.default] = _grouped_mm
