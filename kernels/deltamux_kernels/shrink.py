"""x times A transposed, each row with the matrix of its own slot."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeAlias, no_type_check

import torch

from deltamux_kernels import native
from deltamux_kernels._triton import overlap, tl, triton
from deltamux_kernels.native.by_slot import BY_SLOT, by_slot
from deltamux_kernels.native.library import INTEGER, POINTER, function
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.products import NativeProducts
from deltamux_kernels.segments import COUNTERS_A_TILE, TILE_ROWS, Segments
from deltamux_kernels.tiles import load_tile

# What `shrink` hands to `expand`, opaque in between. From the torch form one [rows, rank] per span
# (None where the slot has no matrix); from the others float32 [T, R], in which only the columns of
# a row's own rank are ever written or read.
Shrunk: TypeAlias = "list[torch.Tensor | None] | NativeProducts | torch.Tensor"

# Elements of K that are summed before anything else is added. It is the same for every shape, so
# a row's sum is the same in every batch, however its chunks are spread over programs.
CHUNK = 512
# Up to this many rows each chunk has a program of its own, since a small batch has too few tiles to
# fill a GPU. A larger batch sums its chunks in one program, in the same order: to the bit the same.
SPLIT_ROWS = 2048
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
    h = new_products(x, segments.most_rows(a))
    _native()(
        x.data_ptr(),
        x.stride(0),
        h.data_ptr(),
        h.stride(0),
        *by_slot(a, segments),
    )
    return NativeProducts(h, a, segments)


@cache
def _native() -> Callable[..., None]:
    return function(
        "shrink",
        *(POINTER, INTEGER) * 2,  # x and h, with the distance of their rows
        *BY_SLOT,
    )


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
    h = new_products(x, most)
    if not most:
        return h
    x = x if x.stride(1) == 1 else x.contiguous()
    chunks, blocks = -(-a.width // CHUNK), -(-most // BLOCK_J)
    split = chunks > 1 and x.shape[0] <= split_rows and blocks <= COUNTERS_A_TILE
    _shrink_kernel[(segments.tiles.shape[0], blocks, chunks if split else 1)](
        x,
        h,
        h.new_empty(chunks, *h.shape) if split else None,
        segments.counters if split else None,
        a.arena,
        a.offsets,
        a.rows,
        segments.tiles,
        a.width,
        x.stride(0),
        h.stride(0),
        h.numel(),
        CHUNKS=chunks,
        CHUNK=CHUNK,
        COUNTERS_A_TILE=COUNTERS_A_TILE,
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        BLOCK_K=BLOCK_K,
        num_warps=2,
        enable_fp_fusion=True,
        num_stages=3,
        **overlap(x),
    )
    return h


def new_products(like: torch.Tensor, columns: int) -> torch.Tensor:
    """[T, columns] in float32, not cleared, its rows 64 bytes apart or more."""
    columns = -(-columns // 16) * 16
    return like.new_empty((like.shape[0], columns), dtype=torch.float32)


@triton.jit
@no_type_check
def _shrink_kernel(
    x,
    h,
    planes,
    counters,
    arena,
    offsets,
    rows,
    tiles,
    width,
    x_row,
    h_row,
    plane,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNTERS_A_TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """With `planes` [CHUNKS, T, R], a program has one chunk; the last one of a block to be done
    sums them all, and puts the block's counter back to zero.
    """
    tile, block, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    slot, start, count = load_tile(tiles, tile)
    rank = tl.load(rows + slot)
    matrix = arena + tl.multiple_of(tl.load(offsets + slot), 64)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    if block * BLOCK_J >= rank:
        return
    i, j = tl.arange(0, BLOCK_T), block * BLOCK_J + tl.arange(0, BLOCK_J)
    live_i, live_j = i < count, j < rank
    t = (start + i).to(tl.int64)
    live = live_i[:, None] & live_j[None, :]
    place = t[:, None] * h_row + j[None, :]
    rows_x = x + t[:, None] * x_row
    rows_a = matrix + j[None, :].to(tl.int64) * width
    if planes is None:
        total = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        for each in range(CHUNKS):
            total += _product(rows_x, rows_a, live_i, live_j, each, width, CHUNK, BLOCK_K)
    else:
        total = _product(rows_x, rows_a, live_i, live_j, chunk, width, CHUNK, BLOCK_K)
        tl.store(planes + chunk.to(tl.int64) * plane + place, total, mask=live)
        # All threads have stored before the one that counts says so.
        tl.debug_barrier()
        counter = counters + tile * COUNTERS_A_TILE + block
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") < CHUNKS - 1:
            return
        tl.store(counter, 0)
        total = tl.zeros((BLOCK_T, BLOCK_J), dtype=tl.float32)
        for each in tl.static_range(CHUNKS):
            # Past the first-level cache: other programs have stored.
            total += tl.load(planes + each * plane + place, mask=live, cache_modifier=".cg")
    tl.store(h + place, total, mask=live)


@triton.jit
@no_type_check
def _product(
    x,
    a,
    live_i,
    live_j,
    chunk,
    width,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of ranks of one tile of rows over one chunk of K."""
    product = tl.zeros((live_i.shape[0], live_j.shape[0]), dtype=tl.float32)
    for k0 in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, width), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        live_k = k < width
        xs = tl.load(x + k[None, :], mask=live_i[:, None] & live_k[None, :], other=0.0)
        matrix = tl.load(a + k[:, None], mask=live_j[None, :] & live_k[:, None], other=0.0)
        product = tl.dot(xs, matrix.to(xs.dtype), product, input_precision="ieee")
    return product
