"""Launches paged attention in Triton."""

from __future__ import annotations

import torch

from deltamux_kernels._triton import capability, triton
from deltamux_kernels.attention_batch import AttentionBatch
from deltamux_kernels.paged_attention_kernel import paged_attention_kernel
from deltamux_kernels.scoring import Scoring

# Rows of a query tile, a row being one query of one head: all heads of a KV head share its tile,
# so that its keys and values are read once.
PREFILL_ROWS = 64
DECODE_ROWS = 16
# Few decoding sequences do not fill a GPU: up to SPLITS programs share the keys of each, as long as
# that makes no more than so many programs.
SPLITS, PROGRAMS = 8, 256


def paged_attention_triton(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: AttentionBatch,
    scoring: Scoring,
) -> torch.Tensor:
    """`paged_attention` in one launch: a program per (tile of queries, KV head, part of keys)."""
    tokens, heads, key_dim = query.shape
    blocks, block_size, kv_heads, value_dim = value_cache.shape
    query = query if query.stride(2) == 1 else query.contiguous()
    out = query.new_empty(tokens, heads, value_dim)
    group = triton.next_power_of_2(heads // kv_heads)
    rows, keys, warps = _tiling(max(key_dim, value_dim), query, batch.decodes)
    tile = max(1, rows // group)
    tiles = batch.query_tiles(tile)
    splits, partial, counters = _splits(query, batch, tiles.shape[0] * kv_heads, group, value_dim)
    paged_attention_kernel[(tiles.shape[0], kv_heads, splits)](
        query,
        key_cache,
        value_cache,
        out,
        partial,
        counters,
        scoring.sinks,
        tiles,
        batch.query_starts,
        batch.seq_lens,
        batch.block_tables,
        scoring.scale,
        scoring.softcap,
        scoring.window,
        blocks,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        batch.block_tables.stride(0),
        SPLITS=splits,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        GROUP_ROWS=group,
        TILE=tile,
        ROWS=max(DECODE_ROWS, tile * group),
        KEYS=keys,
        BLOCK_SIZE=block_size,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_BLOCK=_block(key_dim),
        VALUE_BLOCK=_block(value_dim),
        num_warps=warps,
        enable_fp_fusion=True,
        num_stages=2,
    )
    return out


def _tiling(dim: int, query: torch.Tensor, decodes: bool) -> tuple[int, int, int]:
    """Rows of a query tile, keys of one product, warps: what fits shared memory and registers."""
    size = dim * query.element_size()
    # sm_90 and sm_100 multiply larger tiles at once and have the shared memory for them. sm_120 has
    # the instructions and the memory of sm_89.
    large = capability(query.device)[0] in (9, 10)
    if size > 256:
        rows = PREFILL_ROWS // 2 if size <= 1024 else PREFILL_ROWS // 4
        keys = 32 if size <= 512 else 16
        return (DECODE_ROWS, keys, 4) if decodes else (rows, keys, 8)
    if decodes:
        return DECODE_ROWS, 128 if large and size > 128 else 64, 4
    # Elsewhere four warps spill registers at 128 dimensions, and in float32 everywhere.
    few = size <= 128 or (large and query.element_size() == 2)
    return PREFILL_ROWS, 64, 4 if few else 8


def _block(dim: int) -> int:
    return max(16, triton.next_power_of_2(dim))


def _splits(
    query: torch.Tensor, batch: AttentionBatch, pairs: int, group: int, value_dim: int
) -> tuple[int, torch.Tensor | None, torch.Tensor | None]:
    """Programs for each pair of a tile and a KV head, and what several of them need: of each row
    and part of its keys the sum, its weight and the largest score; and counters."""
    if not batch.decodes or pairs > PROGRAMS // 2:
        return 1, None, None
    splits = 1 << min(SPLITS, PROGRAMS // pairs).bit_length() - 1
    size = (pairs * splits * group, _block(value_dim) + 2)
    return splits, query.new_empty(size, dtype=torch.float32), batch.counters(pairs)
