"""The blocks of the KV cache: which are free, who holds the others, which content can be reused."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockAllocator:
    """Hands out the ids 1 .. num_blocks - 1; block 0 is kept for padding rows.

    A block with complete content may be published under a key, and is found by it until it is
    handed out again, even while nobody holds it. Free blocks are handed out in this order: those
    without a key, the one freed last first; then those with one, the one freed first first.
    """

    def __init__(self, num_blocks: int) -> None:
        self._references = [0] * num_blocks
        # In the order in which they are handed out.
        self._free = OrderedDict.fromkeys(range(1, num_blocks))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_total(self) -> int:
        """Blocks that can be handed out."""
        return len(self._references) - 1

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds; some of them may have content that can be reused."""
        return len(self._free)

    def is_held(self, block: int) -> bool:
        return self._references[block] > 0

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; the caller has looked at `num_free`."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        self.withdraw(blocks)
        for block in blocks:
            self._references[block] = 1
        return blocks

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks published under `keys`, as far as there is one for each."""
        blocks = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Takes one more reference to each of `blocks`: held by somebody, or just matched."""
        for block in blocks:
            if block not in self._key_of:
                self._check_held(block)
            self._free.pop(block, None)
            self._references[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Gives back one reference to each: a sequence's last block is the first to be reused."""
        for block in reversed(blocks):
            self._check_held(block)
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                self._free.move_to_end(block, last=block in self._key_of)

    def publish(self, block: int, key: bytes) -> None:
        """Lets the content of a held block be found; nothing changes if `key` finds one already."""
        self._check_held(block)
        if key not in self._block_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def withdraw(self, blocks: Iterable[int]) -> None:
        """Lets nobody find the content of `blocks` any more."""
        for block in blocks:
            key = self._key_of.pop(block, None)
            if key is not None:
                del self._block_of[key]

    def _check_held(self, block: int) -> None:
        if not self._references[block]:
            raise ValueError(f"block {block} is not held")
