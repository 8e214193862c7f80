"""Adapters of one site as each arm stores them: packed by rank, or padded to the largest one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from deltamux_kernels import ALIGNMENT, Columns, PackedMatrices
from gpu.shapes import SiteShape, Step


class Pool:
    """Random numbers in device memory that stand for any weights, piece after piece, and again.

    Timings do not depend on what is multiplied, only on where it lies: cold, and apart from what
    the neighbouring layers read.
    """

    def __init__(self, elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self.memory = torch.empty(elements, dtype=dtype, device=device)
        self.memory.normal_(std=0.01)
        self._end = 0

    def take(self, *shape: int) -> torch.Tensor:
        start = self.place(*shape)
        return self.memory[start : self._end].view(shape)

    def place(self, *shape: int) -> int:
        """The offset of the next piece of this shape."""
        size = math.prod(shape)
        start = -(-self._end // ALIGNMENT) * ALIGNMENT
        if start + size > self.memory.numel():
            start = 0
        self._end = start + size
        return start


@dataclass(frozen=True)
class SiteWeights:
    """All adapters of one site.

    `a`, `bs`, `columns` are what deltamux reads. `padded_a[i]` [n, most, K] and `padded_b[i]`
    [n, N, most] are slice i padded to the largest rank, as vLLM keeps it; `stacked_a`
    [n, slices * most, K] and `stacked_b` [n, sum of N, most] are SGLang's, in which an adapter's
    slices follow each other at its own rank.
    """

    shape: SiteShape
    base: torch.Tensor  # [sum of N, K]
    a: PackedMatrices
    bs: list[PackedMatrices]
    columns: list[Columns]
    padded_a: list[torch.Tensor]
    padded_b: list[torch.Tensor]
    stacked_a: torch.Tensor
    stacked_b: torch.Tensor


def of_pool(site: SiteShape, step: Step, base: torch.Tensor, pool: Pool) -> SiteWeights:
    """Weights to be timed: every piece a different place of the pool."""
    slots, most, slices = len(step.ranks), max(step.ranks), len(site.outputs)
    a = PackedMatrices(pool.memory, slots, site.width)
    bs = [PackedMatrices(pool.memory, slots, n) for n in site.outputs]
    for store, rows in [(a, slices), *((b, 1) for b in bs)]:
        for slot, rank in enumerate(step.ranks):
            offset = pool.place(rank * rows, store.width)
            size = rank * rows * store.width
            store.write(slot, offset, pool.memory[offset : offset + size].view(-1, store.width))
    return SiteWeights(
        site,
        base,
        a,
        bs,
        _columns(step, slices, pool.memory.device),
        [pool.take(slots, most, site.width) for _ in site.outputs],
        [pool.take(slots, n, most) for n in site.outputs],
        pool.take(slots, slices * most, site.width),
        pool.take(slots, sum(site.outputs), most),
    )


def exact(site: SiteShape, step: Step, dtype: torch.dtype, device: torch.device) -> SiteWeights:
    """Weights to be compared: the same adapters in every arm's layout."""
    slots, most, slices = len(step.ranks), max(step.ranks), len(site.outputs)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.1).to(dtype).to(device)

    padded_a = [normal(slots, most, site.width) for _ in site.outputs]
    padded_b = [normal(slots, n, most) for n in site.outputs]
    stacked_a = torch.zeros(slots, slices * most, site.width, dtype=dtype, device=device)
    stacked_b = torch.cat(padded_b, 1)
    for slot, rank in enumerate(step.ranks):
        for i in range(slices):
            padded_a[i][slot, rank:] = 0
            padded_b[i][slot, :, rank:] = 0
            stacked_a[slot, i * rank : (i + 1) * rank] = padded_a[i][slot, :rank]
        stacked_b[slot, :, rank:] = 0
    a, bs = _packed(site, step, padded_a, padded_b)
    base = normal(sum(site.outputs), site.width)
    columns = _columns(step, slices, device)
    return SiteWeights(site, base, a, bs, columns, padded_a, padded_b, stacked_a, stacked_b)


def _packed(
    site: SiteShape, step: Step, padded_a: list[torch.Tensor], padded_b: list[torch.Tensor]
) -> tuple[PackedMatrices, list[PackedMatrices]]:
    like, slots = padded_a[0], len(step.ranks)
    elements = sum(rank + ALIGNMENT for rank in step.ranks) * 4 * max(site.width, *site.outputs)
    arena, end = like.new_empty(elements * len(site.outputs)), 0
    a = PackedMatrices(arena, slots, site.width)
    bs = [PackedMatrices(arena, slots, n) for n in site.outputs]
    for slot, rank in enumerate(step.ranks):
        pieces = [(a, torch.cat([part[slot, :rank] for part in padded_a]))]
        pieces += [(b, part[slot, :, :rank].t()) for b, part in zip(bs, padded_b, strict=True)]
        for store, matrix in pieces:
            end = -(-end // ALIGNMENT) * ALIGNMENT
            store.write(slot, end, matrix)
            end += matrix.numel()
    return a, bs


def _columns(step: Step, slices: int, device: torch.device) -> list[Columns]:
    columns = [Columns(len(step.ranks), device) for _ in range(slices)]
    for i, part in enumerate(columns):
        for slot, rank in enumerate(step.ranks):
            part.set(slot, i * rank)
    return columns
