"""Which blocks each sequence holds: those whose content was found, and new ones."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Items
from typing import Protocol

from deltamux.engine.kv.block_allocator import BlockAllocator
from deltamux.engine.kv.block_keys import block_key
from deltamux.engine.sequence import Sequence


class Prefixes(Protocol):
    """Where the keys and values come from that adapters bring."""

    def fill(self, slot: int, blocks: Items[int], first: int) -> None:
        """Writes the virtual tokens from number `first` on to their places in `blocks`."""
        ...


class BlockManager:
    """A sequence that runs holds blocks for all its places; one that waits holds none."""

    def __init__(self, allocator: BlockAllocator, block_size: int, prefixes: Prefixes) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self._prefixes = prefixes
        # Tokens of admitted prompts, and those of them whose blocks were found.
        self.prefix_queries = 0
        self.prefix_hits = 0

    @property
    def num_total(self) -> int:
        return self._allocator.num_total

    @property
    def num_used(self) -> int:
        """Blocks that some sequence holds."""
        return self._allocator.num_total - self._allocator.num_free

    def fits(self, sequence: Sequence, reserve: int) -> bool:
        """Whether a waiting sequence can have its blocks, and leave `reserve` free ones."""
        held = sum(map(self._allocator.is_held, self._found(sequence)))
        return self._num_blocks(sequence) - held + reserve <= self._allocator.num_free

    def start(self, sequence: Sequence) -> None:
        """Gives a sequence that fits its blocks; what they already hold counts as computed."""
        found = self._found(sequence)
        self._allocator.share(found)
        missing = self._num_blocks(sequence) - len(found)
        sequence.blocks = array("i", found + self._allocator.allocate(missing))
        sequence.num_computed = len(found) * self._block_size
        if sequence.admitted is None:
            self._count(sequence)
        self._preload(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Gives a running sequence the blocks that its newest places need; False: too few free."""
        if sequence.num_places <= len(sequence.blocks) * self._block_size:
            return True
        if not self.can_grow([sequence]):
            return False
        sequence.blocks.extend(self._allocator.allocate(self._num_missing(sequence)))
        return True

    def can_grow(self, sequences: Iterable[Sequence]) -> bool:
        """Whether there are blocks for the newest places of all these running sequences."""
        return sum(map(self._num_missing, sequences)) <= self._allocator.num_free

    def complete(self, sequence: Sequence, count: int) -> None:
        """Its next `count` places have their keys and values: full blocks can be shared."""
        first = sequence.num_computed // self._block_size
        sequence.num_computed += count
        for index in range(first, sequence.num_computed // self._block_size):
            key = block_key(sequence, index, self._block_size)
            self._allocator.publish(sequence.blocks[index], key)

    def has_prompt(self, leader: Sequence) -> bool:
        """Whether it has computed all the blocks of its prompt that others can share."""
        prompt = leader.virtual.tokens + leader.num_prompt
        return leader.num_computed >= self._num_reusable(prompt) * self._block_size

    def distrust(self, sequence: Sequence) -> None:
        """Keeps what a running sequence has computed from all who come later."""
        self._allocator.withdraw(sequence.blocks)

    def release(self, sequence: Sequence) -> None:
        """Takes the blocks back; their content can be found as long as nobody else needs them."""
        self._allocator.free(sequence.blocks)
        sequence.blocks = array("i")
        sequence.num_computed = 0

    def _found(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold what the sequence begins with."""
        if sequence.pooling is not None:
            # The hidden states of all its tokens are wanted, and no block holds those.
            return []
        indices = range(self._num_reusable(sequence.num_places))
        return self._allocator.match(block_key(sequence, i, self._block_size) for i in indices)

    def _num_reusable(self, num_places: int) -> int:
        # The last place is always computed: its logits yield the next token.
        return (num_places - 1) // self._block_size

    def _count(self, sequence: Sequence) -> None:
        """Once a sequence; a request counts its first choice alone."""
        sequence.num_cached = max(0, sequence.num_computed - sequence.virtual.tokens)
        if sequence.leader is None:
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_cached

    def _preload(self, sequence: Sequence) -> None:
        """Fills the places whose keys and values the adapter brings, unless they were found."""
        missing = sequence.virtual.tokens - sequence.num_computed
        if missing > 0 and not sequence.virtual.computed:
            assert sequence.slot is not None
            self._prefixes.fill(sequence.slot, sequence.blocks, sequence.num_computed)
            self.complete(sequence, missing)

    def _num_missing(self, sequence: Sequence) -> int:
        return self._num_blocks(sequence) - len(sequence.blocks)

    def _num_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_places // self._block_size)
