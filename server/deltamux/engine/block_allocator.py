"""Which blocks of the KV cache are free, and how many sequences hold each of the others."""

from __future__ import annotations

from collections.abc import Iterable


class BlockAllocator:
    """Hands out the ids 1 .. num_blocks - 1; block 0 is kept for padding rows."""

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        # The block freed last is handed out first: it is the likeliest to be in a cache.
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_total(self) -> int:
        """Blocks that can be handed out."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has looked at `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each of `blocks`."""
        for block in blocks:
            self._check_held(block)
            self._references[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Gives back one reference to each of `blocks`."""
        for block in blocks:
            self._check_held(block)
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)

    def _check_held(self, block: int) -> None:
        if not self._references[block]:
            raise ValueError(f"block {block} is not held")
