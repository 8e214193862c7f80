"""The packed tensors of one step."""

from __future__ import annotations

import numpy as np
import torch

from deltamux.adapters.primitives.virtual_tokens import Virtual
from deltamux.adapters.traits import Traits
from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import PooledRows, StepBatch
from deltamux.engine.step.last_draw import LastDraw
from deltamux.engine.transfer import Upload
from deltamux.wire.messages import Embed, Sampling

BLOCK, CPU = 4, torch.device("cpu")


def scheduled(
    tokens: list[int], blocks: list[int], computed: int, count: int, slot: int | None
) -> Scheduled:
    sequence = trial_sequence(0, tokens, blocks, Sampling())
    sequence.num_computed = computed
    sequence.slot = slot
    return Scheduled(sequence, count)


PREFILL = scheduled([10, 11, 12, 13, 14, 15], [3, 8], computed=0, count=5, slot=None)
LAST_CHUNK = scheduled([20, 21, 22, 23, 24, 25], [9, 2], computed=3, count=3, slot=7)
DECODE = scheduled([30, 31, 32, 33, 34, 35, 36, 37, 38], [5, 4, 6], computed=8, count=1, slot=1)
DECODE_BASE = scheduled([40, 41], [7], computed=1, count=1, slot=None)


def build(*items: Scheduled) -> StepBatch:
    return StepBatch.build(items, BLOCK, CPU)


def test_rows_are_packed_by_slot_with_the_base_last() -> None:
    batch = build(PREFILL, LAST_CHUNK, DECODE, DECODE_BASE)
    assert batch.input_ids.tolist() == [38, 23, 24, 25, 10, 11, 12, 13, 14, 41]
    assert batch.position_ids.tolist() == [8, 3, 4, 5, 0, 1, 2, 3, 4, 1]
    assert batch.token_segments.spans == ((1, 0, 1), (7, 1, 4))


def test_each_row_has_the_place_of_its_position_in_its_own_blocks() -> None:
    batch = build(PREFILL, LAST_CHUNK, DECODE, DECODE_BASE)
    assert batch.slot_mapping.tolist() == [
        *(6 * BLOCK,),
        *(9 * BLOCK + 3, 2 * BLOCK, 2 * BLOCK + 1),
        *(3 * BLOCK, 3 * BLOCK + 1, 3 * BLOCK + 2, 3 * BLOCK + 3, 8 * BLOCK),
        *(7 * BLOCK + 1,),
    ]


def test_attention_sees_lengths_and_tables_padded_with_block_0() -> None:
    attention = build(PREFILL, LAST_CHUNK, DECODE, DECODE_BASE).send(Upload(CPU)).attention
    assert attention.query_lens == (1, 3, 5, 1)
    assert attention.context_lens == (9, 6, 5, 2)
    assert attention.query_starts.tolist() == [0, 1, 4, 9, 10]
    assert attention.seq_lens.tolist() == [9, 6, 5, 2]
    assert attention.block_tables.tolist() == [[5, 4, 6], [9, 2, 0], [3, 8, 0], [7, 0, 0]]
    assert attention.block_tables.dtype == attention.seq_lens.dtype == torch.int32


def test_table_ends_with_the_context_of_the_step() -> None:
    """Blocks that were allocated ahead are no part of it yet."""
    ahead = scheduled([1, 2, 3, 4, 5, 6], [5, 6], computed=0, count=4, slot=None)
    assert build(ahead).block_tables.tolist() == [[5]]


def test_only_sequences_that_reach_their_last_token_sample() -> None:
    batch = build(PREFILL, LAST_CHUNK, DECODE, DECODE_BASE)
    assert batch.sampled_rows.tolist() == [0, 3, 9]
    assert batch.sampled == (DECODE, LAST_CHUNK, DECODE_BASE)
    assert batch.sampled_segments.spans == ((1, 0, 1), (7, 1, 2))


def test_places_lead_back_to_the_order_of_the_schedule() -> None:
    """Of the three that sample, the schedule had LAST_CHUNK first, then DECODE."""
    batch = build(PREFILL, LAST_CHUNK, DECODE, DECODE_BASE)
    assert batch.sampled_places == (1, 0, 2)


def test_sequences_of_one_slot_form_one_segment() -> None:
    again = scheduled([50, 51], [1], computed=1, count=1, slot=7)
    assert build(LAST_CHUNK, DECODE_BASE, again).token_segments.spans == ((7, 0, 4),)


def test_step_in_which_nothing_samples() -> None:
    batch = build(PREFILL)
    assert batch.sampled_rows.shape == (0,) and batch.sampled_rows.dtype == np.int64
    assert batch.sampled == () and not batch.sampled_segments


def test_pooled_sequences_sample_nothing_and_share_the_places() -> None:
    whole = scheduled([1, 2, 3], [10], computed=0, count=3, slot=1)
    begun = scheduled([4, 5, 6], [11], computed=0, count=2, slot=None)
    whole.sequence.pooling = begun.sequence.pooling = Embed("mean", normalize=True)
    batch = build(begun, LAST_CHUNK, whole, DECODE_BASE)
    assert batch.sampled == (LAST_CHUNK, DECODE_BASE)
    assert (batch.sampled_places, batch.sampled_segments.spans) == ((0, 2), ((7, 0, 1),))
    assert batch.pooled == (
        PooledRows(whole.sequence, 0, 0, 3, place=1),
        PooledRows(begun.sequence, 0, 6, 8, place=None),
    )


def test_virtual_tokens_have_negative_ids_and_are_not_pooled() -> None:
    begun = scheduled([4, 5, 6], [11, 12], computed=0, count=4, slot=1)
    goes_on = scheduled([7, 8, 9], [13, 14], computed=4, count=1, slot=1)
    nothing_yet = scheduled([1, 2], [15], computed=0, count=2, slot=2)
    for item in (begun, goes_on, nothing_yet):
        item.sequence.begin_with(Traits(Virtual(3)))
        item.sequence.pooling = Embed("mean", normalize=True)
    batch = build(begun, goes_on, nothing_yet)
    assert batch.input_ids.tolist() == [-1, -2, -3, 4, 8, -1, -2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert batch.pooled == (
        PooledRows(begun.sequence, 0, 3, 4, place=None),
        PooledRows(goes_on.sequence, 1, 4, 5, place=None),
    )


def test_virtual_tokens_that_do_not_count_leave_the_prompt_at_position_0() -> None:
    begun = scheduled([4, 5], [11, 12, 13], computed=3, count=3, slot=1)
    counted = scheduled([6, 7], [14, 15], computed=3, count=2, slot=1)
    begun.sequence.begin_with(Traits(Virtual(3, computed=False, counted=False)))
    counted.sequence.begin_with(Traits(Virtual(3, computed=False)))
    batch = build(begun, counted)
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.slot_mapping.tolist() == [47, 48, 49, 59, 60]


def test_an_adapter_with_a_reach_has_no_rows_beyond_it() -> None:
    begun = scheduled([4, 5, 6, 7], [11], computed=0, count=4, slot=1)
    goes_on = scheduled([4, 5, 6, 7], [12], computed=2, count=2, slot=1)
    beyond = scheduled([4, 5, 6, 7], [13], computed=3, count=1, slot=2)
    for item in (begun, goes_on, beyond):
        item.sequence.begin_with(Traits(reach=3))
    batch = build(begun, goes_on, beyond)
    assert batch.token_segments.spans == ((1, 0, 3), (1, 4, 5))
    assert len(batch.sampled) == 3 and not batch.sampled_segments


def test_a_token_that_is_still_to_come_is_taken_from_the_last_draw() -> None:
    """The second of the rows, which slots have turned around; positions and blocks are known."""
    known = build(PREFILL, DECODE, DECODE_BASE)
    sequence = DECODE.sequence
    token = sequence.tokens.pop()
    last = LastDraw((LAST_CHUNK, DECODE, DECODE_BASE), torch.tensor([7, token, 9]))
    batch = StepBatch.build([PREFILL, DECODE, DECODE_BASE], BLOCK, CPU, last)
    sequence.tokens.append(token)
    assert batch.awaiting.tolist() == [[0], [1]]
    sent, expected = batch.send(Upload(CPU)), known.send(Upload(CPU))
    assert sent.input_ids.tolist() == expected.input_ids.tolist()
    assert sent.position_ids.tolist() == expected.position_ids.tolist()
    assert sent.slot_mapping.tolist() == expected.slot_mapping.tolist()


def test_who_awaits_nothing_sends_nothing_more() -> None:
    assert build(PREFILL, DECODE).awaiting.shape == (2, 0)
