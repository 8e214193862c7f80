"""The base's product of a few rows: a candidate to take the place of cuBLAS's, not served.

A program has a block of N and a part of K, the weights being the tall side of the matrix
instruction, and a row's sums have one order however many rows there are. From sm_90 on a launch
begins before the one before it is done and has its first weights fetched to the second-level cache;
only then it waits for x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import torch

from deltamux_kernels._triton import overlap, tl, triton

MOST_ROWS = 64
# Bytes that one prefetch brings to the cache.
LINE = 128


@dataclass(frozen=True)
class Shape:
    """Of the programs: blocks of N and K, parts of K, warps, and blocks of K under way at once.

    `ahead` is how much of K is fetched to the cache before the launch before it is done.
    """

    block_n: int
    block_k: int
    parts: int
    warps: int
    stages: int
    ahead: int = 512

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether blocks and parts divide a weight [N, K]."""
        outputs, width = weight.shape
        return outputs % self.block_n == 0 and width % (self.block_k * self.parts) == 0


class Scratch:
    """What the parts of K leave for each other; every product of a stream may use the same."""

    def __init__(self, like: torch.Tensor, widest: int, parts: int = 8) -> None:
        self.planes = like.new_empty(parts * MOST_ROWS * widest, dtype=torch.float32)
        # Zero before and after every launch.
        self.counters = like.new_zeros(widest // 16, dtype=torch.int32)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, shape: Shape, scratch: Scratch
) -> None:
    """y[t, n] = sum_k x[t, k] W[n, k] in float32, rounded once.

    x [T, K] with T up to `MOST_ROWS`, weight [N, K], y [T, N]; all contiguous, of one half type.
    """
    rows, (outputs, width) = x.shape[0], weight.shape
    _skinny_kernel[(outputs // shape.block_n, shape.parts)](
        x,
        weight,
        y,
        scratch.planes if shape.parts > 1 else None,
        scratch.counters if shape.parts > 1 else None,
        rows,
        outputs,
        width,
        width // shape.parts,
        PARTS=shape.parts,
        BLOCK_T=max(16, triton.next_power_of_2(rows)),
        BLOCK_N=shape.block_n,
        BLOCK_K=shape.block_k,
        AHEAD=min(shape.ahead, width // shape.parts),
        LINE=LINE // weight.element_size(),
        num_warps=shape.warps,
        num_stages=shape.stages,
        **overlap(x),
    )


@triton.jit
@no_type_check
def _skinny_kernel(
    x,
    weight,
    y,
    planes,
    counters,
    rows,
    outputs,
    width,
    length,
    PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    LINE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """With several parts, the last program of a block to be done sums their planes in order."""
    block, part = tl.program_id(0), tl.program_id(1)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    own = weight + n[:, None].to(tl.int64) * width + part * length
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
        for k0 in range(0, AHEAD, LINE):
            _prefetch(own + k0)
        tl.extra.cuda.gdc_wait()
    t, k = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    live = t < rows
    xs = x + part * length + t[None, :] * width + k[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for k0 in range(0, length, BLOCK_K):
        weights = tl.load(own + (k0 + k)[None, :], eviction_policy="evict_first")
        total = tl.dot(weights, tl.load(xs + k0, mask=live[None, :], other=0.0), total)
    place, live = t[None, :] * outputs + n[:, None], live[None, :] & (n < outputs)[:, None]
    if PARTS > 1:
        plane = rows.to(tl.int64) * outputs
        tl.store(planes + part * plane + place, total, mask=live)
        # All threads have stored before the one that counts says so.
        tl.debug_barrier()
        if tl.atomic_add(counters + block, 1, sem="acq_rel", scope="gpu") < PARTS - 1:
            return
        tl.store(counters + block, 0)
        total = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
        for each in tl.static_range(PARTS):
            # Past the first-level cache: other programs have stored.
            total += tl.load(planes + each * plane + place, mask=live, cache_modifier=".cg")
    tl.store(y + place, total.to(y.dtype.element_ty), mask=live)


@triton.jit
@no_type_check
def _prefetch(lines):
    """Asks for cache lines and waits for nothing."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [lines],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
