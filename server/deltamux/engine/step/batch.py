"""Turns the sequences of one step into packed arrays, and these into tensors."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamux.engine.sequence import Scheduled, Sequence
from deltamux.engine.step.last_draw import NOTHING_DRAWN, LastDraw
from deltamux.engine.step.shares import Shares
from deltamux.engine.transfer import Array, Upload
from deltamux_kernels import AttentionBatch, Segments


@dataclass(frozen=True)
class PooledRows:
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
class StepInputs:
    """What the forward pass of a step reads on the device."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T]
    slot_mapping: Tensor  # int64 [T]
    attention: AttentionBatch
    sampled_rows: Tensor  # int64 [S]
    # Of the T rows, and of the S rows.
    token_segments: Segments
    sampled_segments: Segments


@dataclass(frozen=True, eq=False)
class StepBatch:
    """The rows of one step, all sequences end to end, ordered by adapter slot, the base's last.

    T rows of B sequences, S of which are the last of one that samples. A place is that of a
    sequence among those that yield something, as scheduled. `AttentionBatch` says what the arrays
    of attention are.
    """

    # int64 [T]; -1 - j for the virtual token j of the row's adapter, 0 for what is still to come.
    input_ids: Array
    position_ids: Array  # int64 [T]
    slot_mapping: Array  # int64 [T], place of each row in the flattened KV cache
    query_starts: Array  # int32 [B + 1]
    seq_lens: Array  # int32 [B]
    block_tables: Array  # int32 [B, M]
    sampled_rows: Array  # int64 [S]
    # int64 [2, P]: rows whose ids are still to come, and where these are among those last drawn.
    awaiting: Array
    last: LastDraw
    query_lens: tuple[int, ...]
    # Of the T rows, and of the S rows.
    token_segments: Segments
    sampled_segments: Segments
    # Shares of the S rows, and the place of each.
    sampled: tuple[Scheduled, ...]
    sampled_places: tuple[int, ...]
    # Sequences whose hidden states are wanted.
    pooled: tuple[PooledRows, ...]

    @classmethod
    def build(
        cls,
        scheduled: Items[Scheduled],
        block_size: int,
        device: torch.device,
        last: LastDraw = NOTHING_DRAWN,
    ) -> StepBatch:
        """Every sequence has blocks for the tokens that are scheduled of it.

        Those that the host does not know yet are in `last`.
        """
        shares = Shares.of(scheduled)
        token_ids, awaiting = shares.token_ids()
        tables, samples = shares.block_tables(block_size), shares.samples
        token_segments, sampled_segments = shares.segments(device)
        return cls(
            input_ids=token_ids,
            position_ids=shares.positions(),
            slot_mapping=shares.slot_mapping(tables, block_size),
            query_starts=shares.query_starts(),
            seq_lens=shares.contexts.astype(np.int32),
            block_tables=tables,
            sampled_rows=shares.ends[samples] - 1,
            awaiting=_awaiting(shares, awaiting, last),
            last=last,
            query_lens=tuple(shares.lengths.tolist()),
            token_segments=token_segments,
            sampled_segments=sampled_segments,
            sampled=tuple([shares.items[number] for number in samples.tolist()]),
            sampled_places=tuple(shares.places[samples].tolist()),
            pooled=_pooled(shares),
        )

    def send(self, upload: Upload) -> StepInputs:
        """Queues the one copy to the device."""
        arrays = [
            self.input_ids,
            self.position_ids,
            self.slot_mapping,
            self.query_starts,
            self.seq_lens,
            self.block_tables,
            self.sampled_rows,
        ]
        if self.awaiting.size:
            arrays.append(self.awaiting)
        sent = upload.send(arrays)
        ids, positions, slot_mapping, query_starts, seq_lens, block_tables, rows = sent[:7]
        for awaiting in sent[7:]:
            self.last.fill_in(ids, awaiting)
        attention = AttentionBatch(
            query_lens=self.query_lens,
            context_lens=tuple(self.seq_lens.tolist()),
            query_starts=query_starts,
            seq_lens=seq_lens,
            block_tables=block_tables,
        )
        return StepInputs(
            input_ids=ids[None],
            position_ids=positions[None],
            slot_mapping=slot_mapping,
            attention=attention,
            sampled_rows=rows,
            token_segments=self.token_segments,
            sampled_segments=self.sampled_segments,
        )


def _awaiting(shares: Shares, numbers: list[int], last: LastDraw) -> Array:
    places = last.places_of([shares.sequences[number] for number in numbers])
    return np.array([shares.starts[numbers], places], dtype=np.int64)


def _pooled(shares: Shares) -> tuple[PooledRows, ...]:
    pooled = []
    for number in shares.pooled.tolist():
        item, row = shares.items[number], int(shares.starts[number])
        place = int(shares.places[number]) if shares.places[number] >= 0 else None
        first = item.first - item.sequence.virtual.tokens
        start, end = row + max(-first, 0), row + item.num_tokens
        if start < end:
            pooled.append(PooledRows(item.sequence, max(first, 0), start, end, place))
    return tuple(pooled)
