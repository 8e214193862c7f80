"""A vector that is added to each row, each row with that of its own slot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch

from deltamux_kernels import native
from deltamux_kernels._triton import tl, triton
from deltamux_kernels.native.by_slot import BY_SLOT, by_slot
from deltamux_kernels.native.library import INTEGER, POINTER, function
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 128


def row_bias(y: torch.Tensor, b: PackedMatrices, segments: Segments) -> None:
    """y[t, n] += b_s[n], in place, s = slot of row t; in float32, rounded once.

    y [T, N], or [T, heads, N] where every head gets the same; b_s [1, N]. Rows whose slot has no b
    keep their bits.
    """
    if y.device.type == "cuda":
        row_bias_triton(y, b, segments)
    elif y.dtype == torch.float32 and native.available():
        row_bias_native(y, b, segments)
    else:
        row_bias_torch(y, b, segments)


def row_bias_native(y: torch.Tensor, b: PackedMatrices, segments: Segments) -> None:
    """`row_bias` in C, in float32."""
    # The C code adds to columns that lie side by side.
    result = y if y.stride(-1) == 1 else y.contiguous()
    by_head = result if y.dim() == 3 else result[:, None]
    _native()(
        by_head.data_ptr(),
        by_head.stride(0),
        by_head.stride(1),
        by_head.shape[1],
        *by_slot(b, segments),
    )
    if result is not y:
        y.copy_(result)


@cache
def _native() -> Callable[..., None]:
    return function(
        "row_bias",
        *(POINTER, INTEGER, INTEGER, INTEGER),  # y, the distances of its rows and heads, heads
        *BY_SLOT,
    )


def row_bias_torch(y: torch.Tensor, b: PackedMatrices, segments: Segments) -> None:
    """`row_bias` in plain torch."""
    for _, span, bias in segments.owners(b):
        y[span].add_(bias)


def row_bias_triton(y: torch.Tensor, b: PackedMatrices, segments: Segments) -> None:
    """`row_bias` in one launch: a program per (tile of rows, block of N, head)."""
    if not segments.most_rows(b):
        return
    by_head = y if y.dim() == 3 else y[:, None]
    _row_bias_kernel[(segments.tiles.shape[0], -(-b.width // BLOCK_N), by_head.shape[1])](
        by_head,
        b.arena,
        b.offsets,
        b.rows,
        segments.tiles,
        b.width,
        by_head.stride(0),
        by_head.stride(1),
        by_head.stride(2),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _row_bias_kernel(
    y,
    arena,
    offsets,
    rows,
    tiles,
    width,
    y_row,
    y_head,
    y_column,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, start, count = load_tile(tiles, tile)
    if tl.load(rows + slot) == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < width
    live = (i < count)[:, None] & live_n[None, :]
    bias = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    b = tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    row = y + head.to(tl.int64) * y_head + (start + i).to(tl.int64)[:, None] * y_row
    target = row + n[None, :] * y_column
    value = tl.load(target, mask=live, other=0.0).to(tl.float32) + b
    tl.store(target, value.to(y.dtype.element_ty), mask=live)
