"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch

from deltamux_kernels import native
from deltamux_kernels._triton import tl, triton
from deltamux_kernels.native.library import INTEGER, POINTER, function

# Pairs of features that one program rotates.
_PROGRAM = 512


def rotary(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """r[h, t, d] = x[h, t, d] cos[t, d] + x'[h, t, d] sin[t, d], for x = query and x = key.

    x' is x with the halves of D exchanged and the new first one negated. query [1, Hq, T, D] and
    key [1, Hkv, T, D] of any strides; cos and sin [1, T, D]; all of one dtype, D even. Products and
    sum are rounded one by one, as torch does: to the bit it is transformers' apply_rotary_pos_emb.
    Where Triton or C computes it, all heads of a token lie side by side in the results.
    """
    if query.device.type == "cuda":
        return rotary_triton(query, key, cos, sin)
    if query.dtype == torch.float32 and native.available():
        return rotary_native(query, key, cos, sin)
    return rotary_torch(query, key, cos, sin)


def rotary_native(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary` in C, in float32."""
    query, key, cos, sin = (_in_rows(x) for x in (query, key, cos, sin))
    angles = cos.data_ptr(), cos.stride(1), sin.data_ptr(), sin.stride(1)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        _, heads, tokens, dim = x.shape
        y = x.new_empty(1, tokens, heads, dim)
        place = x.data_ptr(), x.stride(2), x.stride(1)
        _native()(*place, *angles, y.data_ptr(), tokens, heads, dim // 2)
        return y.transpose(1, 2)

    return rotated(query), rotated(key)


@cache
def _native() -> Callable[..., None]:
    place, angles = (POINTER, INTEGER, INTEGER), (POINTER, INTEGER) * 2
    return function("rotary", *place, *angles, POINTER, *[INTEGER] * 3)


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotary_torch(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary` in plain torch."""

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    return rotated(query), rotated(key)


def rotary_triton(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary` in one launch: a program per (token, block of query heads or of key heads)."""
    query, key, cos, sin = (_in_rows(x) for x in (query, key, cos, sin))
    (_, query_heads, tokens, dim), key_heads = query.shape, key.shape[1]
    rotated_query = query.new_empty(1, tokens, query_heads, dim)
    rotated_key = key.new_empty(1, tokens, key_heads, dim)
    block_d = triton.next_power_of_2(dim // 2)
    block_h = max(1, _PROGRAM // block_d)
    query_blocks, key_blocks = -(-query_heads // block_h), -(-key_heads // block_h)
    _rotary_kernel[(tokens, query_blocks + key_blocks)](
        query,
        key,
        cos,
        sin,
        rotated_query,
        rotated_key,
        query.stride(2),
        query.stride(1),
        key.stride(2),
        key.stride(1),
        cos.stride(1),
        sin.stride(1),
        QUERY_HEADS=query_heads,
        KEY_HEADS=key_heads,
        QUERY_BLOCKS=query_blocks,
        HALF=dim // 2,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return rotated_query.transpose(1, 2), rotated_key.transpose(1, 2)


@triton.jit
@no_type_check
def _rotary_kernel(
    query,
    key,
    cos,
    sin,
    rotated_query,
    rotated_key,
    query_token,
    query_head,
    key_token,
    key_head,
    cos_token,
    sin_token,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    QUERY_BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cos, sin = cos + t * cos_token, sin + t * sin_token
    if block < QUERY_BLOCKS:
        target = rotated_query + t * (QUERY_HEADS * HALF * 2)
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        source = query + t * query_token
        _rotate_heads(source, query_head, cos, sin, target, h, QUERY_HEADS, HALF, BLOCK_D)
    else:
        target = rotated_key + t * (KEY_HEADS * HALF * 2)
        h = (block - QUERY_BLOCKS) * BLOCK_H + tl.arange(0, BLOCK_H)
        source = key + t * key_token
        _rotate_heads(source, key_head, cos, sin, target, h, KEY_HEADS, HALF, BLOCK_D)


@triton.jit
@no_type_check
def _rotate_heads(
    source,
    head,
    cos,
    sin,
    target,
    h,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One token's `source` [HEADS, 2 HALF] for the heads h."""
    d = tl.arange(0, BLOCK_D)
    live_d = d < HALF
    live = (h < HEADS)[:, None] & live_d[None, :]
    at = source + h[:, None] * head + d[None, :]
    first = tl.load(at, mask=live, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    rotated = target + h[:, None] * (HALF * 2) + d[None, :]
    _store_sum(rotated, first, cos + d, -second, sin + d, live, live_d)
    _store_sum(rotated + HALF, second, cos + HALF + d, first, sin + HALF + d, live, live_d)


@triton.jit
@no_type_check
def _store_sum(target, x, cos, exchanged, sin, live, live_d):
    """x cos + exchanged sin, rounded as three operations."""
    dtype: tl.constexpr = target.dtype.element_ty
    c = tl.load(cos, mask=live_d, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin, mask=live_d, other=0.0).to(tl.float32)[None, :]
    summands = (x * c).to(dtype).to(tl.float32), (exchanged * s).to(dtype).to(tl.float32)
    tl.store(target, (summands[0] + summands[1]).to(dtype), mask=live)
