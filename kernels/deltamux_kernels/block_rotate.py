"""x times a block-diagonal R, each row with the R of its own slot."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 128


def block_rotate(y: torch.Tensor, x: torch.Tensor, r: PackedMatrices, segments: Segments) -> None:
    """y[t, n] = sum_k x[t, b floor(n / b) + k] R_s[k, n], k < b, s = slot of row t.

    x and y [T, N], not the same memory. R_s [b, N] holds N / b blocks [b, b] side by side; each
    slot has a b of its own. Rows whose slot has no R keep their bits.
    """
    if y.device.type == "cuda":
        block_rotate_triton(y, x, r, segments)
    else:
        block_rotate_torch(y, x, r, segments)


def block_rotate_torch(
    y: torch.Tensor, x: torch.Tensor, r: PackedMatrices, segments: Segments
) -> None:
    """`block_rotate` in plain torch; half types are computed in float32 and rounded once."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for _, rows, blocks in segments.owners(r):
        given = x[rows]
        if wide:
            given, blocks = given.float(), blocks.float()
        y[rows] = _rotated(given, blocks)


def _rotated(x: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    size, width = blocks.shape
    by_block = x.reshape(-1, width // size, size).transpose(0, 1)
    products = torch.bmm(by_block, blocks.view(size, -1, size).transpose(0, 1))
    return products.transpose(0, 1).reshape(-1, width)


def block_rotate_triton(
    y: torch.Tensor, x: torch.Tensor, r: PackedMatrices, segments: Segments
) -> None:
    """`block_rotate` in one launch: a program per (tile of rows, block of N)."""
    if not segments.most_rows(r):
        return
    _block_rotate_kernel[(segments.tiles.shape[0], -(-r.width // BLOCK_N))](
        y,
        x,
        r.arena,
        r.offsets,
        r.rows,
        segments.tiles,
        r.width,
        y.stride(0),
        y.stride(1),
        x.stride(0),
        x.stride(1),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _block_rotate_kernel(
    y,
    x,
    arena,
    offsets,
    rows,
    tiles,
    width,
    y_row,
    y_column,
    x_row,
    x_column,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    size = tl.load(rows + slot)
    if size == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < width
    live = (i < count)[:, None] & live_n[None, :]
    t = (start + i).to(tl.int64)
    factors = arena + tl.multiple_of(tl.load(offsets + slot), 64) + n
    inputs = x + t[:, None] * x_row + (n // size * size)[None, :] * x_column
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    # Blocks may be too small for a matrix instruction; the inputs of a tile stay in L1.
    for _ in range(0, size):
        factor = tl.load(factors, mask=live_n, other=0.0).to(tl.float32)
        total += tl.load(inputs, mask=live, other=0.0).to(tl.float32) * factor[None, :]
        factors += width
        inputs += x_column
    target = y + t[:, None] * y_row + n[None, :] * y_column
    tl.store(target, total.to(y.dtype.element_ty), mask=live)
