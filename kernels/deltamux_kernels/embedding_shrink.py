"""The columns of A that token ids name, each row with the matrix of its own slot."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.shrink import Shrunk, new_products
from deltamux_kernels.tiles import load_tile

BLOCK_J = 16


def embedding_shrink(ids: torch.Tensor, a: PackedMatrices, segments: Segments) -> Shrunk:
    """h[t, j] = A_s[j, ids[t]], where s is the slot of row t and j < rows of A_s.

    ids int32 or int64 [T]; A_s [rank, vocabulary]. It is `shrink` of one-hot rows, and its result
    goes to `expand`.
    """
    if ids.device.type == "cuda":
        return embedding_shrink_triton(ids, a, segments)
    return embedding_shrink_torch(ids, a, segments)


def embedding_shrink_torch(
    ids: torch.Tensor, a: PackedMatrices, segments: Segments
) -> list[torch.Tensor | None]:
    """`embedding_shrink` in plain torch; half types come out in float32, as from `shrink`."""
    narrow = a.arena.dtype not in (torch.float16, torch.bfloat16)
    columns: list[torch.Tensor | None] = []
    for (slot, _, _), tokens in zip(segments.spans, segments.pieces(ids), strict=True):
        matrix = a.views[slot]
        if matrix is None:
            columns.append(None)
            continue
        picked = matrix.index_select(1, tokens).t()
        columns.append(picked if narrow else picked.float())
    return columns


def embedding_shrink_triton(
    ids: torch.Tensor, a: PackedMatrices, segments: Segments
) -> torch.Tensor:
    """`embedding_shrink` in one launch: a program per (tile of rows, block of ranks)."""
    most = segments.most_rows(a)
    h = new_products(ids, most)
    if not most:
        return h
    _embedding_shrink_kernel[(segments.tiles.shape[0], -(-most // BLOCK_J))](
        ids.contiguous(),
        h,
        a.arena,
        a.offsets,
        a.rows,
        segments.tiles,
        a.width,
        h.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return h


@triton.jit
@no_type_check
def _embedding_shrink_kernel(
    ids,
    h,
    arena,
    offsets,
    rows,
    tiles,
    width,
    h_row,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    rank = tl.load(rows + slot)
    if block * BLOCK_J >= rank:
        return
    i, j = tl.arange(0, BLOCK_T), block * BLOCK_J + tl.arange(0, BLOCK_J)
    t = (start + i).to(tl.int64)
    live = (i < count)[:, None] & (j < rank)[None, :]
    token = tl.load(ids + t, mask=i < count, other=0).to(tl.int64)
    known = (token >= 0) & (token < width)
    column = arena + tl.load(offsets + slot) + token[:, None]
    picked = tl.load(
        column + j[None, :].to(tl.int64) * width, mask=live & known[:, None], other=0.0
    )
    tl.store(h + t[:, None] * h_row + j[None, :], picked.to(tl.float32), mask=live)
