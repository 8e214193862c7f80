"""A scale per output feature around the bias, each row with the scale of its own slot."""

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


def row_affine(
    y: torch.Tensor, bias: torch.Tensor | None, g: PackedMatrices, segments: Segments
) -> None:
    """y[t, n] = (y[t, n] - bias[n]) g_s[n] + bias[n], in place, s = slot of row t.

    y [T, N]; bias [N] or None for zero; g_s [1, N]. Rows whose slot has no g keep their bits.
    """
    if y.device.type == "cuda":
        row_affine_triton(y, bias, g, segments)
    elif y.dtype == torch.float32 and native.available():
        row_affine_native(y, bias, g, segments)
    else:
        row_affine_torch(y, bias, g, segments)


def row_affine_native(
    y: torch.Tensor, bias: torch.Tensor | None, g: PackedMatrices, segments: Segments
) -> None:
    """`row_affine` in C, in float32."""
    # The C code writes to columns that lie side by side.
    result = y if y.stride(1) == 1 else y.contiguous()
    _native()(
        result.data_ptr(),
        result.stride(0),
        None if bias is None else bias.data_ptr(),
        *by_slot(g, segments),
    )
    if result is not y:
        y.copy_(result)


@cache
def _native() -> Callable[..., None]:
    return function(
        "row_affine",
        *(POINTER, INTEGER, POINTER),  # y, the distance of its rows, bias
        *BY_SLOT,
    )


def row_affine_torch(
    y: torch.Tensor, bias: torch.Tensor | None, g: PackedMatrices, segments: Segments
) -> None:
    """`row_affine` in plain torch; half types are computed in float32 and rounded once."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for _, span, scale in segments.owners(g):
        rows = y[span]
        if wide:
            rows.copy_(_scaled(rows.float(), None if bias is None else bias.float(), scale.float()))
        else:
            _scaled(rows, bias, scale)


def _scaled(rows: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor:
    if bias is None:
        return rows.mul_(scale)
    return rows.sub_(bias).mul_(scale).add_(bias)


def row_affine_triton(
    y: torch.Tensor, bias: torch.Tensor | None, g: PackedMatrices, segments: Segments
) -> None:
    """`row_affine` in one launch: a program per (tile of rows, block of N)."""
    if not segments.most_rows(g):
        return
    _row_affine_kernel[(segments.tiles.shape[0], -(-g.width // BLOCK_N))](
        y,
        bias,
        g.arena,
        g.offsets,
        g.rows,
        segments.tiles,
        g.width,
        y.stride(0),
        y.stride(1),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _row_affine_kernel(
    y,
    bias,
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
    if tl.load(rows + slot) == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < width
    live = (i < count)[:, None] & live_n[None, :]
    scale = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    g = tl.load(scale + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    target = y + (start + i).to(tl.int64)[:, None] * y_row + n[None, :] * y_column
    value = tl.load(target, mask=live, other=0.0).to(tl.float32)
    if bias is None:
        value = value * g
    else:
        shift = tl.load(bias + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
        value = (value - shift) * g + shift
    tl.store(target, value.to(y.dtype.element_ty), mask=live)
