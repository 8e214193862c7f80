"""What the forward pass of a captured step reads and writes, in the same memory in every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from deltamux.adapters.sites.device_sites import DeviceSites
from deltamux.engine.step.batch import StepBatch, StepInputs
from deltamux.engine.transfer import Array, pack, spans, unpack
from deltamux_kernels import CapturedAttention, CapturedSegments, Segments, Staged

_Memory = TypeVar("_Memory", Array, Tensor)


@dataclass(frozen=True)
class StepShape:
    """How many rows a captured step has, and how many sequences share them at most.

    Where it `decodes`, these are as many, and each has one row, which is sampled. Otherwise any
    division of the rows will do: next tokens, and chunks of prompts beside them.
    """

    rows: int
    sequences: int
    decodes: bool = False

    def holds(self, step: StepBatch) -> bool:
        rows, sequences = len(step.input_ids), len(step.query_lens)
        if self.decodes and rows > len(step.sampled):
            return False
        return rows <= self.rows and sequences <= self.sequences


class _Packed(NamedTuple, Generic[_Memory]):
    """A step's integers, as they lie one behind another on the host and on the device."""

    input_ids: _Memory  # int64 [rows]
    position_ids: _Memory  # int64 [rows]
    slot_mapping: _Memory  # int64 [rows]
    sampled_rows: _Memory  # int64 [sequences]
    awaiting: _Memory  # int64 [2, sequences], as many as there are
    # One sequence more, which is nobody's.
    query_starts: _Memory  # int32 [sequences + 2]
    seq_lens: _Memory  # int32 [sequences + 1]
    # Last, as most of it is never in use: end to end, only as wide as a step's longest.
    block_tables: _Memory  # int32 [sequences * blocks]


class StepBuffers:
    """The memory that steps of all shapes share."""

    def __init__(
        self, rows: int, sequences: int, blocks: int, vocab_size: int, device: torch.device
    ) -> None:
        """For up to `rows` rows of up to `sequences` sequences of up to `blocks` blocks."""
        initial = _Packed[Array](
            input_ids=np.zeros(rows, np.int64),
            position_ids=np.zeros(rows, np.int64),
            slot_mapping=np.full(rows, -1, np.int64),
            sampled_rows=np.zeros(sequences, np.int64),
            awaiting=np.zeros((2, sequences), np.int64),
            query_starts=np.zeros(sequences + 2, np.int32),
            seq_lens=np.zeros(sequences + 1, np.int32),
            block_tables=np.zeros(sequences * blocks, np.int32),
        )
        self._before_tables = sum(spans(initial[:-1]))
        packed = np.zeros(sum(spans(initial)), np.uint8)
        pack(initial, packed)
        self._nobody = torch.from_numpy(packed[: self._before_tables].copy())
        self._staged = Staged(torch.from_numpy(packed), device)
        self._host = _Packed[Array](*[t.numpy() for t in unpack(self._staged.host(), initial)])
        self.packed = _Packed[Tensor](*unpack(self._staged.tensor, initial))
        # What attention reads has rows as wide as the longest sequence may ever need.
        self.block_tables = torch.zeros(sequences + 1, blocks, dtype=torch.int32, device=device)
        self.logits = torch.zeros(sequences, vocab_size, dtype=torch.float32, device=device)

    @property
    def bytes(self) -> int:
        return self._staged.tensor.nbytes + self.block_tables.nbytes + self.logits.nbytes

    def clear(self) -> None:
        """Puts a step of nobody in place, as large as any shape: it stores no keys."""
        self._staged.host()[: self._before_tables] = self._nobody
        self._staged.send(self._before_tables)

    def fill(self, step: StepBatch, shape: StepShape) -> None:
        """Puts a step in place, and padding behind it as far as the shape reaches.

        Queues one copy from the host, and what is left to do within the device. The host's memory
        is free again once the step before has landed: this is the next that the device does.
        """
        self._staged.host()
        into, (sequences, blocks) = self._host, step.block_tables.shape
        awaiting = step.awaiting.shape[1]
        # No id of an adapter's own may be left to a row without it: the base has none like it.
        _put(step.input_ids, into.input_ids[: shape.rows], 0)
        _put(step.position_ids, into.position_ids[: shape.rows], 0)
        _put(step.slot_mapping, into.slot_mapping[: shape.rows], -1)
        _put(step.sampled_rows, into.sampled_rows[: shape.sequences], 0)
        _put(step.query_starts, into.query_starts[: shape.sequences + 2], len(step.input_ids))
        _put(step.seq_lens, into.seq_lens[: shape.sequences + 1], 0)
        into.awaiting[:, :awaiting] = step.awaiting
        used = sequences * blocks
        into.block_tables[:used] = step.block_tables.reshape(-1)
        self._staged.send(self._before_tables + step.block_tables.nbytes)
        # What stands behind a sequence's last block is never read.
        self.block_tables[:sequences, :blocks] = self.packed.block_tables[:used].view(
            sequences, blocks
        )
        if awaiting:
            step.last.fill_in(self.packed.input_ids, self.packed.awaiting[:, :awaiting])


def _put(values: Array, into: Array, padding: int) -> None:
    into[: len(values)] = values
    into[len(values) :] = padding


class ShapedStep:
    """Steps of one shape. One of fewer rows is padded: rows beyond its own store no keys, belong
    to no sequence and have no adapter.
    """

    def __init__(self, shape: StepShape, buffers: StepBuffers, sites: DeviceSites) -> None:
        self._shape = shape
        self._buffers = buffers
        self._attention = CapturedAttention(
            shape.rows,
            shape.decodes,
            buffers.packed.query_starts[: shape.sequences + 2],
            buffers.packed.seq_lens[: shape.sequences + 1],
            buffers.block_tables[: shape.sequences + 1],
        )
        nobody = Segments.build((), sites.device)
        tokens = _captured_segments(shape.rows, sites)
        sampled = tokens if shape.decodes else _captured_segments(shape.sequences, sites)
        # Of all rows and of the sampled ones: without adapters, and with any.
        self._plain = nobody, nobody
        self._adapted = tokens, sampled

    @property
    def logits(self) -> Tensor:
        """Of the sampled rows, [sequences, V], float32."""
        return self._buffers.logits[: self._shape.sequences]

    def inputs(self, adapted: bool) -> StepInputs:
        """What a step of this shape is captured with."""
        rows, packed = self._shape.rows, self._buffers.packed
        tokens, sampled = self._adapted if adapted else self._plain
        return StepInputs(
            input_ids=packed.input_ids[None, :rows],
            position_ids=packed.position_ids[None, :rows],
            slot_mapping=packed.slot_mapping[:rows],
            attention=self._attention,
            sampled_rows=packed.sampled_rows[: self._shape.sequences],
            token_segments=tokens,
            sampled_segments=sampled,
        )

    def clear(self) -> None:
        """Puts a step of nobody in place; queues copies, waits for none."""
        self._buffers.clear()
        self._attention.fill(())
        for filled, empty in zip(self._adapted, self._plain, strict=True):
            filled.fill(empty)

    def fill(self, step: StepBatch) -> bool:
        """Puts a step in place for the next replay; queues copies, waits for none.

        False where adapters that act on part of their sequences cut the rows into more tiles than
        there are.
        """
        self._buffers.fill(step, self._shape)
        self._attention.fill(step.query_lens)
        tokens, own = self._adapted
        return tokens.fill(step.token_segments) and own.fill(step.sampled_segments)


def _captured_segments(rows: int, sites: DeviceSites) -> CapturedSegments:
    capacity = CapturedSegments.capacity_for(rows, sites.num_slots)
    return CapturedSegments(capacity, sites.num_slots, sites.device)
