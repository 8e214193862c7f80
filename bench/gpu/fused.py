"""The expand of a site inside what a Llama block computes next: candidates, not served.

In half types each is to the bit an `expand` for every layer of the site, then the kernels that the
server calls. A program has a tile of rows and a block of columns; a row without an adapter is in a
tile of a slot without a matrix, so that the tiles hold every row of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch

from deltamux_kernels import Columns, PackedMatrices
from deltamux_kernels._triton import overlap, tl, triton
from deltamux_kernels.expand import BLOCK_J, BLOCK_N
from deltamux_kernels.segments import TILE_ROWS
from deltamux_kernels.tiles import load_tile


class Delta(NamedTuple):
    """What a site's layers add to their outputs, side by side in y: h of its shrink, and B."""

    h: torch.Tensor  # float32 [T, R]
    bs: Sequence[PackedMatrices]
    columns: Sequence[Columns]
    tiles: torch.Tensor  # int32 [tiles, 3], every row of the step in one

    def tables(self) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        """Offset, rank and first column of h by slot, of each layer."""
        return tuple(
            (b.offsets, b.rows, part.table) for b, part in zip(self.bs, self.columns, strict=True)
        )


def gated_silu_of_sum(y: torch.Tensor, delta: Delta) -> torch.Tensor:
    """a[t, n] = u[t, n] g[t, n] / (1 + exp(-g[t, n])), where g and u are y + h B of gate and up.

    y [T, 2 N], gate's columns first -> [T, N]. Sums and quotient are rounded as if each were
    stored.
    """
    width = delta.bs[0].width
    result = y.new_empty(y.shape[0], width)
    _gated_silu_of_sum_kernel[(delta.tiles.shape[0], -(-width // BLOCK_N))](
        y,
        result,
        delta.h,
        delta.bs[0].arena,
        delta.tables(),
        delta.tiles,
        y.stride(0),
        delta.h.stride(0),
        WIDTH=width,
        BLOCK_N=BLOCK_N,
        **_options(y),
    )
    return result


def residual_of_sum(y: torch.Tensor, residual: torch.Tensor, delta: Delta) -> torch.Tensor:
    """r[t, n] = residual[t, n] + (y[t, n] + h B), the inner sum rounded as if it were stored.

    y and residual [T, N] -> [T, N].
    """
    result = torch.empty_like(residual)
    _residual_of_sum_kernel[(delta.tiles.shape[0], -(-y.shape[1] // BLOCK_N))](
        y,
        residual,
        result,
        delta.h,
        delta.bs[0].arena,
        delta.tables(),
        delta.tiles,
        y.stride(0),
        delta.h.stride(0),
        WIDTH=y.shape[1],
        BLOCK_N=BLOCK_N,
        **_options(y),
    )
    return result


def rotary_of_sum(
    y: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    slot_mapping: torch.Tensor,
    delta: Delta,
) -> torch.Tensor:
    """Queries and keys of y + h B rotated as `rotary` does; keys and values into their pages.

    y [T, (Hq + 2 Hkv) D], the heads of q, k and v side by side; angles: cos and sin [T, D]; caches
    [num_blocks, block_size, Hkv, D], slot_mapping int64 [T] as of `write_kv` -> queries [T, Hq, D].
    """
    dim = angles[0].shape[1]
    heads = [b.width // dim for b in delta.bs]
    query = y.new_empty(y.shape[0], heads[0], dim)
    _rotary_of_sum_kernel[(delta.tiles.shape[0], sum(heads))](
        y,
        query,
        *caches,
        *angles,
        slot_mapping,
        caches[0].shape[0] * caches[0].shape[1],
        delta.h,
        delta.bs[0].arena,
        delta.tables(),
        delta.tiles,
        y.stride(0),
        delta.h.stride(0),
        QUERY_HEADS=heads[0],
        KEY_HEADS=heads[1],
        HALF=dim // 2,
        BLOCK_D=triton.next_power_of_2(dim // 2),
        **_options(y),
    )
    return query


def _options(y: torch.Tensor) -> dict[str, Any]:
    return {
        "BLOCK_T": TILE_ROWS,
        "BLOCK_J": BLOCK_J,
        "num_warps": 4,
        "enable_fp_fusion": True,
        "num_stages": 1,
        **overlap(y),
    }


@triton.jit
@no_type_check
def _first_rows(matrix, rank, n, live_n, width, BLOCK_J: tl.constexpr):
    """The first rows of B, which are there before h is."""
    j = tl.arange(0, BLOCK_J)
    rows = matrix + j[:, None].to(tl.int64) * width + n[None, :]
    return tl.load(rows, mask=(j < rank)[:, None] & live_n[None, :], other=0.0)


@triton.jit
@no_type_check
def _sum(y, live_i, h, matrix, b, rank, n, live_n, width, BLOCK_J: tl.constexpr):
    """y + h B of a tile of rows and a block of columns, rounded to y's dtype; in float32.

    y [rows, columns]; h [rows, 1], at the layer's first column of each row; b: the first
    rows of B.
    """
    before = tl.load(y, mask=live_i[:, None] & live_n[None, :], other=0.0)
    j = tl.arange(0, BLOCK_J)
    v = tl.load(h + j[None, :], mask=live_i[:, None] & (j < rank)[None, :], other=0.0)
    delta = tl.dot(v.to(b.dtype), b, input_precision="ieee")
    rows = matrix + j[:, None].to(tl.int64) * width + n[None, :]
    for j0 in range(BLOCK_J, rank, BLOCK_J):
        live_j = j0 + j < rank
        b = tl.load(
            rows + tl.cast(j0, tl.int64) * width, mask=live_j[:, None] & live_n[None, :], other=0.0
        )
        v = tl.load(h + (j0 + j)[None, :], mask=live_i[:, None] & live_j[None, :], other=0.0)
        delta = tl.dot(v.to(b.dtype), b, delta, input_precision="ieee")
    # Not even the sign of a zero changes where there is nothing to add.
    total = tl.where(rank > 0, delta + before.to(tl.float32), before.to(tl.float32))
    return total.to(before.dtype).to(tl.float32)


@triton.jit
@no_type_check
def _gated_silu_of_sum_kernel(
    y,
    result,
    h,
    arena,
    tables,
    tiles,
    y_row,
    h_row,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    slot, start, count = load_tile(tiles, tl.program_id(0))
    offsets, ranks, columns = tables[0]
    gate_rank, gate_column = tl.load(ranks + slot), tl.load(columns + slot)
    gate = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    offsets, ranks, columns = tables[1]
    up_rank, up_column = tl.load(ranks + slot), tl.load(columns + slot)
    up = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    i, n = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = i < count, n < WIDTH
    live = live_i[:, None] & live_n[None, :]
    t = (start + i).to(tl.int64)[:, None]
    gate_rows = _first_rows(gate, gate_rank, n, live_n, WIDTH, BLOCK_J)
    up_rows = _first_rows(up, up_rank, n, live_n, WIDTH, BLOCK_J)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    source, h = y + t * y_row + n[None, :], h + t * h_row
    g = _sum(source, live_i, h + gate_column, gate, gate_rows, gate_rank, n, live_n, WIDTH, BLOCK_J)
    u = _sum(source + WIDTH, live_i, h + up_column, up, up_rows, up_rank, n, live_n, WIDTH, BLOCK_J)
    silu = (g / (1.0 + tl.exp(-g))).to(y.dtype.element_ty).to(tl.float32)
    tl.store(result + t * WIDTH + n[None, :], (silu * u).to(y.dtype.element_ty), mask=live)


@triton.jit
@no_type_check
def _residual_of_sum_kernel(
    y,
    residual,
    result,
    h,
    arena,
    tables,
    tiles,
    y_row,
    h_row,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    slot, start, count = load_tile(tiles, tl.program_id(0))
    offsets, ranks, columns = tables[0]
    rank, column = tl.load(ranks + slot), tl.load(columns + slot)
    matrix = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    i, n = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = i < count, n < WIDTH
    live = live_i[:, None] & live_n[None, :]
    t = (start + i).to(tl.int64)[:, None]
    rows = _first_rows(matrix, rank, n, live_n, WIDTH, BLOCK_J)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    source, h = y + t * y_row + n[None, :], h + t * h_row + column
    output = _sum(source, live_i, h, matrix, rows, rank, n, live_n, WIDTH, BLOCK_J)
    place = t * WIDTH + n[None, :]
    total = tl.load(residual + place, mask=live, other=0.0).to(tl.float32) + output
    tl.store(result + place, total.to(y.dtype.element_ty), mask=live)


@triton.jit
@no_type_check
def _rotary_of_sum_kernel(
    y,
    query,
    key_cache,
    value_cache,
    cos,
    sin,
    slot_mapping,
    slots,
    h,
    arena,
    tables,
    tiles,
    y_row,
    h_row,
    QUERY_HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    slot, start, count = load_tile(tiles, tl.program_id(0))
    head = tl.program_id(1)
    i, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    live_i, live_d = i < count, d < HALF
    t = (start + i).to(tl.int64)
    live = live_i[:, None] & live_d[None, :]
    cell = tl.load(slot_mapping + t, mask=live_i, other=-1)
    stored = live & ((cell >= 0) & (cell < slots))[:, None]
    source = y + t[:, None] * y_row + head * (2 * HALF) + d[None, :]
    angle = t[:, None] * (2 * HALF) + d[None, :]
    for part in tl.static_range(3):
        first_head = (part > 0) * QUERY_HEADS + (part > 1) * KEY_HEADS
        heads = QUERY_HEADS if part == 0 else KEY_HEADS
        own = head - first_head
        if (own >= 0) & (own < heads):
            offsets, ranks, columns = tables[part]
            rank, column = tl.load(ranks + slot), tl.load(columns + slot)
            matrix = arena + tl.multiple_of(tl.load(offsets + slot), 64)
            width, n = heads * 2 * HALF, own * (2 * HALF) + d
            rows = _first_rows(matrix, rank, n, live_d, width, BLOCK_J)
            more = _first_rows(matrix, rank, n + HALF, live_d, width, BLOCK_J)
            if OVERLAP:
                tl.extra.cuda.gdc_wait()
            at = h + t[:, None] * h_row + column
            x = _sum(source, live_i, at, matrix, rows, rank, n, live_d, width, BLOCK_J)
            z = _sum(
                source + HALF, live_i, at, matrix, more, rank, n + HALF, live_d, width, BLOCK_J
            )
            place = own * (2 * HALF) + d[None, :]
            if part == 0:
                target, kept = query + t[:, None] * width + place, live
            elif part == 1:
                target, kept = key_cache + cell[:, None] * width + place, stored
            else:
                target, kept = value_cache + cell[:, None] * width + place, stored
            if part < 2:
                first = _rotated(x, -z, cos + angle, sin + angle, live, y.dtype.element_ty)
                z = _rotated(z, x, cos + HALF + angle, sin + HALF + angle, live, y.dtype.element_ty)
                x = first
            tl.store(target, x.to(y.dtype.element_ty), mask=kept)
            tl.store(target + HALF, z.to(y.dtype.element_ty), mask=kept)


@triton.jit
@no_type_check
def _rotated(x, exchanged, cos, sin, live, DTYPE: tl.constexpr):
    """x cos + exchanged sin, products and sum rounded one by one."""
    c = tl.load(cos, mask=live, other=0.0).to(tl.float32)
    s = tl.load(sin, mask=live, other=0.0).to(tl.float32)
    return (x * c).to(DTYPE).to(tl.float32) + (exchanged * s).to(DTYPE).to(tl.float32)
