"""Turns the sequences of one step into packed tensors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.transfer import Array, Upload
from deltamux_kernels import AttentionBatch, Segments


@dataclass(frozen=True)
class Pooling:
    """The rows [start, end) of a sequence whose hidden states are wanted, not tokens.

    They are those of its tokens number `first` and on; virtual tokens are left out.
    """

    sequence: Sequence
    first: int
    start: int
    end: int
    # None while more of the prompt is to come.
    place: int | None


@dataclass(frozen=True)
class StepBatch:
    """The rows of one step, all sequences end to end, ordered by adapter slot, the base's last.

    T rows in all, S of which are the last of a sequence that samples. A place is that of a
    sequence among those that yield something, as scheduled.
    """

    input_ids: Tensor  # int64 [1, T]; -1 - j for the virtual token j of the row's adapter
    position_ids: Tensor  # int64 [1, T]
    slot_mapping: Tensor  # int64 [T], place of each row in the flattened KV cache
    attention: AttentionBatch
    sampled_rows: Tensor  # int64 [S]
    # Of the T rows, and of the S rows.
    token_segments: Segments
    sampled_segments: Segments
    # Sequences of the S rows, and the place of each.
    sampled: tuple[Sequence, ...]
    sampled_places: tuple[int, ...]
    # Sequences whose hidden states are wanted.
    pooled: tuple[Pooling, ...]

    @classmethod
    def build(cls, scheduled: Items[Scheduled], block_size: int, upload: Upload) -> StepBatch:
        """Every sequence has blocks for the tokens that are scheduled of it."""
        order = _by_slot(scheduled)
        items = [scheduled[place] for place in order]
        places = _places(scheduled, order)
        samples = [number for number in places if items[number].sequence.pooling is None]
        lengths = np.array([item.num_tokens for item in items])
        computed = np.array([item.sequence.num_computed for item in items])
        ends, contexts = lengths.cumsum(), computed + lengths
        starts = ends - lengths
        reached = np.arange(ends[-1]) + np.repeat(computed - starts, lengths)
        uncounted = np.array([item.sequence.traits.virtual.uncounted for item in items])
        tables = _block_tables(items, contexts, block_size)
        ids, positions, slots, sampled_rows, query_starts, seq_lens, block_tables = upload.send(
            [
                _token_ids(items),
                reached - np.repeat(uncounted, lengths),
                _slot_mapping(tables, reached, lengths, block_size),
                ends[samples] - 1,
                np.append(0, ends).astype(np.int32),
                contexts.astype(np.int32),
                tables,
            ]
        )
        adapted = _adapted(items)
        return cls(
            input_ids=ids[None],
            position_ids=positions[None],
            slot_mapping=slots,
            attention=AttentionBatch(
                query_lens=tuple(lengths.tolist()),
                context_lens=tuple(contexts.tolist()),
                query_starts=query_starts,
                seq_lens=seq_lens,
                block_tables=block_tables,
            ),
            sampled_rows=sampled_rows,
            token_segments=_segments(adapted, starts.tolist(), upload.device),
            sampled_segments=_sampled_segments(adapted, items, samples, upload.device),
            sampled=tuple(items[number].sequence for number in samples),
            sampled_places=tuple(places[number] for number in samples),
            pooled=_pooled(items, starts.tolist(), places),
        )


def _by_slot(scheduled: Items[Scheduled]) -> list[int]:
    """The places of the schedule in the order of its slots, the base's last."""
    slots = [item.sequence.slot for item in scheduled]
    keys = [sys.maxsize if slot is None else slot for slot in slots]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _places(scheduled: Items[Scheduled], order: list[int]) -> dict[int, int]:
    """Of each item that yields, by its number in `order`."""
    yields = [item.yields for item in scheduled]
    places = list(accumulate(yields, initial=0))
    return {number: places[place] for number, place in enumerate(order) if yields[place]}


def _pooled(
    items: list[Scheduled], starts: list[int], places: dict[int, int]
) -> tuple[Pooling, ...]:
    pooled = []
    for number in [n for n, item in enumerate(items) if item.sequence.pooling is not None]:
        item = items[number]
        first = item.sequence.num_computed - item.sequence.virtual.tokens
        start, end = starts[number] + max(-first, 0), starts[number] + item.num_tokens
        if start < end:
            place = places.get(number)
            pooled.append(Pooling(item.sequence, max(first, 0), start, end, place))
    return tuple(pooled)


def _token_ids(items: list[Scheduled]) -> Array:
    token_ids: list[int] = []
    for item in items:
        token_ids += item.sequence.ids(item.sequence.num_computed, item.num_tokens)
    return np.array(token_ids, dtype=np.int64)


def _block_tables(items: list[Scheduled], context_lens: Array, block_size: int) -> Array:
    """int32 [B, M]: the blocks of each sequence as far as its context reaches, then block 0."""
    widths = -(-context_lens // block_size)
    tables = np.zeros((len(items), widths.max()), dtype=np.int32)
    for table, item, width in zip(tables, items, widths.tolist(), strict=True):
        table[:width] = item.sequence.blocks[:width]
    return tables


def _slot_mapping(tables: Array, reached: Array, lengths: Array, block_size: int) -> Array:
    """`reached` [T]: the place of each row in its own sequence."""
    sequence_of_row = np.repeat(np.arange(len(lengths)), lengths)
    blocks: Array = tables[sequence_of_row, reached // block_size].astype(np.int64)
    places: Array = blocks * block_size + reached % block_size
    return places


# By an item's number: its slot, and which of its tokens the adapter there computes.
_Adapted = Mapping[int, tuple[int, range]]


def _adapted(items: list[Scheduled]) -> _Adapted:
    """Of those that have such tokens in this step."""
    return {
        number: (slot, own)
        for number, item in enumerate(items)
        if (slot := item.sequence.slot) is not None and (own := item.adapted)
    }


def _segments(adapted: _Adapted, starts: list[int], device: torch.device) -> Segments:
    """Of rows end to end, those of each item from its start on."""
    spans = [
        (slot, starts[number] + own.start, starts[number] + own.stop)
        for number, (slot, own) in adapted.items()
    ]
    return Segments.build(spans, device)


def _sampled_segments(
    adapted: _Adapted, items: list[Scheduled], samples: list[int], device: torch.device
) -> Segments:
    """Each sequence that samples has one row: that of its last token."""
    spans = [
        (adapted[number][0], row, row + 1)
        for row, number in enumerate(samples)
        if number in adapted and adapted[number][1].stop == items[number].num_tokens
    ]
    return Segments.build(spans, device)
