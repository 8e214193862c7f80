"""Extents of a flat arena: best fit, exact sizes, neighbours rejoined when they are freed."""

from __future__ import annotations

from bisect import bisect_left, insort


class ArenaAllocator:
    """Hands out [offset, offset + size) ranges of `capacity` elements; it holds no memory itself.

    Sizes and offsets are multiples of `alignment`, the only padding there is."""

    def __init__(self, capacity: int, alignment: int = 1) -> None:
        self.capacity = capacity // alignment * alignment
        self.used = 0
        self._alignment = alignment
        # Free ranges by (size, offset) for the best fit, and by either end for rejoining.
        self._by_size: list[tuple[int, int]] = []
        self._size_at: dict[int, int] = {}
        self._offset_ending_at: dict[int, int] = {}
        if self.capacity:
            self._insert(0, self.capacity)

    def aligned(self, size: int) -> int:
        """Elements that an extent of `size` elements takes."""
        return -(-size // self._alignment) * self._alignment

    def allocate(self, size: int) -> int | None:
        """Offset of the smallest free range that holds `size` > 0 elements; None if none does."""
        size = self.aligned(size)
        place = bisect_left(self._by_size, (size, 0))
        if place == len(self._by_size):
            return None
        free, offset = self._by_size[place]
        self._remove(offset, free)
        if free > size:
            self._insert(offset + size, free - size)
        self.used += size
        return offset

    def free(self, offset: int, size: int) -> None:
        """Gives back an extent that `allocate(size)` placed at `offset`."""
        size = self.aligned(size)
        self.used -= size
        if (before := self._offset_ending_at.get(offset)) is not None:
            self._remove(before, offset - before)
            offset, size = before, size + offset - before
        if (after := self._size_at.get(offset + size)) is not None:
            self._remove(offset + size, after)
            size += after
        self._insert(offset, size)

    def _insert(self, offset: int, size: int) -> None:
        insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._offset_ending_at[offset + size] = offset

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._size_at[offset]
        del self._offset_ending_at[offset + size]
