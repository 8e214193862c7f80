"""x times A transposed, each row with the matrix of its own slot."""

from __future__ import annotations

from typing import TypeAlias, no_type_check

import torch

from deltamux_kernels import native
from deltamux_kernels._triton import tl, triton
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.products import Layout, NativeProducts
from deltamux_kernels.segments import TILE_ROWS, Segments

# What `shrink` hands to `expand`, opaque in between. From the torch form one [rows, rank] per span
# (None where the slot has no matrix); from the Triton form float32 planes [planes, T, R], to be
# summed in order, in which only the columns of a row's own rank are ever written or read.
Shrunk: TypeAlias = "list[torch.Tensor | None] | NativeProducts | torch.Tensor"

# Elements of K that are summed before anything else is added. It is the same for every shape, so
# a row's sum is the same in every batch, however its chunks are spread over programs.
CHUNK = 512
# Up to this many rows each chunk has a program and a plane of its own, since a small batch has too
# few tiles to fill a GPU. A larger batch sums its chunks in one program, in the same order. Not
# measured yet: the bits are the same whatever it is.
SPLIT_ROWS = 256
BLOCK_K = 128
# The least width of the matrix instruction's tile, here of ranks.
BLOCK_J = 16


def shrink(x: torch.Tensor, a: PackedMatrices, segments: Segments) -> Shrunk:
    """h[t, j] = sum_k x[t, k] A_s[j, k], where s is the slot of row t and j < rows of A_s.

    x [T, K]; A_s [rows of slot s, K].
    """
    if x.is_cuda:
        return shrink_triton(x, a, segments)
    if x.dtype == torch.float32 and native.available():
        return shrink_native(x, a, segments)
    return shrink_torch(x, a, segments)


def shrink_native(x: torch.Tensor, a: PackedMatrices, segments: Segments) -> NativeProducts:
    """`shrink` in C, in float32."""
    x = x if x.stride(1) == 1 else x.contiguous()
    layout = Layout.of(a, segments)
    h = x.new_empty(layout.size)
    layout.shrink.shrink(x, h, a.arena, a.width)
    return NativeProducts(h, layout)


def shrink_torch(
    x: torch.Tensor, a: PackedMatrices, segments: Segments
) -> list[torch.Tensor | None]:
    """`shrink` in plain torch; half types are multiplied and kept in float32."""
    matrices = [a.transposed[slot] for slot, _, _ in segments.spans]
    pieces = segments.pieces(x)
    if x.dtype in (torch.float16, torch.bfloat16):
        return [
            None if matrix is None else torch.mm(rows.float(), matrix.float())
            for rows, matrix in zip(pieces, matrices, strict=True)
        ]
    return [
        None if matrix is None else torch.mm(rows, matrix)
        for rows, matrix in zip(pieces, matrices, strict=True)
    ]


def shrink_triton(
    x: torch.Tensor, a: PackedMatrices, segments: Segments, split_rows: int = SPLIT_ROWS
) -> torch.Tensor:
    """`shrink` in one launch: a program per (tile of rows, block of ranks, chunk of K)."""
    most = segments.most_rows(a)
    chunks = -(-a.width // CHUNK)
    split = x.shape[0] <= split_rows
    h = new_planes(x, chunks if split else 1, most)
    if not most:
        return h
    x = x if x.stride(1) == 1 else x.contiguous()
    _shrink_kernel[(segments.tiles.shape[0], -(-most // BLOCK_J), h.shape[0])](
        x,
        h,
        a.arena,
        a.offsets,
        a.rows,
        segments.tiles,
        a.width,
        1 if split else chunks,
        x.stride(0),
        h.stride(0),
        h.stride(1),
        CHUNK=CHUNK,
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )
    return h


def new_planes(like: torch.Tensor, planes: int, columns: int) -> torch.Tensor:
    """Scratch [planes, T, columns] in float32, not cleared, its rows 64 bytes apart or more."""
    columns = -(-columns // 16) * 16
    return like.new_empty((planes, like.shape[0], columns), dtype=torch.float32)


@triton.jit
@no_type_check
def _shrink_kernel(
    x,
    h,
    arena,
    offsets,
    rows,
    tiles,
    width,
    chunks,
    x_row,
    h_plane,
    h_row,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile, block, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    count = tl.load(tiles + tile * 3 + 2)
    rank = tl.load(rows + slot)
    if block * BLOCK_J >= rank:
        return
    shrink_tile(
        x,
        h + plane.to(tl.int64) * h_plane,
        arena + tl.multiple_of(tl.load(offsets + slot), 64),
        start,
        count,
        rank,
        block,
        plane * chunks,
        chunks,
        width,
        x_row,
        h_row,
        CHUNK,
        BLOCK_T,
        BLOCK_J,
        BLOCK_K,
    )


@triton.jit
@no_type_check
def shrink_tile(
    x,
    h,
    matrix,
    start,
    count,
    rank,
    block,
    first_chunk,
    chunks,
    width,
    x_row,
    h_row,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of ranks of one tile of rows, summed over `chunks` chunks of K into a plane `h`."""
    i, j = tl.arange(0, BLOCK_T), block * BLOCK_J + tl.arange(0, BLOCK_J)
    live_i, live_j = i < count, j < rank
    t = (start + i).to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
    for chunk in range(first_chunk, first_chunk + chunks):
        products = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        for k0 in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, width), BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            live_k = k < width
            xs = tl.load(
                x + t[:, None] * x_row + k[None, :],
                mask=live_i[:, None] & live_k[None, :],
                other=0.0,
            )
            a = tl.load(
                matrix + j[None, :].to(tl.int64) * width + k[:, None],
                mask=live_j[None, :] & live_k[:, None],
                other=0.0,
            )
            products = tl.dot(xs, a.to(xs.dtype), products, input_precision="ieee")
        total += products
    tl.store(h + t[:, None] * h_row + j[None, :], total, mask=live_i[:, None] & live_j[None, :])
