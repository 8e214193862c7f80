"""Norms of rows, each with the parameters of its own slot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch
from torch.nn.functional import layer_norm

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.rms_norm import norm_blocks, rms_norm_torch
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile


@dataclass(frozen=True)
class NormForm:
    """A layer norm where `centred`, else a root mean square norm, which has no bias.

    Only the latter may add an `offset` to its weight, or round just `once`: see `rms_norm`.
    """

    epsilon: float
    centred: bool = False
    offset: float = 0.0
    once: bool = False

    def norm(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., N] with weight [N] and bias [N], in plain torch."""
        if self.centred:
            return layer_norm(x, weight.shape, weight, bias, self.epsilon)
        return rms_norm_torch(x, weight, self.epsilon, self.offset, self.once)


def row_norm(
    y: torch.Tensor, x: torch.Tensor, p: PackedMatrices, form: NormForm, segments: Segments
) -> None:
    """y[t, n] = (P_s[0, n] + offset) c[n] / sqrt(mean over m of c[m]² + epsilon) + P_s[1, n].

    s is the slot of row t, c is x[t], less its mean where the form is centred. x and y [T, N], or
    [T, heads, N] where every head is a row of its own; y may be x itself. P_s [1, N] or, of a
    centred form with a bias, [2, N]. Computed in float32 and rounded once; without centring the
    quotient is rounded to the dtype of x before, unless `once`, as in `rms_norm`. Rows of y whose
    slot has no P keep their bits.
    """
    if y.device.type == "cuda":
        row_norm_triton(y, x, p, form, segments)
    else:
        row_norm_torch(y, x, p, form, segments)


def row_norm_torch(
    y: torch.Tensor, x: torch.Tensor, p: PackedMatrices, form: NormForm, segments: Segments
) -> None:
    """`row_norm` in plain torch."""
    for _, span, parameters in segments.owners(p):
        y[span] = form.norm(x[span], *parameters)


def row_norm_triton(
    y: torch.Tensor, x: torch.Tensor, p: PackedMatrices, form: NormForm, segments: Segments
) -> None:
    """`row_norm` in one launch: a program per row of a tile, or per few short ones."""
    if not segments.most_rows(p):
        return
    x, y = (rows if rows.dim() == 3 else rows[:, None] for rows in (x, y))
    heads = y.shape[1]
    blocks = norm_blocks(p.width)
    _row_norm_kernel[(segments.tiles.shape[0], -(-TILE_ROWS * heads // blocks["BLOCK_R"]))](
        y,
        x,
        p.arena,
        p.offsets,
        p.rows,
        segments.tiles,
        form.epsilon,
        heads,
        *y.stride(),
        *x.stride(),
        WIDTH=p.width,
        CENTRED=form.centred,
        OFFSET=form.offset,
        ONCE=form.once,
        **blocks,
        enable_fp_fusion=True,
    )


@triton.jit
@no_type_check
def _row_norm_kernel(
    y,
    x,
    arena,
    offsets,
    rows,
    tiles,
    epsilon,
    heads,
    y_row,
    y_head,
    y_column,
    x_row,
    x_head,
    x_column,
    WIDTH: tl.constexpr,
    CENTRED: tl.constexpr,
    OFFSET: tl.constexpr,
    ONCE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile, group = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    count *= heads
    vectors = tl.load(rows + slot)
    if (vectors == 0) | (group * BLOCK_R >= count):
        return
    i, n = group * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    row, head = (start + i // heads).to(tl.int64)[:, None], (i % heads).to(tl.int64)[:, None]
    live_n = n < WIDTH
    live = (i < count)[:, None] & live_n[None, :]
    source = x + row * x_row + head * x_head + n[None, :] * x_column
    value = tl.load(source, mask=live, other=0.0).to(tl.float32)
    if CENTRED:
        value = tl.where(live, value - (tl.sum(value, axis=1) / WIDTH)[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + epsilon)
    normed = value * scale[:, None]
    parameters = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    weight = tl.load(parameters + n, mask=live_n, other=0.0).to(tl.float32)[None, :]
    if CENTRED:
        in_bias = n < WIDTH * (vectors - 1)
        bias = tl.load(parameters + WIDTH + n, mask=in_bias, other=0.0).to(tl.float32)[None, :]
        normed = weight * normed + bias
    else:
        if not ONCE:
            normed = normed.to(x.dtype.element_ty).to(tl.float32)
        if OFFSET != 0:
            weight += OFFSET
        normed = weight * normed
    target = y + row * y_row + head * y_head + n[None, :] * y_column
    tl.store(target, normed.to(y.dtype.element_ty), mask=live)
