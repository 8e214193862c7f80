"""Rows of an embedding table, each batch row from the table of its own slot."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 64


def embedding_rows(
    y: torch.Tensor, ids: torch.Tensor, tables: PackedMatrices, segments: Segments
) -> None:
    """y[t] = E_s[ids[t]], in place, s = slot of row t; the last row of E_s where it ends before.

    y [T, N]; ids int32 or int64 [T], not negative; E_s [n, N]. Rows whose slot has no E keep their
    bits.
    """
    form = embedding_rows_triton if y.is_cuda else embedding_rows_torch
    form(y, ids, tables, segments)


def embedding_rows_torch(
    y: torch.Tensor, ids: torch.Tensor, tables: PackedMatrices, segments: Segments
) -> None:
    """`embedding_rows` in plain torch."""
    for _, rows, table in segments.owners(tables):
        y[rows] = table.index_select(0, ids[rows].clamp(max=len(table) - 1))


def embedding_rows_triton(
    y: torch.Tensor, ids: torch.Tensor, tables: PackedMatrices, segments: Segments
) -> None:
    """`embedding_rows` in one launch: a program per (tile of rows, block of N)."""
    if not segments.most_rows(tables):
        return
    _embedding_rows_kernel[(segments.tiles.shape[0], -(-tables.width // BLOCK_N))](
        y,
        ids.contiguous(),
        tables.arena,
        tables.offsets,
        tables.rows,
        segments.tiles,
        tables.width,
        y.stride(0),
        y.stride(1),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )


@triton.jit
@no_type_check
def _embedding_rows_kernel(
    y,
    ids,
    arena,
    offsets,
    rows,
    tiles,
    width,
    y_row,
    y_column,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    height = tl.load(rows + slot)
    if height == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (start + i).to(tl.int64)
    live = (i < count)[:, None] & (n < width)[None, :]
    row = tl.load(ids + t, mask=i < count, other=0).to(tl.int64)
    row = tl.minimum(tl.maximum(row, 0), height - 1)
    table = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    picked = tl.load(table + row[:, None] * width + n[None, :], mask=live, other=0.0)
    tl.store(y + t[:, None] * y_row + n[None, :] * y_column, picked, mask=live)
