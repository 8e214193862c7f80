"""Rows of a table that belong to single tokens, each batch row with those of its own slot."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 64
BLOCK_K = 64


class TokenTable:
    """A few rows [tokens, width] per slot, and whose they are; a slot may have none.

    The ids ascend. They lie in the arena as the bits of int32 (`as_elements`), beside the rows.
    """

    def __init__(self, arena: torch.Tensor, slots: int, width: int) -> None:
        self.ids = PackedMatrices(arena, slots, 1)
        self.rows = PackedMatrices(arena, slots, width)
        self._ids: dict[int, torch.Tensor] = {}

    def placed(self, slot: int) -> None:
        """To be called when ids and rows of a slot have been written."""
        ids = self.ids.views[slot]
        if ids is not None and ids.device.type == "cpu":
            self._ids[slot] = ids.flatten().view(torch.int32).long()

    def of(self, slot: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Ids, int64 [tokens], and rows [tokens, width] of a slot for the torch forms, or None."""
        rows = self.rows.views[slot]
        return None if rows is None else (self._ids[slot], rows)


def token_rows(
    y: torch.Tensor, tokens: torch.Tensor, table: TokenTable, segments: Segments
) -> None:
    """y[t] = R_s[i] where I_s[i] = tokens[t], in place, s = slot of row t.

    y [T, N]; tokens int64 [T]; I_s ascending [n], R_s [n, N]. All other rows keep their bits.
    """
    if y.device.type == "cuda":
        token_rows_triton(y, tokens, table, segments)
    else:
        token_rows_torch(y, tokens, table, segments)


def token_rows_torch(
    y: torch.Tensor, tokens: torch.Tensor, table: TokenTable, segments: Segments
) -> None:
    """`token_rows` in plain torch."""
    pieces = zip(segments.spans, segments.pieces(tokens), segments.pieces(y), strict=True)
    for (slot, _, _), wanted, rows in pieces:
        if (own := table.of(slot)) is None:
            continue
        ids, replacements = own
        places = torch.searchsorted(ids, wanted).clamp_max_(len(ids) - 1)
        found = (ids[places] == wanted)[:, None]
        rows.copy_(torch.where(found, replacements[places], rows))


def token_columns(y: torch.Tensor, x: torch.Tensor, table: TokenTable, segments: Segments) -> None:
    """y[t, I_s[i]] = sum_k x[t, k] R_s[i, k], in place, s = slot of row t.

    y [T, V]; x [T, K]; I_s ascending [n], R_s [n, K]. All other cells keep their bits.
    """
    if y.device.type == "cuda":
        token_columns_triton(y, x, table, segments)
    else:
        token_columns_torch(y, x, table, segments)


def token_columns_torch(
    y: torch.Tensor, x: torch.Tensor, table: TokenTable, segments: Segments
) -> None:
    """`token_columns` in plain torch; half types are computed as torch's linear layers do."""
    pieces = zip(segments.spans, segments.pieces(x), segments.pieces(y), strict=True)
    for (slot, _, _), given, rows in pieces:
        if (own := table.of(slot)) is not None:
            rows.index_copy_(1, own[0], torch.nn.functional.linear(given, own[1]))


def token_rows_triton(
    y: torch.Tensor, tokens: torch.Tensor, table: TokenTable, segments: Segments
) -> None:
    """`token_rows` in one launch: a program per (tile of rows, block of N)."""
    most = segments.most_rows(table.rows)
    if not most:
        return
    width = table.rows.width
    _token_rows_kernel[(segments.tiles.shape[0], -(-width // BLOCK_N))](
        y,
        tokens.contiguous(),
        table.rows.arena,
        table.ids.offsets,
        table.rows.offsets,
        table.rows.rows,
        segments.tiles,
        width,
        most.bit_length(),
        y.stride(0),
        y.stride(1),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        num_warps=4,
    )


def token_columns_triton(
    y: torch.Tensor, x: torch.Tensor, table: TokenTable, segments: Segments
) -> None:
    """`token_columns` in one launch: a program per (tile of rows, block of the slot's ids)."""
    most = segments.most_rows(table.rows)
    if not most:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    _token_columns_kernel[(segments.tiles.shape[0], -(-most // BLOCK_N))](
        y,
        x,
        table.rows.arena,
        table.ids.offsets,
        table.rows.offsets,
        table.rows.rows,
        segments.tiles,
        table.rows.width,
        y.stride(0),
        y.stride(1),
        x.stride(0),
        BLOCK_T=TILE_ROWS,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )


@triton.jit
@no_type_check
def _token_rows_kernel(
    y,
    tokens,
    arena,
    id_offsets,
    row_offsets,
    counts,
    tiles,
    width,
    search_steps,
    y_row,
    y_column,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, live_rows = load_tile(tiles, tile)
    count = tl.load(counts + slot)
    if count == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    t = (start + i).to(tl.int64)
    ids = (arena + tl.load(id_offsets + slot)).to(tl.pointer_type(tl.int32))
    token = tl.load(tokens + t, mask=i < live_rows, other=-1)
    low, high = tl.zeros((BLOCK_T,), dtype=tl.int32), tl.zeros((BLOCK_T,), dtype=tl.int32) + count
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        between = low < high
        below = tl.load(ids + middle, mask=between, other=0).to(tl.int64) < token
        high = tl.where(between & (below == 0), middle, high)
        low = tl.where(between & below, middle + 1, low)
    found = (low < count) & (i < live_rows)
    found = found & (tl.load(ids + low, mask=found, other=-1).to(tl.int64) == token)
    live = found[:, None] & (n < width)[None, :]
    rows = arena + tl.multiple_of(tl.load(row_offsets + slot), 64)
    picked = tl.load(rows + low[:, None].to(tl.int64) * width + n[None, :], mask=live, other=0.0)
    tl.store(y + t[:, None] * y_row + n[None, :] * y_column, picked, mask=live)


@triton.jit
@no_type_check
def _token_columns_kernel(
    y,
    x,
    arena,
    id_offsets,
    row_offsets,
    counts,
    tiles,
    width,
    y_row,
    y_column,
    x_row,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, live_rows = load_tile(tiles, tile)
    count = tl.load(counts + slot)
    if block * BLOCK_N >= count:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = i < live_rows, n < count
    t = (start + i).to(tl.int64)
    ids = (arena + tl.load(id_offsets + slot)).to(tl.pointer_type(tl.int32))
    rows = arena + tl.multiple_of(tl.load(row_offsets + slot), 64)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        live_k = k < width
        given = tl.load(
            x + t[:, None] * x_row + k[None, :], mask=live_i[:, None] & live_k[None, :], other=0.0
        )
        weight = tl.load(
            rows + n[None, :].to(tl.int64) * width + k[:, None],
            mask=live_k[:, None] & live_n[None, :],
            other=0.0,
        )
        total = tl.dot(given, weight, total, input_precision="ieee")
    column = tl.load(ids + n, mask=live_n, other=0).to(tl.int64)
    target = y + t[:, None] * y_row + column[None, :] * y_column
    tl.store(target, total.to(y.dtype.element_ty), mask=live_i[:, None] & live_n[None, :])
