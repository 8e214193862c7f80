"""What the forward pass of a captured step reads and writes, in the same memory in every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deltamux.adapters.sites import DeviceSites
from deltamux.engine.batch import StepBatch
from deltamux_kernels import CapturedAttention, CapturedSegments, Segments


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
        rows, sequences = step.input_ids.shape[1], len(step.attention.query_lens)
        if self.decodes and rows > len(step.sampled):
            return False
        return rows <= self.rows and sequences <= self.sequences


class StepBuffers:
    """The memory that steps of all shapes share."""

    def __init__(
        self, rows: int, sequences: int, blocks: int, vocab_size: int, device: torch.device
    ) -> None:
        """For up to `rows` rows of up to `sequences` sequences of up to `blocks` blocks."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.input_ids, self.position_ids = zeros(1, rows), zeros(1, rows)
        self.slot_mapping = zeros(rows).fill_(-1)
        # One sequence more, which is nobody's.
        self.query_starts = zeros(sequences + 2, dtype=torch.int32)
        self.seq_lens = zeros(sequences + 1, dtype=torch.int32)
        self.block_tables = zeros(sequences + 1, blocks, dtype=torch.int32)
        self.sampled_rows = zeros(sequences)
        self.logits = zeros(sequences, vocab_size, dtype=torch.float32)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in vars(self).values())


class ShapedStep:
    """Steps of one shape. One of fewer rows is padded: rows beyond its own store no keys, belong
    to no sequence and have no adapter; what else stands in them is left from earlier steps.
    """

    def __init__(self, shape: StepShape, buffers: StepBuffers, sites: DeviceSites) -> None:
        self._shape = shape
        self._buffers = buffers
        self._attention = CapturedAttention(
            shape.rows,
            shape.decodes,
            buffers.query_starts[: shape.sequences + 2],
            buffers.seq_lens[: shape.sequences + 1],
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

    def batch(self, adapted: bool) -> StepBatch:
        """What a step of this shape is captured with."""
        rows, buffers = self._shape.rows, self._buffers
        tokens, sampled = self._adapted if adapted else self._plain
        return StepBatch(
            input_ids=buffers.input_ids[:, :rows],
            position_ids=buffers.position_ids[:, :rows],
            slot_mapping=buffers.slot_mapping[:rows],
            attention=self._attention,
            sampled_rows=buffers.sampled_rows[: self._shape.sequences],
            token_segments=tokens,
            sampled_segments=sampled,
            sampled=(),
            sampled_places=(),
            pooled=(),
        )

    def fill(self, step: StepBatch) -> bool:
        """Puts a step in place for the next replay; queues copies, waits for none.

        False where adapters that act on part of their sequences cut the rows into more tiles than
        there are.
        """
        into, size, rows = self._buffers, self._shape.rows, step.input_ids.shape[1]
        into.input_ids[:, :rows] = step.input_ids
        # No id of an adapter's own may be left to a step without it: the base has no row for it.
        into.input_ids[:, rows:size] = 0
        into.position_ids[:, :rows] = step.position_ids
        into.slot_mapping[:rows] = step.slot_mapping
        into.slot_mapping[rows:size] = -1
        sampled = len(step.sampled)
        into.sampled_rows[:sampled] = step.sampled_rows
        # Nor a row of a larger step.
        into.sampled_rows[sampled : self._shape.sequences] = 0
        self._attention.fill(step.attention)
        tokens, own = self._adapted
        return tokens.fill(step.token_segments) and own.fill(step.sampled_segments)


def _captured_segments(rows: int, sites: DeviceSites) -> CapturedSegments:
    capacity = CapturedSegments.capacity_for(rows, sites.num_slots)
    return CapturedSegments(capacity, sites.num_slots, sites.device)
