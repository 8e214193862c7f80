"""What the forward pass of a decode step reads and writes, in the same memory in every step."""

from __future__ import annotations

import torch
from torch import Tensor

from deltamux.engine.batch import StepBatch
from deltamux_kernels import AttentionBatch, Segments


class DecodeBuffers:
    """One row a sequence, each of them sampled. A step of fewer rows is padded to the size of a
    captured one: rows beyond its own store no keys, attend to nothing and have no adapter; what
    else stands in them is left from earlier steps.
    """

    def __init__(self, rows: int, blocks: int, vocab_size: int, device: torch.device) -> None:
        """For up to `rows` sequences of up to `blocks` blocks."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._input_ids, self._position_ids = zeros(1, rows), zeros(1, rows)
        self._slot_mapping = zeros(rows).fill_(-1)
        self._seq_lens = zeros(rows, dtype=torch.int32)
        self._block_tables = zeros(rows, blocks, dtype=torch.int32)
        self._numbers = torch.arange(rows + 1, device=device)
        self._query_starts = self._numbers.int()
        self.logits = zeros(rows, vocab_size, dtype=torch.float32)

    def batch(self, size: int, segments: Segments) -> StepBatch:
        """The first `size` rows as a step, to capture with."""
        return StepBatch(
            input_ids=self._input_ids[:, :size],
            position_ids=self._position_ids[:, :size],
            slot_mapping=self._slot_mapping[:size],
            attention=AttentionBatch(
                query_lens=(1,) * size,
                # They differ from replay to replay: whoever asks for them must not be captured.
                context_lens=(),
                query_starts=self._query_starts[: size + 1],
                seq_lens=self._seq_lens[:size],
                block_tables=self._block_tables[:size],
            ),
            sampled_rows=self._numbers[:size],
            token_segments=segments,
            sampled_segments=segments,
            sampled=(),
            sampled_places=(),
            pooled=(),
        )

    def fill(self, step: StepBatch, size: int) -> None:
        """Puts a step in place for the next replay of that size; queues copies, waits for none."""
        rows, blocks = step.attention.block_tables.shape
        self._input_ids[:, :rows] = step.input_ids
        self._position_ids[:, :rows] = step.position_ids
        self._slot_mapping[:rows] = step.slot_mapping
        self._seq_lens[:rows] = step.attention.seq_lens
        # What stands behind a sequence's last block is never read.
        self._block_tables[:rows, :blocks] = step.attention.block_tables
        if rows < size:
            self._slot_mapping[rows:size] = -1
            self._seq_lens[rows:size] = 0
