"""Turns the sequences of one step into packed tensors."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.transfer import to_device
from deltamux_kernels import AttentionBatch, Segments

Array = np.ndarray[Any, Any]


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
    def build(cls, scheduled: Items[Scheduled], block_size: int, device: torch.device) -> StepBatch:
        """Every sequence has blocks for the tokens that are scheduled of it."""
        order = sorted(range(len(scheduled)), key=lambda place: _slot_order(scheduled[place]))
        items = [scheduled[place] for place in order]
        lengths = np.array([item.num_tokens for item in items])
        computed = np.array([item.sequence.num_computed for item in items])
        ends = lengths.cumsum()
        starts = ends - lengths
        reached = np.arange(ends[-1]) + np.repeat(computed - starts, lengths)
        uncounted = np.array([item.sequence.virtual.uncounted for item in items])
        tables = _block_tables(items, computed + lengths, block_size)
        places = _places(scheduled, order)
        samples = [number for number, item in enumerate(items) if _samples(item)]
        return cls(
            input_ids=to_device(_token_ids(items), device)[None],
            position_ids=to_device(reached - np.repeat(uncounted, lengths), device)[None],
            slot_mapping=to_device(_slot_mapping(tables, reached, lengths, block_size), device),
            attention=_attention_batch(lengths, computed + lengths, tables, device),
            sampled_rows=to_device(ends[samples] - 1, device),
            token_segments=_segments(items, starts.tolist(), device),
            sampled_segments=_sampled_segments([items[number] for number in samples], device),
            sampled=tuple(items[number].sequence for number in samples),
            sampled_places=tuple(places[number] for number in samples),
            pooled=_pooled(items, starts.tolist(), places),
        )


def _slot_order(item: Scheduled) -> tuple[bool, int]:
    slot = item.sequence.slot
    return (True, 0) if slot is None else (False, slot)


def _samples(item: Scheduled) -> bool:
    return item.yields and item.sequence.pooling is None


def _places(scheduled: Items[Scheduled], order: list[int]) -> dict[int, int]:
    """Of each item that yields, by its number in `order`."""
    yielding = [place for place, item in enumerate(scheduled) if item.yields]
    numbers = {place: number for number, place in enumerate(order)}
    return {numbers[place]: rank for rank, place in enumerate(yielding)}


def _pooled(
    items: list[Scheduled], starts: list[int], places: dict[int, int]
) -> tuple[Pooling, ...]:
    pooled = []
    for number, item in enumerate(items):
        if item.sequence.pooling is None:
            continue
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


def _attention_batch(
    lengths: Array, context_lens: Array, tables: Array, device: torch.device
) -> AttentionBatch:
    return AttentionBatch(
        query_lens=tuple(lengths.tolist()),
        context_lens=tuple(context_lens.tolist()),
        query_starts=to_device(np.append(0, lengths.cumsum()).astype(np.int32), device),
        seq_lens=to_device(context_lens.astype(np.int32), device),
        block_tables=to_device(tables, device),
    )


def _segments(items: list[Scheduled], starts: list[int], device: torch.device) -> Segments:
    """Of rows end to end, those of each item from its start on."""
    spans = [
        (item.sequence.slot, start + adapted.start, start + adapted.stop)
        for item, start in zip(items, starts, strict=True)
        if item.sequence.slot is not None and (adapted := item.adapted)
    ]
    return Segments.build(spans, device)


def _sampled_segments(items: list[Scheduled], device: torch.device) -> Segments:
    """Each sequence that samples has one row: that of its last token."""
    spans = [
        (item.sequence.slot, row, row + 1)
        for row, item in enumerate(items)
        if item.sequence.slot is not None and item.num_tokens - 1 in item.adapted
    ]
    return Segments.build(spans, device)
