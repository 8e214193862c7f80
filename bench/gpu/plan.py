"""What a layer must cost: its launches, the bytes that they move, and the floor below them.

The model is that of the kernels, tile by tile; tests/kernels/test_plan.py holds it to the launches
and to the loads and stores of a real run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltamux_kernels.expand import BLOCK_N
from deltamux_kernels.segments import TILE_ROWS
from deltamux_kernels.shrink import BLOCK_J, CHUNK, SPLIT_ROWS
from gpu.shapes import SiteShape, Step

FLOAT32 = 4
# How the layers of a site are expanded: each by itself, or all at once.
FORMS = ("apart", "site")


def launches(form: str, site: SiteShape) -> int:
    """Of one site."""
    return {"apart": 1 + len(site.outputs), "site": 2}[form]


@dataclass(frozen=True)
class Traffic:
    """Bytes that the programs of a site load and store, whichever cache they come from."""

    a: int = 0
    x: int = 0
    h_written: int = 0
    b: int = 0
    h_read: int = 0
    y: int = 0  # read, and as much written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))


def traffic(site: SiteShape, step: Step, item: int = 2) -> Traffic:
    """Of one site whose slices all have the step's ranks; `item` bytes an element."""
    chunks = _blocks(site.width, CHUNK)
    planes = chunks if chunks > 1 and step.rows <= SPLIT_ROWS else 0
    total = Traffic()
    for (_, start, end), rank in zip(step.spans, step.ranks, strict=True):
        for first in range(start, end, TILE_ROWS):
            total += _tile(site, min(TILE_ROWS, end - first), rank, planes, item)
    return total


def _tile(site: SiteShape, rows: int, rank: int, planes: int, item: int) -> Traffic:
    stacked, outputs = rank * len(site.outputs), sum(site.outputs)
    return Traffic(
        a=stacked * site.width * item,
        x=_blocks(stacked, BLOCK_J) * rows * site.width * item,
        # The product, and before it what each chunk of K adds to it.
        h_written=(1 + planes) * rows * stacked * FLOAT32,
        b=rank * outputs * item,
        h_read=(
            planes * rows * stacked + sum(_blocks(n, BLOCK_N) for n in site.outputs) * rows * rank
        )
        * FLOAT32,
        y=rows * outputs * item,
    )


def adapter_bytes(layer: Sequence[SiteShape], ranks: Sequence[int], item: int = 2) -> int:
    """Weights of all adapters of a step at one layer, each once."""
    per_rank = sum(len(site.outputs) * site.width + sum(site.outputs) for site in layer)
    return sum(ranks) * per_rank * item


@dataclass(frozen=True)
class Machine:
    """What this GPU reaches with plain copies and plain matrix products."""

    bytes_per_second: float
    flops_per_second: float


def floor_seconds(
    layer: Sequence[SiteShape], step: Step, machine: Machine, *, fused: bool, item: int = 2
) -> float:
    """Of one layer's adapters: their weights once, and unless `fused` x, and y read and written."""
    moved = adapter_bytes(layer, sorted_ranks(step), item)
    if not fused:
        moved += step.rows * sum(site.width + 2 * sum(site.outputs) for site in layer) * item
    return max(moved / machine.bytes_per_second, flops(layer, step) / machine.flops_per_second)


def sorted_ranks(step: Step) -> list[int]:
    """Of the adapters that have a row."""
    rows = [end - start for _, start, end in step.spans]
    return sorted(rank for rank, count in zip(step.ranks, rows, strict=True) if count)


def flops(layer: Sequence[SiteShape], step: Step) -> int:
    """Of one layer's adapters."""
    ranked = sum(
        rank * (end - start) for rank, (_, start, end) in zip(step.ranks, step.spans, strict=True)
    )
    per_rank = sum(len(site.outputs) * site.width + sum(site.outputs) for site in layer)
    return 2 * ranked * per_rank


def _blocks(length: int, block: int) -> int:
    return -(-length // block)
