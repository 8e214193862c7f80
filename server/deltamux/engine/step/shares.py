"""The shares of one step as arrays: end to end, ordered by adapter slot, the base's last."""

from __future__ import annotations

import sys
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.transfer import Array
from deltamux_kernels import Segments

# Stands for no slot, and comes behind all others.
_BASE = sys.maxsize


@dataclass(frozen=True, eq=False)
class Shares:
    """B shares, T rows in all. Arrays are int64 [B] where nothing else is said."""

    items: list[Scheduled]
    sequences: list[Sequence]
    slots: Array
    # Rank among those that yield, as scheduled; -1 where a share does not.
    places: Array
    lengths: Array
    # Places of the sequences that were computed before, and with this step.
    computed: Array
    contexts: Array
    # Rows.
    starts: Array
    ends: Array
    # Numbers of the shares that sample [S], and of those that are to be pooled.
    samples: Array
    pooled: Array

    @classmethod
    def of(cls, scheduled: Items[Scheduled]) -> Shares:
        slots = np.array([_slot(item.sequence) for item in scheduled])
        yields = np.array([item.yields for item in scheduled])
        order = slots.argsort(stable=True)
        places = np.where(yields, yields.cumsum() - 1, -1)[order]
        items = [scheduled[number] for number in order.tolist()]
        sequences = [item.sequence for item in items]
        lengths = np.array([item.num_tokens for item in items])
        computed = np.array([item.first for item in items])
        pooled = np.array([sequence.pooling is not None for sequence in sequences])
        ends = lengths.cumsum()
        return cls(
            items,
            sequences,
            slots[order],
            places,
            lengths,
            computed,
            computed + lengths,
            ends - lengths,
            ends,
            samples=((places >= 0) & ~pooled).nonzero()[0],
            pooled=pooled.nonzero()[0],
        )

    @cached_property
    def owners(self) -> Array:
        """Of each row [T], the number of its share."""
        return np.repeat(np.arange(len(self.items)), self.lengths)

    @cached_property
    def reached(self) -> Array:
        """Of each row [T], its place in its own sequence."""
        before: Array = (self.computed - self.starts)[self.owners]
        return before + np.arange(len(before))

    def token_ids(self) -> tuple[Array, list[int]]:
        """[T]; -1 - j for virtual token j, and 0 for a token that is still to come.

        Also the numbers of the shares whose only token is such a one.
        """
        token_ids: list[int] = []
        awaiting = []
        for number, item in enumerate(self.items):
            known = item.sequence.ids(item.first, item.num_tokens)
            if not known:
                awaiting.append(number)
            token_ids += known or (0,)
        return np.array(token_ids), awaiting

    def positions(self) -> Array:
        """[T]: places, without the virtual tokens that do not count."""
        uncounted = np.array([s.traits.virtual.uncounted for s in self.sequences])
        positions: Array = self.reached - uncounted[self.owners]
        return positions

    def block_tables(self, block_size: int) -> Array:
        """int32 [B, M]: the blocks of each sequence as far as its context reaches, then block 0."""
        held = np.array([len(sequence.blocks) for sequence in self.sequences])
        columns = np.arange(held.max())
        tables = np.zeros((len(held), len(columns)), dtype=np.int32)
        blocks = b"".join([sequence.blocks for sequence in self.sequences])
        tables[columns < held[:, None]] = np.frombuffer(blocks, dtype=np.int32)
        widths = -(-self.contexts // block_size)
        # Blocks that were taken ahead are no part of it yet.
        tables[columns >= widths[:, None]] = 0
        return np.ascontiguousarray(tables[:, : widths.max()])

    def slot_mapping(self, tables: Array, block_size: int) -> Array:
        """[T]: the place of each row in the flattened cache."""
        columns, offsets = np.divmod(self.reached, block_size)
        blocks: Array = tables[self.owners, columns].astype(np.int64)
        return blocks * block_size + offsets

    def query_starts(self) -> Array:
        """int32 [B + 1]."""
        return np.append(0, self.ends).astype(np.int32)

    def segments(self, device: torch.device) -> tuple[Segments, Segments]:
        """Of the T rows, and of the S rows of those that sample: each has its last token's."""
        firsts = np.array([sequence.adapter_from for sequence in self.sequences]) - self.computed
        behind = np.array([sequence.adapter_until for sequence in self.sequences]) - self.computed
        # The adapter computes the tokens firsts <= number < behind of its share.
        firsts, behind = np.maximum(firsts, 0), np.minimum(behind, self.lengths)
        slots = np.where(firsts < behind, self.slots, _BASE)
        tokens = _segments(slots, self.starts + firsts, self.starts + behind, device)
        rows = np.arange(len(self.samples))
        if len(rows) == self.ends[-1]:
            return tokens, tokens  # all sample their only row
        last = np.where(behind == self.lengths, slots, _BASE)[self.samples]
        return tokens, _segments(last, rows, rows + 1, device)


def _slot(sequence: Sequence) -> int:
    return _BASE if sequence.slot is None else sequence.slot


def _segments(slots: Array, starts: Array, ends: Array, device: torch.device) -> Segments:
    taken = slots != _BASE
    spans = zip(slots[taken].tolist(), starts[taken].tolist(), ends[taken].tolist(), strict=True)
    return Segments.build(tuple(spans), device)
