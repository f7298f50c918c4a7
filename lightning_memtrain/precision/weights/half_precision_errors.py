"""Errors of half precision, with the layer that they came from, the cause, and the way out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_memtrain.compat.torch_private import storage_key, tree_leaves
from lightning_memtrain.core.arguments.module_selectors import Selector
from lightning_memtrain.precision.weights.autograd_history import parameters_before, was_half
from lightning_memtrain.precision.weights.converted_buffers import NamedBuffer
from lightning_memtrain.precision.weights.kept_layers import NORM, format_selectors, is_kept

_HALF = re.compile(r"\b(b?float16|half)\b", re.IGNORECASE)
# Not in lower case alone: "only supported for half, float and double".
_FLOAT32 = re.compile(r"\b(Float|float32)\b|\(float\)|: float\b|\bfloat !=|!= float\b")
_KINDS = (RuntimeError, NotImplementedError, ValueError)
_TARGETS = (
    "the last item of a tuple or list, and what is named y, target or label, is taken for a target, which is "
    "not cast"
)


@contextmanager
def name_layers_in_errors(
    model: nn.Module,
    keep_in_fp32: Sequence[Selector],
    cast_targets: bool,
    kept_buffers: Sequence[NamedBuffer] = (),
) -> Iterator[None]:
    """Add to an error that speaks of half precision which layer of a model it came from, and what to do.

    Args:
        model: whose layers have names.
        keep_in_fp32: which layers are kept in float32.
        cast_targets: whether targets are cast, too.
        kept_buffers: stay in float32 in layers that do not.

    Raises:
        RuntimeError: in place of an error of torch's; of the class that it had, with what to do.
    """
    try:
        yield
    except _KINDS as error:
        if type(error) not in _KINDS or not _HALF.search(str(error)):
            raise
        # The first frame is this one.
        found = _innermost_layer(error.__traceback__ and error.__traceback__.tb_next, model)
        if found is None:
            raise
        if _FLOAT32.search(str(error)):
            text = f"{found.described} computes in half precision, but got float32: {error}\n"
            cure = _Cause(found, model, keep_in_fp32, cast_targets, kept_buffers).cure()
        else:
            text, cure = f"{found.described} cannot compute in half precision: {error}\n", ""
            if found.name:
                keep = format_selectors((*keep_in_fp32, found.name))
                cure = f"Keep it in float32 by `LowPrecision(keep_in_fp32={keep})`"
            else:
                cure = "Put what failed into a layer of its own and name that in `LowPrecision(keep_in_fp32)`"
            cure += ", or cast what it computes with by `.float()`."
        raise type(error)(text + cure) from error


class _ErrorSite(NamedTuple):
    """Where an error came from: a layer, its name, the frame in it, and the frames of the model around it."""

    name: str
    layer: nn.Module
    frame: FrameType
    outer: list[FrameType]

    @property
    def described(self) -> str:
        text = _described(self.name, self.layer)
        return text[0].upper() + text[1:]


def _described(name: str, layer: nn.Module) -> str:
    return f"layer {name!r} ({type(layer).__name__})" if name else type(layer).__name__


def _innermost_layer(traceback: TracebackType | None, model: nn.Module) -> _ErrorSite | None:
    names = {id(layer): name for name, layer in model.named_modules()}
    found: _ErrorSite | None = None
    outer: list[FrameType] = []
    while traceback is not None:
        frame = traceback.tb_frame
        code = frame.f_code
        # By whatever name the first argument goes.
        candidate = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(candidate, nn.Module) and id(candidate) in names:
            found = _ErrorSite(names[id(candidate)], candidate, frame, outer)
            if candidate is model:
                outer.append(frame)
        traceback = traceback.tb_next
    return found


class _Cause:
    """Why a layer got float32.

    Args:
        site: where the error came from.
        model: whose layer it is.
        keep_in_fp32: which layers are kept in float32.
        cast_targets: whether targets are cast, too.
        kept_buffers: stay in float32 in layers that do not.
    """

    def __init__(
        self,
        site: _ErrorSite,
        model: nn.Module,
        keep_in_fp32: Sequence[Selector],
        cast_targets: bool,
        kept_buffers: Sequence[NamedBuffer],
    ) -> None:
        self._model = model
        self._kept_buffers = [found.full_name for found in kept_buffers]
        self._keep_in_fp32 = keep_in_fp32
        own = {id(p) for p in (*model.parameters(), *model.buffers())}
        self._got = [t for t in _float32_in(site.frame.f_locals) if id(t) not in own]
        # What the steps of the model were called with: the batch, of which all is cast but for targets.
        arguments = [frame.f_locals.get(name) for frame in site.outer for name in _arguments_of(frame)]
        self._targets = [] if cast_targets else list(_float32_in(arguments))

    def cure(self) -> str:
        """What to do about it, in sentences."""
        storages = {storage_key(t.untyped_storage()) for t in self._targets}
        if any(storage_key(t.untyped_storage()) in storages for t in self._got):
            return _of_the_batch("It got")
        for tensor in self._got:
            layer = self._kept_layer_before(tensor)
            if layer is not None and was_half(tensor):
                return self._leave_out(*layer)
            if layer is not None and self._targets:
                return _of_the_batch(f"It got what {_described(*layer)} made of")
        cure = "Cast what it got by `.to(self.dtype)`, where it is made."
        if self._targets:
            cure += (
                f" If it is made of a part of the batch: {_TARGETS}; cast these, too, by "
                "`LowPrecision(cast_targets=True)`."
            )
        if self._kept_buffers:
            cure += (
                " If it is made with a buffer that stays in float32, since it counts, averages or holds "
                f"whole numbers ({', '.join(map(repr, self._kept_buffers[:4]))}), keep the layer of that as "
                "a whole in float32 by `LowPrecision(keep_in_fp32)`, or cast the buffer where it is used."
            )
        return cure

    def _leave_out(self, name: str, layer: nn.Module) -> str:
        around = {
            inner: module
            for inner, module in self._model.named_modules()
            if f"{name}.".startswith(f"{inner}.")
        }
        rest = [
            selector
            for selector in self._keep_in_fp32
            if selector != NORM and not any(is_kept(selector, *pair) for pair in around.items())
        ]
        return (
            f"It got what {_described(name, layer)} made, which "
            f"`LowPrecision(keep_in_fp32={format_selectors(self._keep_in_fp32)})` keeps in float32, and "
            "which was given float32: some models cast what they give a layer to the dtype of its weights. "
            f"Let these be in half precision, too, by `LowPrecision(keep_in_fp32={format_selectors(rest)})`."
        )

    def _kept_layer_before(self, tensor: Tensor) -> tuple[str, nn.Module] | None:
        """The nearest layer with float32 weights that a tensor was computed by, and not cast since."""
        owners = {
            id(parameter): (name, layer)
            for name, layer in self._model.named_modules()
            for parameter in layer._parameters.values()
        }
        for parameter in parameters_before(tensor):
            if parameter.dtype == torch.float32 and id(parameter) in owners:
                return owners[id(parameter)]
        return None


def _of_the_batch(how: str) -> str:
    return (
        f"{how} a part of the batch that was left in float32: {_TARGETS}. If this is an input, cast it, too, "
        "by `LowPrecision(cast_targets=True)`."
    )


def _float32_in(values: Any) -> Iterator[Tensor]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.dtype == torch.float32 and value.layout is torch.strided:
            yield value


def _arguments_of(frame: FrameType) -> tuple[str, ...]:
    code = frame.f_code
    return code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
