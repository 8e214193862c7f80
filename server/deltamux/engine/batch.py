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
class StepBatch:
    """The rows of one step, all sequences end to end, ordered by adapter slot, the base's last.

    T rows in all, S of which are the last of a sequence that samples.
    """

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]
    slot_mapping: Tensor  # int64 [T], place of each row in the flattened KV cache
    attention: AttentionBatch
    sampled_rows: Tensor  # int64 [S]
    # Of the T rows, and of the S rows.
    token_segments: Segments
    sampled_segments: Segments
    # Sequences of the S rows, and the place of each among those that sample as scheduled.
    sampled: tuple[Sequence, ...]
    sampled_places: tuple[int, ...]

    @classmethod
    def build(cls, scheduled: Items[Scheduled], block_size: int, device: torch.device) -> StepBatch:
        """Every sequence has blocks for the tokens that are scheduled of it."""
        order = sorted(range(len(scheduled)), key=lambda place: _slot_order(scheduled[place]))
        items = [scheduled[place] for place in order]
        lengths = np.array([item.num_tokens for item in items])
        computed = np.array([item.sequence.num_computed for item in items])
        ends = lengths.cumsum()
        starts = ends - lengths
        positions = np.arange(ends[-1]) + np.repeat(computed - starts, lengths)
        tables = _block_tables(items, computed + lengths, block_size)
        place_of_sampled = _places_of_sampled(scheduled)
        samples = [number for number, item in enumerate(items) if item.samples]
        return cls(
            input_ids=to_device(_token_ids(items), device)[None],
            position_ids=to_device(positions, device)[None],
            slot_mapping=to_device(_slot_mapping(tables, positions, lengths, block_size), device),
            attention=_attention_batch(lengths, computed + lengths, tables, device),
            sampled_rows=to_device(ends[samples] - 1, device),
            token_segments=_segments(items, starts.tolist(), ends.tolist(), device),
            sampled_segments=_sampled_segments([items[number] for number in samples], device),
            sampled=tuple(items[number].sequence for number in samples),
            sampled_places=tuple(place_of_sampled[order[number]] for number in samples),
        )


def _slot_order(item: Scheduled) -> tuple[bool, int]:
    slot = item.sequence.slot
    return (True, 0) if slot is None else (False, slot)


def _places_of_sampled(scheduled: Items[Scheduled]) -> dict[int, int]:
    sampling = [place for place, item in enumerate(scheduled) if item.samples]
    return {place: number for number, place in enumerate(sampling)}


def _token_ids(items: list[Scheduled]) -> Array:
    token_ids: list[int] = []
    for item in items:
        first = item.sequence.num_computed
        token_ids += item.sequence.tokens[first : first + item.num_tokens]
    return np.array(token_ids, dtype=np.int64)


def _block_tables(items: list[Scheduled], context_lens: Array, block_size: int) -> Array:
    """int32 [B, M]: the blocks of each sequence as far as its context reaches, then block 0."""
    widths = -(-context_lens // block_size)
    tables = np.zeros((len(items), widths.max()), dtype=np.int32)
    for table, item, width in zip(tables, items, widths.tolist(), strict=True):
        table[:width] = item.sequence.blocks[:width]
    return tables


def _slot_mapping(tables: Array, positions: Array, lengths: Array, block_size: int) -> Array:
    sequence_of_row = np.repeat(np.arange(len(lengths)), lengths)
    blocks: Array = tables[sequence_of_row, positions // block_size].astype(np.int64)
    places: Array = blocks * block_size + positions % block_size
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


def _segments(
    items: list[Scheduled], starts: list[int], ends: list[int], device: torch.device
) -> Segments:
    spans = [
        (item.sequence.slot, start, end)
        for item, start, end in zip(items, starts, ends, strict=True)
        if item.sequence.slot is not None
    ]
    return Segments.build(spans, device)


def _sampled_segments(items: list[Scheduled], device: torch.device) -> Segments:
    """Each sequence that samples has one row."""
    rows = range(len(items))
    return _segments(items, list(rows), [row + 1 for row in rows], device)
