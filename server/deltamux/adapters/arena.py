"""Extents of a flat arena: best fit, exact sizes, neighbours rejoined when they are freed."""

from __future__ import annotations

from bisect import bisect_left, insort


class ArenaAllocator:
    """Hands out [offset, offset + size) ranges of `capacity` elements; it holds no memory itself.

    Sizes and offsets are multiples of `alignment`, the only padding there is.
    A caller may ask for an offset that is a multiple of more; what lies before it stays free.
    """

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

    def allocate(self, size: int, multiple: int = 1) -> int | None:
        """Offset, divisible by `multiple`, of the smallest free range that holds `size` elements.

        `size` > 0; `multiple` is a multiple of the alignment, or 1. None if no range will do.
        """
        size = self.aligned(size)
        for free, start in self._by_size[bisect_left(self._by_size, (size, 0)) :]:
            offset = -(-start // multiple) * multiple
            if offset + size <= start + free:
                self._take(start, free, offset, size)
                return offset
        return None

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

    def _take(self, start: int, free: int, offset: int, size: int) -> None:
        self._remove(start, free)
        if offset > start:
            self._insert(start, offset - start)
        if start + free > offset + size:
            self._insert(offset + size, start + free - offset - size)
        self.used += size

    def _insert(self, offset: int, size: int) -> None:
        insort(self._by_size, (size, offset))
        self._size_at[offset] = size
        self._offset_ending_at[offset + size] = offset

    def _remove(self, offset: int, size: int) -> None:
        del self._by_size[bisect_left(self._by_size, (size, offset))]
        del self._size_at[offset]
        del self._offset_ending_at[offset + size]
