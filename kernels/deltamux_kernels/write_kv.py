"""New keys and values into their slots of the paged cache."""

from __future__ import annotations

import torch


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
    write_kv_torch(key, value, key_cache, value_cache, slot_mapping)


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
