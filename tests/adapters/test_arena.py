"""The arena's allocator: exact, disjoint, rejoining, and nearly without waste."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from deltamux.adapters.arena import ArenaAllocator


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


@pytest.mark.parametrize("seed", [0, 1])
def test_thousands_of_random_adapters_leave_little_waste(seed: int) -> None:
    """Fill; then evict at random until the next one fits, 3,000 times: how full is it when not?"""
    rng = random.Random(seed)
    arena = ArenaAllocator(64 * 200_000, alignment=64)
    live: list[list[tuple[int, int]]] = []
    used_at_misses: list[float] = []
    for _ in range(3_000):
        rank = rng.choice([4, 8, 16, 32, 64])
        sizes = [rank * width for width in (192, 64, 64, 128, 512, 512) * 2]
        while (adapter := _place(arena, sizes)) is None:
            used_at_misses.append(arena.used / arena.capacity)
            for offset, size in live.pop(rng.randrange(len(live))):
                arena.free(offset, size)
        live.append(adapter)
    _assert_disjoint(live)
    assert sum(used_at_misses) / len(used_at_misses) > 0.95
    assert min(used_at_misses) > 0.85


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
