"""Autocast on the twin: torch's own lists of operators for CUDA (``aten/src/ATen/autocast_mode.h``)."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast_mode

from lightning_memtrain.compat.torch_private import (
    DispatchKey,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
    is_view,
    schema_of,
    tree_map,
)
from lightning_memtrain.tracing.cuda_twin.backend import DEVICE_TYPE


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Run in the lower precision.
_LOWER = _words(
    """
    _convolution convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input
    conv_transpose3d.input prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm
    baddbmm bmm chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell
    gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention
    """
)
# Run in float32.
_FLOAT32 = _words(
    """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm frobenius_norm.dim
    nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss
    nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss
    margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
    binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d
    upsample_nearest2d upsample_nearest3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
    upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa
    """
)
# Return float32, which the operator is told of: its argument is not cast.
_RETURN_FLOAT32 = _words(
    """
    prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm
    linalg_matrix_norm.str_ord sum sum.dim_IntList
    """
)
_NORMS = ("norm.Scalar", "norm.ScalarOpt_dim", "norm.names_ScalarOpt_dim")
# Run in the widest of their arguments' types.
_WIDEST = _words(
    """
    addcdiv addcmul atan2 bilinear cross dot vdot grid_sample index_put tensordot scatter_add
    """
)

_KEY = "AutocastPrivateUse1"


class CastWeights:
    """Weights in the lower precision, which autocast keeps until it is left."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor in another type; that of a weight is kept.

        Args:
            tensor: of any shape, of a floating type.
            dtype: what to cast to.

        Returns:
            The tensor of that type.
        """
        is_weight = tensor.is_leaf and tensor.requires_grad and tensor.dtype is torch.float32
        if not (is_weight and torch.is_autocast_cache_enabled()) or is_view(tensor):
            return tensor.to(dtype)
        weight, kept = self._kept.get(id(tensor), (None, None))
        if weight is None or weight() is not tensor or kept is None or kept.dtype is not dtype:
            kept = tensor.to(dtype)
            self._kept[id(tensor)] = weakref.ref(tensor), kept
        return kept

    def clear(self) -> None:
        """Keep none."""
        self._kept.clear()


class TwinAutocast:
    """Rules for all operators that autocast has some for; in force as long as the object lives.

    From then on ``torch.autocast("cuda")`` is the twin's, for the rest of the process.
    """

    def __init__(self) -> None:
        library: Any = torch.library.Library
        self._weights = CastWeights()
        self._library = library("aten", "IMPL", _KEY)
        self._others = library("_", "IMPL", _KEY)
        self._others.fallback(torch.library.fallthrough_kernel)
        for operator in _operators(_LOWER):
            self._rule(operator, self._lowered)
        for operator in _operators(_FLOAT32):
            self._rule(operator, _in_float32)
        for operator in _operators(_RETURN_FLOAT32):
            self._rule(operator, _returning_float32)
        for operator in _operators(_NORMS):
            self._rule(operator, _in_float32)
        for operator in _operators(_WIDEST):
            self._rule(operator, _in_widest)
        self._watch_cache()
        _cuda_means_twin()

    def _rule(self, operator: Any, change: Callable[[Any, Any, Any], tuple[Any, Any]]) -> None:
        keys = DispatchKeySet(getattr(DispatchKey, _KEY))

        def rule(*args: Any, **kwargs: Any) -> Any:
            with ExcludeDispatchKeyGuard(keys):
                args, kwargs = change(operator, args, kwargs)
                return operator(*args, **kwargs)

        self._library.impl(operator, rule)

    def _lowered(self, operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        dtype = torch.get_autocast_dtype(DEVICE_TYPE)

        def cast(value: Any) -> Any:
            return self._weights.cast(value, dtype) if _can_be_cast(value, dtype) else value

        return tree_map(cast, args), tree_map(cast, kwargs)

    def _watch_cache(self) -> None:
        # `torch.autocast` calls it when the outermost one is left.
        clear = torch.clear_autocast_cache

        def clear_both() -> None:
            self._weights.clear()
            clear()

        torch.clear_autocast_cache = clear_both


def _cuda_means_twin() -> None:
    kind: Any = autocast_mode.autocast
    make = kind.__init__

    @functools.wraps(make)
    def made(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        make(self, DEVICE_TYPE if device_type == "cuda" else device_type, *args, **kwargs)

    kind.__init__ = made


def _can_be_cast(value: Any, dtype: torch.dtype) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == DEVICE_TYPE
        and value.is_floating_point()
        and value.dtype not in (dtype, torch.float64)
    )


def _to(dtype: torch.dtype, args: Any, kwargs: Any) -> tuple[Any, Any]:
    def cast(value: Any) -> Any:
        return value.to(dtype) if _can_be_cast(value, dtype) else value

    return tree_map(cast, args), tree_map(cast, kwargs)


def _in_float32(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _to(torch.float32, args, kwargs)


def _returning_float32(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    first = args[0]
    is_low = isinstance(first, Tensor) and first.dtype in (torch.float16, torch.bfloat16)
    place = next(i for i, a in enumerate(schema_of(operator).arguments) if a.name == "dtype")
    given = args[place] if place < len(args) else kwargs.get("dtype")
    if not is_low or given is not None or first.device.type != DEVICE_TYPE:
        return args, kwargs
    if place < len(args):
        return (*args[:place], torch.float32, *args[place + 1 :]), kwargs
    return args, {**kwargs, "dtype": torch.float32}


def _in_widest(operator: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    dtypes = {value.dtype for value in _tensors((args, kwargs)) if value.is_floating_point()}
    return _to(torch.float32, args, kwargs) if torch.float32 in dtypes else (args, kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def _operators(names: Iterable[str]) -> Iterator[Any]:
    for name in names:
        packet, _, overload = name.partition(".")
        found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if found is not None:  # another version of torch may not have it
            yield found
