"""Every expand of the layers that read one input, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch

from deltamux_kernels._triton import overlap, tl, triton
from deltamux_kernels.expand import BLOCK_J, BLOCK_N, Columns, expand, expand_tile
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.shrink import Shrunk
from deltamux_kernels.tiles import load_tile


class Slice(NamedTuple):
    """One layer of a site: its output, and where each slot's columns of h and matrix B are."""

    y: torch.Tensor  # [T, N]
    b: PackedMatrices
    columns: Columns


def expand_slices(slices: Sequence[Slice], h: Shrunk, segments: Segments) -> None:
    """y_i[t, n] += sum_j h[t, c_is + j] B_is[j, n], in place, rounded once.

    One to three slices. To the bit what an `expand` for each does.
    """
    if isinstance(h, torch.Tensor):
        expand_slices_triton(slices, h, segments)
        return
    for y, b, columns in slices:
        expand(y, h, b, columns, segments)


def expand_slices_triton(slices: Sequence[Slice], h: torch.Tensor, segments: Segments) -> None:
    """`expand_slices` in one launch: a program per (tile of rows, block of one slice's N)."""
    if not any(segments.most_rows(part.b) for part in slices):
        return
    firsts = [0]
    for part in slices:
        firsts.append(firsts[-1] - (-part.b.width // BLOCK_N))
    _expand_slices_kernel[(segments.tiles.shape[0], firsts[-1])](
        h,
        tuple(_arguments(part) for part in slices),
        tuple(firsts),
        slices[0].b.arena,
        segments.tiles,
        h.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=1,
        **overlap(h),
    )


def _arguments(part: Slice) -> tuple[object, ...]:
    y, b, columns = part
    return y, b.offsets, b.rows, columns.table, b.width, y.stride(0), y.stride(1)


@triton.jit
@no_type_check
def _expand_slices_kernel(
    h,
    slices,
    firsts,
    arena,
    tiles,
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
    for part in tl.static_range(len(slices)):
        if (block >= firsts[part]) & (block < firsts[part + 1]):
            y, offsets, ranks, columns, width, y_row, y_column = slices[part]
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
                block - firsts[part],
                width,
                y_row,
                y_column,
                h_row,
                BLOCK_T,
                BLOCK_J,
                BLOCK_N,
                OVERLAP,
            )
