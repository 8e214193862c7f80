"""The arena's allocator: exact, disjoint, rejoining, and nearly without waste."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from deltamux.adapters.sites.arena import ArenaAllocator


def test_an_extent_takes_its_size_rounded_to_the_alignment() -> None:
    arena = ArenaAllocator(1000, alignment=64)
    assert arena.capacity == 960
    assert arena.allocate(65) == 0
    assert arena.used == 128
    assert arena.allocate(1) == 128


def test_the_smallest_free_range_that_fits_is_taken() -> None:
    arena = ArenaAllocator(100)
    offsets = [arena.allocate(size) for size in (10, 5, 20, 5, 60)]
    assert offsets == [0, 10, 15, 35, 40]
    arena.free(15, 20)
    arena.free(0, 10)
    assert arena.allocate(8) == 0
    assert arena.allocate(12) == 15


def test_freed_neighbours_become_one_range() -> None:
    arena = ArenaAllocator(30)
    for _ in range(3):
        arena.allocate(10)
    for offset in (0, 20, 10):
        arena.free(offset, 10)
    assert arena.used == 0
    assert arena.allocate(30) == 0


def test_a_full_arena_says_none_and_stays_usable() -> None:
    arena = ArenaAllocator(10)
    assert arena.allocate(11) is None
    assert arena.allocate(10) == 0
    assert arena.allocate(1) is None
    arena.free(0, 10)
    assert arena.allocate(10) == 0


def test_an_arena_without_memory_refuses_everything() -> None:
    assert ArenaAllocator(0, alignment=64).allocate(1) is None


# Widths of what one layer of Llama-3.1-8B stores of an adapter, divided by 16: the A of its four
# inputs and the B of its seven outputs.
WIDTHS = (768, 256, 512, 896, 256, 64, 64, 256, 896, 896, 256)
LAYERS = 2


@pytest.mark.parametrize(
    ("evict_oldest", "mean_limit", "limit"), [(True, 0.01, 0.02), (False, 0.1, 0.3)]
)
def test_ten_thousand_random_adapters_leave_little_waste(
    evict_oldest: bool,
    mean_limit: float,
    limit: float,
    record_property: Callable[[str, object], None],
) -> None:
    """Fill; then evict until the next one of rank 1 to 256 fits: what is free when one does not?

    The server evicts the one that was not used for longest. At random is worse, and bounded too.
    """
    rng = random.Random(0)
    arena = ArenaAllocator(250_000 * WIDTHS[0], alignment=64)
    live: list[list[tuple[int, int]]] = []
    waste: list[float] = []
    for _ in range(10_000):
        rank = rng.randint(1, 256)
        sizes = [rank * width for width in WIDTHS * LAYERS]
        while (adapter := _place(arena, sizes)) is None:
            waste.append(1 - arena.used / arena.capacity)
            for offset, size in live.pop(0 if evict_oldest else rng.randrange(len(live))):
                arena.free(offset, size)
        live.append(adapter)
    _assert_disjoint(live)
    record_property("mean_waste", mean := sum(waste) / len(waste))
    record_property("most_waste", max(waste))
    assert mean < mean_limit and max(waste) < limit
    padding = sum(arena.aligned(size) - size for adapter in live for _, size in adapter)
    assert padding == 0


def _place(arena: ArenaAllocator, sizes: list[int]) -> list[tuple[int, int]] | None:
    taken: list[tuple[int, int]] = []
    for size in sizes:
        offset = arena.allocate(size)
        if offset is None:
            for place in taken:
                arena.free(*place)
            return None
        taken.append((offset, size))
    return taken


def _assert_disjoint(live: list[list[tuple[int, int]]]) -> None:
    extents = sorted(extent for adapter in live for extent in adapter)
    for (offset, size), (following, _) in pairwise(extents):
        assert offset + size <= following
