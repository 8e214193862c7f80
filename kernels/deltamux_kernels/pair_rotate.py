"""Each output feature times a factor plus its partner times another, by the row's own slot."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices, as_elements
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_P = 64


class PairFactors:
    """The factors [2, N] of one site and the distance of its pairs, per slot; a slot may have none.

    Features are cut into groups of 2 d; feature n of a group's first half and n + d are partners.
    Both lie in the arena, the distance as `as_elements` of one int32.
    """

    def __init__(self, arena: torch.Tensor, slots: int, width: int) -> None:
        self.factors = PackedMatrices(arena, slots, width)
        self.distances = PackedMatrices(arena, slots, 1)
        self._on_host = [0] * slots

    def placed(self, slot: int) -> None:
        """To be called when the two parts of a slot have been written."""
        distance = self.distances.views[slot]
        if distance is not None and distance.device.type == "cpu":
            self._on_host[slot] = int(distance.flatten().view(torch.int32))

    def distance(self, slot: int) -> int:
        """The slot's distance, for the torch form."""
        return self._on_host[slot]


def distance_elements(distance: int, dtype: torch.dtype) -> torch.Tensor:
    """A distance as `PairFactors.distances` holds it: [elements, 1]."""
    return as_elements(torch.tensor([distance], dtype=torch.int32), dtype)


def pair_rotate(y: torch.Tensor, f: PairFactors, segments: Segments) -> None:
    """y[t, n] = F_s[0, n] y[t, n] + F_s[1, n] y[t, partner of n], in place, s = slot of row t.

    y [T, N]; F_s [2, N]; N is a multiple of twice the slot's distance. Rows whose slot has no
    factors keep their bits.
    """
    if y.device.type == "cuda":
        pair_rotate_triton(y, f, segments)
    else:
        pair_rotate_torch(y, f, segments)


def pair_rotate_torch(y: torch.Tensor, f: PairFactors, segments: Segments) -> None:
    """`pair_rotate` in plain torch; half types are computed in float32 and rounded once."""
    wide = y.dtype in (torch.float16, torch.bfloat16)
    for slot, span, factors in segments.owners(f.factors):
        given = rows = y[span]
        if wide:
            given, factors = given.float(), factors.float()
        own, other = factors
        pairs = given.reshape(given.shape[0], -1, 2, f.distance(slot))
        rows.copy_(given * own + pairs.flip(2).reshape(given.shape) * other)


def pair_rotate_triton(y: torch.Tensor, f: PairFactors, segments: Segments) -> None:
    """`pair_rotate` in one launch: a program per (tile of rows, block of pairs)."""
    if not segments.most_rows(f.factors):
        return
    width = f.factors.width
    _pair_rotate_kernel[(segments.tiles.shape[0], -(-width // (2 * BLOCK_P)))](
        y,
        f.factors.arena,
        f.factors.offsets,
        f.distances.offsets,
        f.factors.rows,
        segments.tiles,
        width,
        y.stride(0),
        y.stride(1),
        BLOCK_T=TILE_ROWS,
        BLOCK_P=BLOCK_P,
        num_warps=4,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _pair_rotate_kernel(
    y,
    arena,
    factor_offsets,
    distance_offsets,
    rows,
    tiles,
    width,
    y_row,
    y_column,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    if tl.load(rows + slot) == 0:
        return
    distance = tl.load((arena + tl.load(distance_offsets + slot)).to(tl.pointer_type(tl.int32)))
    i, pair = tl.arange(0, BLOCK_T), block * BLOCK_P + tl.arange(0, BLOCK_P)
    # Both of a pair belong to one program, so that neither is overwritten before it is read.
    first = pair // distance * 2 * distance + pair % distance
    second = first + distance
    live_pair = second < width
    live = (i < count)[:, None] & live_pair[None, :]
    factors = arena + tl.multiple_of(tl.load(factor_offsets + slot), 64)
    own_first = tl.load(factors + first, mask=live_pair, other=0.0).to(tl.float32)[None, :]
    own_second = tl.load(factors + second, mask=live_pair, other=0.0).to(tl.float32)[None, :]
    other = factors + width
    other_first = tl.load(other + first, mask=live_pair, other=0.0).to(tl.float32)[None, :]
    other_second = tl.load(other + second, mask=live_pair, other=0.0).to(tl.float32)[None, :]
    row = y + (start + i).to(tl.int64)[:, None] * y_row
    target_first, target_second = row + first[None, :] * y_column, row + second[None, :] * y_column
    a = tl.load(target_first, mask=live, other=0.0).to(tl.float32)
    b = tl.load(target_second, mask=live, other=0.0).to(tl.float32)
    tl.store(target_first, (own_first * a + other_first * b).to(y.dtype.element_ty), mask=live)
    tl.store(target_second, (own_second * b + other_second * a).to(y.dtype.element_ty), mask=live)
