"""The layer that is measured, and the steps that it is measured with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LAYERS = 32


@dataclass(frozen=True)
class SiteShape:
    """Layers of the base that read one input."""

    name: str
    width: int
    outputs: tuple[int, ...]
    head: int = 128  # features of a head, at q, k and v


# Llama-3.1-8B.
LLAMA = (
    SiteShape("qkv", 4096, (4096, 1024, 1024)),
    SiteShape("o", 4096, (4096,)),
    SiteShape("gate_up", 4096, (14336, 14336)),
    SiteShape("down", 14336, (4096,)),
)
# Small enough for the interpreter, with widths that no block divides, the last of three chunks.
TINY = (
    SiteShape("qkv", 96, (144, 48, 48), head=48),
    SiteShape("gate_up", 96, (200, 200)),
    SiteShape("down", 1160, (96,)),
)

RANKS = {"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 32, 64)}


@dataclass(frozen=True)
class Step:
    """`rows` rows, spread evenly over adapters of these ranks, a slot's rows side by side.

    The last `bare` rows have no adapter.
    """

    phase: str
    rows: int
    rank: str
    ranks: tuple[int, ...]
    bare: int = 0

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """`(slot, start, end)` of each adapter."""
        count = len(self.ranks)
        edges = [(self.rows - self.bare) * slot // count for slot in range(count + 1)]
        return [(slot, edges[slot], edges[slot + 1]) for slot in range(count)]

    @property
    def name(self) -> str:
        return f"{self.phase} T={self.rows}, {len(self.ranks)} adapters, rank {self.rank}"


def step(phase: str, rows: int, adapters: int, rank: str) -> Step:
    cycle = RANKS[rank]
    return Step(phase, rows, rank, tuple(cycle[slot % len(cycle)] for slot in range(adapters)))


def steps() -> Iterator[Step]:
    """All that are asked for, the most telling first: time may run out before the last."""
    for rank in ("16", "mixed", "8", "64"):
        for rows in (1, 8, 32, 64, 256):
            for adapters in sorted({1, min(8, rows), rows}):
                yield step("decode", rows, adapters, rank)
        for adapters in (1, 8):
            yield step("prefill", 1024, adapters, rank)
    for rank in ("16", "mixed"):
        for adapters in (1, 8):
            yield step("prefill", 8192, adapters, rank)
