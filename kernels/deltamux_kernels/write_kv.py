"""New keys and values into their slots of the paged cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, no_type_check

import torch

from deltamux_kernels import native
from deltamux_kernels._triton import tl, triton
from deltamux_kernels.native.library import INTEGER, POINTER, function


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """key_cache[slot_mapping[t]] = key[t] and value_cache[slot_mapping[t]] = value[t].

    key [T, Hkv, Dk]; value [T, Hkv, Dv]; caches [num_blocks, block_size, Hkv, D] of the same
    dtype, contiguous; slot_mapping int64 [T], block * block_size + offset. A negative slot marks a
    row that is not stored. A slot beyond the cache is an error: IndexError on a CPU, not stored by
    the Triton form.
    """
    if key.device.type == "cuda":
        write_kv_triton(key, value, key_cache, value_cache, slot_mapping)
    elif key.dtype == torch.float32 and native.available():
        write_kv_native(key, value, key_cache, value_cache, slot_mapping)
    else:
        write_kv_torch(key, value, key_cache, value_cache, slot_mapping)


def write_kv_native(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """`write_kv` in C, in float32."""
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    count, heads, _ = key.shape
    slots = key_cache.shape[0] * key_cache.shape[1]
    written = _native()(
        key.data_ptr(),
        *key.stride()[:2],
        key.shape[2],
        key_cache.data_ptr(),
        value.data_ptr(),
        *value.stride()[:2],
        value.shape[2],
        value_cache.data_ptr(),
        slot_mapping.data_ptr(),
        count,
        heads,
        slots,
    )
    if not written:
        raise IndexError(f"a slot is none of the cache's {slots}")


@cache
def _native() -> Callable[..., Any]:
    rows = (POINTER, INTEGER, INTEGER, INTEGER, POINTER)
    return function("write_kv", *rows, *rows, POINTER, *[INTEGER] * 3, result=INTEGER)


def write_kv_torch(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """`write_kv` in plain torch."""
    stored = slot_mapping >= 0
    if not stored.all():
        key, value, slot_mapping = key[stored], value[stored], slot_mapping[stored]
    key_cache.view(-1, *key_cache.shape[2:]).index_copy_(0, slot_mapping, key)
    value_cache.view(-1, *value_cache.shape[2:]).index_copy_(0, slot_mapping, value)


def write_kv_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """`write_kv` in one launch: a program per row, which copies its key and its value."""
    heads, key_dim = key.shape[1:]
    value_dim = value.shape[2]
    key = key if key.stride(2) == 1 else key.contiguous()
    value = value if value.stride(2) == 1 else value.contiguous()
    _write_kv_kernel[(slot_mapping.shape[0],)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key_cache.shape[0] * key_cache.shape[1],
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        HEADS=heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK=triton.next_power_of_2(heads * max(key_dim, value_dim)),
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _write_kv_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    slots,
    key_row,
    key_head,
    value_row,
    value_head,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + t)
    if (slot < 0) | (slot >= slots):
        return
    e = tl.arange(0, BLOCK)
    live = e < HEADS * KEY_DIM
    k = tl.load(key + t * key_row + e // KEY_DIM * key_head + e % KEY_DIM, mask=live)
    tl.store(key_cache + slot * HEADS * KEY_DIM + e, k, mask=live)
    live = e < HEADS * VALUE_DIM
    v = tl.load(value + t * value_row + e // VALUE_DIM * value_head + e % VALUE_DIM, mask=live)
    tl.store(value_cache + slot * HEADS * VALUE_DIM + e, v, mask=live)
