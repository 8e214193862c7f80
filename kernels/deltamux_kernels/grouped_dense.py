"""x times a dense W transposed, each row with its own slot's W: in place of the base's product, or
added to it."""

from __future__ import annotations

from typing import no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

BLOCK_N = 64
BLOCK_K = 64


def grouped_dense(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: PackedMatrices,
    biases: PackedMatrices,
    segments: Segments,
) -> None:
    """y[t, n] = sum_k x[t, k] W_s[n, k] + b_s[n], in place, s = slot of row t.

    y [T, N]; x [T, K]; W_s [N, K]; b_s [1, N], or none for zero. Rows whose slot has no W keep
    their bits.
    """
    if y.device.type == "cuda":
        grouped_dense_triton(y, x, weights, biases, segments)
    else:
        grouped_dense_torch(y, x, weights, biases, segments)


def grouped_dense_torch(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: PackedMatrices,
    biases: PackedMatrices,
    segments: Segments,
) -> None:
    """`grouped_dense` in plain torch; half types are computed as torch's linear layers do."""
    for slot, rows, weight in segments.owners(weights):
        bias = biases.views[slot]
        y[rows] = torch.nn.functional.linear(x[rows], weight, None if bias is None else bias[0])


def grouped_dense_triton(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: PackedMatrices,
    biases: PackedMatrices,
    segments: Segments,
) -> None:
    """`grouped_dense` in one launch: a program per (tile of rows, block of N)."""
    _launch(y, x, weights, biases, segments)


def dense_delta(
    y: torch.Tensor, x: torch.Tensor, deltas: PackedMatrices, segments: Segments
) -> None:
    """y[t, n] += sum_k x[t, k] D_s[n, k], in place, s = slot of row t.

    y [T, N]; x [T, K]; D_s [N, K]. Rows whose slot has no D keep their bits.
    """
    if y.device.type == "cuda":
        dense_delta_triton(y, x, deltas, segments)
    else:
        dense_delta_torch(y, x, deltas, segments)


def dense_delta_torch(
    y: torch.Tensor, x: torch.Tensor, deltas: PackedMatrices, segments: Segments
) -> None:
    """`dense_delta` in plain torch."""
    for _, rows, delta in segments.owners(deltas):
        y[rows].addmm_(x[rows], delta.t())


def dense_delta_triton(
    y: torch.Tensor, x: torch.Tensor, deltas: PackedMatrices, segments: Segments
) -> None:
    """`dense_delta` in one launch: a program per (tile of rows, block of N)."""
    _launch(y, x, deltas, None, segments)


def _launch(
    y: torch.Tensor,
    x: torch.Tensor,
    weights: PackedMatrices,
    biases: PackedMatrices | None,
    segments: Segments,
) -> None:
    """Replaces y where there are `biases`, adds to it where they are None."""
    if not segments.most_rows(weights):
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    out_width = y.shape[1]
    _grouped_dense_kernel[(segments.tiles.shape[0], -(-out_width // BLOCK_N))](
        y,
        x,
        weights.arena,
        weights.offsets,
        None if biases is None else biases.offsets,
        weights.rows,
        None if biases is None else biases.rows,
        segments.tiles,
        weights.width,
        out_width,
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
def _grouped_dense_kernel(
    y,
    x,
    arena,
    weight_offsets,
    bias_offsets,
    weight_rows,
    bias_rows,
    tiles,
    in_width,
    out_width,
    y_row,
    y_column,
    x_row,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, block = tl.program_id(0), tl.program_id(1)
    slot, start, count = load_tile(tiles, tile)
    if tl.load(weight_rows + slot) == 0:
        return
    i, n = tl.arange(0, BLOCK_T), block * BLOCK_N + tl.arange(0, BLOCK_N)
    live_i, live_n = i < count, n < out_width
    t = (start + i).to(tl.int64)
    weight = arena + tl.multiple_of(tl.load(weight_offsets + slot), 64)
    total = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, in_width, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        live_k = k < in_width
        rows = tl.load(
            x + t[:, None] * x_row + k[None, :], mask=live_i[:, None] & live_k[None, :], other=0.0
        )
        columns = tl.load(
            weight + n.to(tl.int64)[None, :] * in_width + k[:, None],
            mask=live_k[:, None] & live_n[None, :],
            other=0.0,
        )
        total = tl.dot(rows, columns, total, input_precision="ieee")
    target = y + t[:, None] * y_row + n[None, :] * y_column
    live = live_i[:, None] & live_n[None, :]
    if bias_rows is None:
        total += tl.load(target, mask=live, other=0.0).to(tl.float32)
    else:
        bias = arena + tl.load(bias_offsets + slot)
        biased = n < out_width * tl.load(bias_rows + slot)
        total += tl.load(bias + n, mask=biased, other=0.0).to(tl.float32)[None, :]
    tl.store(target, total.to(y.dtype.element_ty), mask=live)
