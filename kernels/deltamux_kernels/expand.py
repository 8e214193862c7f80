"""y plus h times B, each row with the matrix of its own slot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import no_type_check

import torch

from deltamux_kernels._triton import overlap, tl, triton
from deltamux_kernels.native.by_slot import BY_SLOT, by_slot
from deltamux_kernels.native.library import INTEGER, POINTER, function
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.products import NativeProducts
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.shrink import Shrunk
from deltamux_kernels.tiles import load_tile

# The least depth of a matrix instruction on half types: a rank is rounded up to it in registers
# only, never in memory.
BLOCK_J = 16
BLOCK_N = 128


class Columns:
    """The first column of one slice in h, per slot.

    Layers that read the same input share one shrink, whose A stacks theirs (q, k and v:
    [r_q + r_k + r_v, K]); each of them expands from its own columns.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.first = [0] * slots
        # Tiles of nobody name the slot after the last.
        self.table = torch.zeros(slots + 1, dtype=torch.int32, device=device)

    def set(self, slot: int, column: int) -> None:
        self.first[slot] = column
        self.table[slot].fill_(column)


def expand(
    y: torch.Tensor, h: Shrunk, b: PackedMatrices, columns: Columns, segments: Segments
) -> None:
    """y[t, n] += sum_j h[t, c_s + j] B_s[j, n], j < rows of B_s, in place, rounded once.

    y [T, N]; B_s [rank, N] with the adapter's scale folded in; c_s = `columns` of slot s = slot of
    row t. Rows in no span keep their bits.
    """
    if isinstance(h, torch.Tensor):
        expand_triton(y, h, b, columns, segments)
    elif isinstance(h, NativeProducts):
        expand_native(y, h, b, columns, segments)
    else:
        expand_torch(y, h, b, columns, segments)


def expand_native(
    y: torch.Tensor, h: NativeProducts, b: PackedMatrices, columns: Columns, segments: Segments
) -> None:
    """`expand` in C, in float32."""
    # The C code adds to columns that lie side by side.
    result = y if y.stride(1) == 1 else y.contiguous()
    _native()(
        result.data_ptr(),
        result.stride(0),
        h.values.data_ptr(),
        h.values.stride(0),
        columns.table.data_ptr(),
        *by_slot(b, segments),
    )
    if result is not y:
        y.copy_(result)


@cache
def _native() -> Callable[..., None]:
    return function(
        "expand",
        *(POINTER, INTEGER) * 2,  # y and h, with the distance of their rows
        POINTER,  # columns
        *BY_SLOT,
    )


def expand_torch(
    y: torch.Tensor,
    h: list[torch.Tensor | None],
    b: PackedMatrices,
    columns: Columns,
    segments: Segments,
) -> None:
    """`expand` in plain torch; half types are multiplied and added in float32."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for (slot, _, _), rows, products in zip(segments.spans, segments.pieces(y), h, strict=True):
        matrix = b.views[slot]
        if matrix is None or products is None:
            continue
        column, rank = columns.first[slot], b.rows_of(slot)
        if rank != products.shape[1]:
            products = products[:, column : column + rank]
        if wide:
            rows.copy_(rows.float().addmm_(products, matrix.float()))
        else:
            rows.addmm_(products, matrix)


def expand_triton(
    y: torch.Tensor, h: torch.Tensor, b: PackedMatrices, columns: Columns, segments: Segments
) -> None:
    """`expand` in one launch: a program per (tile of rows, block of N)."""
    if not segments.most_rows(b):
        return
    _expand_kernel[(segments.tiles.shape[0], -(-b.width // BLOCK_N))](
        y,
        h,
        b.arena,
        b.offsets,
        b.rows,
        columns.table,
        segments.tiles,
        b.width,
        y.stride(0),
        y.stride(1),
        h.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=1,
        **overlap(y),
    )


@triton.jit
@no_type_check
def _expand_kernel(
    y,
    h,
    arena,
    offsets,
    ranks,
    columns,
    tiles,
    width,
    y_row,
    y_column,
    h_row,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    slot, start, count = load_tile(tiles, tile)
    rank = tl.load(ranks + slot)
    offset = tl.load(offsets + slot)
    column = tl.load(columns + slot)
    expand_tile(
        y,
        h,
        arena + tl.multiple_of(offset, 64),
        start,
        count,
        rank,
        column,
        block,
        width,
        y_row,
        y_column,
        h_row,
        BLOCK_T,
        BLOCK_J,
        BLOCK_N,
        OVERLAP,
    )


@triton.jit
@no_type_check
def expand_tile(
    y,
    h,
    matrix,
    start,
    count,
    rank,
    column,
    block,
    width,
    y_row,
    y_column,
    h_row,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One block of N of one tile of rows. The first rows of B are under way while h is computed."""
    # A slot without a matrix has no row to add to.
    count = tl.where(rank > 0, count, 0)
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = (i < count)[:, None], (n < width)[None, :]
    t = (start + i).to(tl.int64)[:, None]
    j = tl.arange(0, BLOCK_J)
    rows_h = h + t * h_row + (column + j)[None, :]
    rows_b = matrix + j[:, None].to(tl.int64) * width + n[None, :]
    b = tl.load(rows_b, mask=(j < rank)[:, None] & live_n, other=0.0)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    v = tl.load(rows_h, mask=live_i & (j < rank)[None, :], other=0.0)
    target = y + t * y_row + n[None, :] * y_column
    before = tl.load(target, mask=live_i & live_n, other=0.0)
    delta = tl.dot(v.to(b.dtype), b, input_precision="ieee")
    for j0 in range(BLOCK_J, rank, BLOCK_J):
        live_j = j0 + j < rank
        b = tl.load(
            rows_b + tl.cast(j0, tl.int64) * width, mask=live_j[:, None] & live_n, other=0.0
        )
        v = tl.load(rows_h + j0, mask=live_i & live_j[None, :], other=0.0)
        delta = tl.dot(v.to(b.dtype), b, delta, input_precision="ieee")
    delta += before.to(tl.float32)
    tl.store(target, delta.to(y.dtype.element_ty), mask=live_i & live_n)
