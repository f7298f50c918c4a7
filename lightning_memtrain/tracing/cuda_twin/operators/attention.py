"""Attention on the twin: the kernel that CUDA would take, and what that keeps for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_aten = torch.ops.aten
#: Compute capability of the first GPUs that have flash attention.
AMPERE = (8, 0)

_HALF = (torch.float16, torch.bfloat16)


class TwinAttention:
    """``scaled_dot_product_attention`` as CUDA has it; in force as long as the object lives.

    Flash attention for two-byte types without a mask, memory-efficient attention else, and plain products
    where neither can (``sdp_utils.cpp``). The first two keep queries, keys, values, output and one number per
    query for backward; the last one all scores, several times.

    Args:
        has_flash: whether the GPU has flash attention: from :data:`AMPERE` on.
    """

    def __init__(self, *, has_flash: bool = True) -> None:
        self._has_flash = has_flash
        library: Any = torch.library.Library
        self._library = library("aten", "IMPL", "AutogradPrivateUse1")
        self._library.impl(_aten.scaled_dot_product_attention.default, self._attention)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if self._has_flash and _flash_can(query, key, value) and attn_mask is None:
            size = query.shape[-1]
            padding = -size % 8
            q, k, v = (functional.pad(t, (0, padding)) if padding else t for t in (query, key, value))
            scale = size**-0.5 if scale is None else scale
            output = _aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
            return output[..., :size] if padding else output
        if _efficient_can(query, key, value) and not enable_gqa:
            trains = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
            bias = _bias(attn_mask, query, key)
            return _aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, trains, dropout_p, is_causal, scale=scale
            )[0]
        return _aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]


def _flash_can(query: Tensor, key: Tensor, value: Tensor) -> bool:
    cuda: Any = torch.backends.cuda
    size = query.shape[-1]
    return bool(
        cuda.flash_sdp_enabled()
        and query.dim() == key.dim() == value.dim() == 4
        and size == key.shape[-1] == value.shape[-1]
        and size <= 256
        and query.dtype in _HALF
    )


def _efficient_can(query: Tensor, key: Tensor, value: Tensor) -> bool:
    cuda: Any = torch.backends.cuda
    return bool(
        cuda.mem_efficient_sdp_enabled()
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype in (torch.float32, *_HALF)
    )


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as the kernel takes it: added, of the query's type, with rows that begin at multiples of 16."""
    if mask is None:
        return None
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    mask = mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    missing = -mask.shape[-1] % 16
    if missing:
        mask = functional.pad(mask, (0, missing))[..., : key.shape[2]]
    return mask
