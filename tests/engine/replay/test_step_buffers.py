"""Steps of fewer rows than a captured one: what is left of earlier steps must not matter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from deltamux.engine.rehearsal import trial_sequence
from deltamux.engine.replay.step_buffers import ShapedStep, StepBuffers, StepShape
from deltamux.engine.sequence import Scheduled
from deltamux.engine.step.batch import StepBatch
from deltamux.wire.messages import Sampling

CPU = torch.device("cpu")
BLOCK = 4
LARGE, SMALL, DECODING = StepShape(16, 4), StepShape(6, 4), StepShape(4, 4, decodes=True)


def step(
    *parts: tuple[int, int],
    more: int = 0,
    slot: int | None = None,
    adapter_from: int = 0,
    block: int = 1,
) -> StepBatch:
    """Sequence i has `parts[i]` tokens: computed, and in the step; then `more` that are not.

    From `block` on, each has four blocks."""
    scheduled = []
    for number, (computed, length) in enumerate(parts):
        blocks = list(range(block + 4 * number, block + 4 + 4 * number))
        tokens = list(range(20, 20 + computed + length + more))
        sequence = trial_sequence(number, tokens, blocks, Sampling())
        sequence.num_computed, sequence.slot = computed, slot
        sequence.adapter_from = adapter_from
        scheduled.append(Scheduled(sequence, length))
    return StepBatch.build(scheduled, BLOCK, CPU)


@pytest.fixture
def steps() -> dict[StepShape, ShapedStep]:
    buffers = StepBuffers(16, 4, 4, 8, CPU)
    sites = SimpleNamespace(num_slots=2, device=CPU)
    return {shape: ShapedStep(shape, buffers, sites) for shape in (LARGE, SMALL, DECODING)}


def test_a_shape_holds_what_has_no_more_rows_and_sequences() -> None:
    assert LARGE.holds(step((2, 13), (8, 1), (2, 1), (0, 1)))
    assert not LARGE.holds(step((2, 14), (8, 1), (2, 1), (0, 1)))
    assert not LARGE.holds(step(*[(3, 1)] * 5))
    assert DECODING.holds(step((3, 1), (0, 1)))
    assert not DECODING.holds(step((3, 1), (0, 2)))
    assert not DECODING.holds(step((3, 1), (0, 1), more=1))


@pytest.mark.parametrize("cleared", [False, True])
def test_before_the_first_step_and_once_cleared_nothing_is_stored_or_attended(
    steps: dict[StepShape, ShapedStep], cleared: bool
) -> None:
    inputs = steps[LARGE].inputs(adapted=True)
    queries = inputs.attention.query_tiles(16)
    if cleared:
        own_ids = step((3, 9), (0, 3), slot=0)
        own_ids.input_ids[4] = -1
        assert steps[LARGE].fill(own_ids)
        assert queries[:, 0].tolist() != [4] * len(queries)
        steps[LARGE].clear()
    assert inputs.slot_mapping.tolist() == [-1] * 16
    assert not inputs.input_ids.any()
    assert not inputs.attention.seq_lens.any() and not inputs.attention.query_starts.any()
    assert queries[:, 0].tolist() == [4] * len(queries)
    for segments in (inputs.token_segments, inputs.sampled_segments):
        assert segments.tiles[:, 0].tolist() == [2] * len(segments.tiles)


def test_rows_of_one_slot_that_lie_apart_may_be_too_many(
    steps: dict[StepShape, ShapedStep],
) -> None:
    """With two slots, 16 rows have tiles for two pieces."""
    assert steps[LARGE].fill(step((0, 2), (0, 2), (0, 2), slot=0))
    assert steps[LARGE].fill(step((0, 2), (0, 2), slot=0, adapter_from=1))
    assert not steps[LARGE].fill(step((0, 2), (0, 2), (0, 2), slot=0, adapter_from=1))


@pytest.mark.parametrize("shape", [SMALL, DECODING])
def test_a_step_stands_where_it_is_captured_and_padding_touches_nothing(
    steps: dict[StepShape, ShapedStep], shape: StepShape
) -> None:
    earlier = step((3, 9), (2, 3), (0, 3), (7, 1), block=40)
    earlier.input_ids[4] = -1
    steps[LARGE].fill(earlier)
    now = step((2, 1), (5, 1), (8, 1)) if shape.decodes else step((2, 3), (8, 1), more=1)
    steps[shape].fill(now)
    inputs = steps[shape].inputs(adapted=False)
    rows, sequences = len(now.input_ids), len(now.query_lens)
    padding = shape.rows - rows
    assert padding
    assert inputs.input_ids.tolist() == [[*now.input_ids.tolist(), *[0] * padding]]
    assert inputs.position_ids.tolist() == [[*now.position_ids.tolist(), *[0] * padding]]
    assert inputs.slot_mapping.tolist() == [*now.slot_mapping.tolist(), *[-1] * padding]
    sampled = now.sampled_rows.tolist()
    assert inputs.sampled_rows.tolist() == [*sampled, *[0] * (4 - len(sampled))]
    attention, nobody = inputs.attention, 5 - sequences
    assert attention.seq_lens.tolist() == [*now.seq_lens.tolist(), *[0] * nobody]
    assert attention.query_starts.tolist() == [*now.query_starts.tolist(), *[rows] * nobody]
    for table, given, context in zip(
        attention.block_tables, now.block_tables, now.seq_lens.tolist(), strict=False
    ):
        blocks = -(-context // BLOCK)
        assert table[:blocks].tolist() == given[:blocks].tolist()
