"""All layers that read one input: shrink and every expand of a site in two launches, or in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, no_type_check

import torch

from deltamux_kernels._triton import tl, triton
from deltamux_kernels.expand import BLOCK_J, BLOCK_N, Columns, expand, expand_tile
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import TILE_ROWS, Segments
from deltamux_kernels.shrink import (
    BLOCK_K,
    CHUNK,
    SPLIT_ROWS,
    new_planes,
    shrink,
    shrink_tile,
    shrink_triton,
)


class Slice(NamedTuple):
    """One layer of a site: its output, and where each slot's columns of h and matrix B are."""

    y: torch.Tensor  # [T, N]
    b: PackedMatrices
    columns: Columns


class SiteCounters:
    """Device memory by which the programs of one launch wait for each other; zero in between."""

    def __init__(self, tiles: int, device: torch.device) -> None:
        """For steps of at most `tiles` tiles."""
        self.table = torch.zeros(1 + 2 * tiles, dtype=torch.int32, device=device)


def low_rank_site(
    slices: Sequence[Slice],
    x: torch.Tensor,
    a: PackedMatrices,
    segments: Segments,
    counters: SiteCounters | None = None,
) -> None:
    """y_i[t, n] += sum_j (sum_k x[t, k] A_s[c_i + j, k]) B_is[j, n], in place, s = slot of row t.

    One to three slices, whose A lie stacked in `a`. It does what `shrink` and an `expand` for each
    slice do, to the bit. On a GPU it is two launches, or with `counters` one, in which the
    programs that expand wait for those that shrink.
    """
    if x.is_cuda:
        low_rank_site_triton(slices, x, a, segments, counters)
    else:
        low_rank_site_cpu(slices, x, a, segments)


def low_rank_site_cpu(
    slices: Sequence[Slice], x: torch.Tensor, a: PackedMatrices, segments: Segments
) -> None:
    """`low_rank_site` as one shrink and an expand for each slice."""
    h = shrink(x, a, segments)
    for y, b, columns in slices:
        expand(y, h, b, columns, segments)


def low_rank_site_triton(
    slices: Sequence[Slice],
    x: torch.Tensor,
    a: PackedMatrices,
    segments: Segments,
    counters: SiteCounters | None = None,
    split_rows: int = SPLIT_ROWS,
) -> None:
    """`low_rank_site` in one or two launches; see `_low_rank_site_kernel`."""
    most = segments.most_rows(a)
    if not most:
        return
    x = x if x.stride(1) == 1 else x.contiguous()
    chunks = -(-a.width // CHUNK)
    if counters is None:
        h = shrink_triton(x, a, segments, split_rows)
    else:
        h = new_planes(x, chunks if x.shape[0] <= split_rows else 1, most)
    firsts = [0]
    for part in slices:
        firsts.append(firsts[-1] - (-part.b.width // BLOCK_N))
    tiles, rank_blocks = segments.tiles.shape[0], -(-most // BLOCK_J)
    shrinking = 0 if counters is None else tiles * rank_blocks * h.shape[0]
    _low_rank_site_kernel[(shrinking + tiles * firsts[-1],)](
        x,
        h,
        tuple(_arguments(part) for part in slices),
        tuple(firsts),
        a.arena,
        a.offsets,
        a.rows,
        segments.tiles,
        None if counters is None else counters.table,
        a.width,
        h.shape[0],
        chunks // h.shape[0],
        shrinking,
        rank_blocks,
        x.stride(0),
        h.stride(0),
        h.stride(1),
        CHUNK=CHUNK,
        BLOCK_T=TILE_ROWS,
        BLOCK_J=BLOCK_J,
        BLOCK_K=BLOCK_K,
        BLOCK_N=BLOCK_N,
        num_warps=4,
        enable_fp_fusion=True,
        num_stages=3,
    )


def _arguments(part: Slice) -> tuple[object, ...]:
    y, b, columns = part
    return y, b.offsets, b.rows, columns.table, b.width, y.stride(0), y.stride(1)


@triton.jit
@no_type_check
def _low_rank_site_kernel(
    x,
    h,
    slices,
    firsts,
    arena,
    offsets,
    rows,
    tiles,
    counters,
    width,
    planes,
    chunks,
    shrinking,
    rank_blocks,
    x_row,
    h_plane,
    h_row,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The first `shrinking` programs shrink; each later one expands a block of one slice's N.

    Programs take their number as they start, so whoever waits, waits for a program that runs.
    `counters` holds that ticket and, for each tile, how many programs have shrunk and how many are
    done with it. The last one puts them back to zero.
    """
    program = tl.program_id(0)
    if counters is not None:
        program = tl.atomic_add(counters, 1, sem="relaxed", scope="gpu")
        if program == tl.num_programs(0) - 1:
            tl.store(counters, 0)
    blocks = firsts[len(slices)]
    tile = (program - shrinking) // blocks
    if program < shrinking:
        tile = program // (rank_blocks * planes)
    slot = tl.load(tiles + tile * 3)
    start = tl.load(tiles + tile * 3 + 1)
    count = tl.load(tiles + tile * 3 + 2)
    rank = tl.load(rows + slot)
    if rank == 0:
        return
    needed = tl.cdiv(rank, BLOCK_J) * planes
    if program < shrinking:
        rank_block, plane = program // planes % rank_blocks, program % planes
        if rank_block * BLOCK_J >= rank:
            return
        shrink_tile(
            x,
            h + plane.to(tl.int64) * h_plane,
            arena + tl.multiple_of(tl.load(offsets + slot), 64),
            start,
            count,
            rank,
            rank_block,
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
        if counters is not None:
            # All threads have stored before the one that counts says so.
            tl.debug_barrier()
            tl.atomic_add(counters + 1 + 2 * tile, 1, sem="release", scope="gpu")
    else:
        block = (program - shrinking) % blocks
        for part in tl.static_range(len(slices)):
            if (block >= firsts[part]) & (block < firsts[part + 1]):
                y, b_offsets, b_rows, columns, b_width, y_row, y_column = slices[part]
                b_rank = tl.load(b_rows + slot)
                if b_rank > 0:
                    expand_tile(
                        y,
                        h,
                        arena + tl.multiple_of(tl.load(b_offsets + slot), 64),
                        start,
                        count,
                        b_rank,
                        tl.load(columns + slot),
                        block - firsts[part],
                        None if counters is None else counters + 1 + 2 * tile,
                        needed,
                        b_width,
                        planes,
                        y_row,
                        y_column,
                        h_plane,
                        h_row,
                        BLOCK_T,
                        BLOCK_J,
                        BLOCK_N,
                    )
    if counters is not None:
        tl.debug_barrier()
        done = tl.atomic_add(counters + 2 + 2 * tile, 1, sem="acq_rel", scope="gpu") + 1
        if done == needed + blocks:
            tl.store(counters + 1 + 2 * tile, 0)
            tl.store(counters + 2 + 2 * tile, 0)
