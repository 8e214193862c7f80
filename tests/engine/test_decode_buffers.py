"""Steps of fewer rows than a captured one: what is left of earlier steps must not matter."""

from __future__ import annotations

import torch

from deltamux.engine.batch import StepBatch
from deltamux.engine.decode_buffers import DecodeBuffers
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled
from deltamux.wire.messages import Sampling
from deltamux_kernels import Segments

CPU = torch.device("cpu")
BLOCK = 4


def decoding(*contexts: int) -> StepBatch:
    """Sequence i has `contexts[i]` tokens, all but the last computed, in blocks of its own."""
    step = []
    for number, context in enumerate(contexts):
        blocks = list(range(1 + 4 * number, 5 + 4 * number))
        sequence = trial_sequence(number, list(range(20, 20 + context)), blocks, Sampling())
        sequence.num_computed = context - 1
        step.append(Scheduled(sequence, 1))
    return StepBatch.build(step, BLOCK, CPU)


def test_a_step_stands_where_it_is_captured_and_padding_touches_nothing() -> None:
    buffers = DecodeBuffers(4, 4, 8, CPU)
    batch = buffers.batch(4, Segments.build((), CPU))
    assert batch.slot_mapping.tolist() == [-1] * 4
    buffers.fill(decoding(2, 3, 4, 5), 4)
    step = decoding(9, 1, 6)
    buffers.fill(step, 4)
    assert batch.input_ids[:, :3].equal(step.input_ids)
    assert batch.position_ids[:, :3].equal(step.position_ids)
    assert batch.slot_mapping.tolist() == [*step.slot_mapping.tolist(), -1]
    attention = batch.attention
    assert attention.seq_lens.tolist() == [9, 1, 6, 0]
    assert attention.query_starts.tolist() == [0, 1, 2, 3, 4]
    for row, blocks in enumerate([3, 1, 2]):
        given = step.attention.block_tables[row, :blocks]
        assert attention.block_tables[row, :blocks].equal(given)


def test_sizes_share_their_memory() -> None:
    buffers = DecodeBuffers(4, 4, 8, CPU)
    small, nobody = decoding(3, 2), Segments.build((), CPU)
    buffers.fill(small, 2)
    for size in (2, 4):
        batch = buffers.batch(size, nobody)
        assert batch.input_ids[:, :2].equal(small.input_ids)
        assert batch.attention.query_lens == (1,) * size
        assert batch.sampled_rows.tolist() == list(range(size))
