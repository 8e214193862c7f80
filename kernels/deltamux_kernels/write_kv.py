"""New keys and values into their slots of the paged cache."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton


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
    row that is not stored. A slot beyond the cache is an error: IndexError from the torch form,
    not stored by the Triton form.
    """
    form = write_kv_triton if key.device.type == "cuda" else write_kv_torch
    form(key, value, key_cache, value_cache, slot_mapping)


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
