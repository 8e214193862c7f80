"""Attention launched once and replayed for other sequences: what a CUDA graph does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltamux_kernels import AttentionBatch, CapturedAttention
from deltamux_kernels.paged_attention_triton import paged_attention_triton
from deltamux_kernels.scoring import Scoring

BLOCK, COLUMNS, ROWS, SEQUENCES = 4, 12, 40, 3
# Two heads of 16 share a tile of 64 rows: prompts are cut into tiles of 32 queries.
HEADS, DIM = 2, 16

# (query_len, context_len) of each sequence.
STEPS = [
    [(1, 9), (36, 40), (3, 3)],
    [(40, 40)],
    [(1, 1), (2, 48)],
    [(33, 47), (1, 20), (1, 7)],
]
DECODING = [[(1, 9), (1, 40), (1, 3)], [(1, 1)], [(1, 48), (1, 20)]]


def batch(step: list[tuple[int, int]], device: torch.device) -> AttentionBatch:
    lengths, contexts = zip(*step, strict=True)
    blocks = torch.arange(len(step) * COLUMNS).view(len(step), COLUMNS)
    return AttentionBatch(
        lengths,
        contexts,
        torch.tensor([0, *lengths]).cumsum(0).int().to(device),
        torch.tensor(contexts, dtype=torch.int32, device=device),
        blocks[:, : -(-max(contexts) // BLOCK)].int().to(device),
    )


def captured(rows: int, decodes: bool, device: torch.device) -> CapturedAttention:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    starts, lens, tables = zeros(SEQUENCES + 2), zeros(SEQUENCES + 1), zeros(SEQUENCES + 1, COLUMNS)
    return CapturedAttention(rows, decodes, starts, lens, tables)


def fill(sequences: CapturedAttention, step: AttentionBatch) -> None:
    count, blocks = step.block_tables.shape
    sequences.query_starts.fill_(sum(step.query_lens))
    sequences.query_starts[: count + 1] = step.query_starts
    sequences.seq_lens.zero_()
    sequences.seq_lens[:count] = step.seq_lens
    sequences.block_tables[:count, :blocks] = step.block_tables
    sequences.fill(step.query_lens)


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
@pytest.mark.parametrize(
    ("rows", "decodes", "steps"), [(ROWS, False, STEPS), (SEQUENCES, True, DECODING)]
)
def test_one_capture_serves_any_sequences_to_the_bit(
    form: str,
    device: torch.device,
    dtype: torch.dtype,
    traced: Callable[[], Any],
    rows: int,
    decodes: bool,
    steps: list[list[tuple[int, int]]],
) -> None:
    torch.manual_seed(0)
    query = torch.randn(rows, HEADS, DIM).to(dtype).to(device)
    keys, values = (
        torch.randn(SEQUENCES * COLUMNS, BLOCK, 1, DIM).to(dtype).to(device) for _ in range(2)
    )
    scoring, sequences = Scoring(0.25, None, None, None), captured(rows, decodes, device)
    with traced() as launches:
        out = paged_attention_triton(query, keys, values, sequences, scoring)
    (launch,) = launches
    # Not filled yet, it has no tile: all programs leave at once.
    assert set(launch.read) <= {"tiles", "query_starts"} and not launch.written
    for step in steps:
        plain = batch(step, device)
        fill(sequences, plain)
        out.fill_(torch.nan)
        launch.replay()
        expected = paged_attention_triton(query, keys, values, plain, scoring)
        used = sum(plain.query_lens)
        assert torch.equal(out[:used], expected[:used]), step
        assert out[used:].isnan().all()


def test_a_table_has_room_for_the_worst_division() -> None:
    device = torch.device("cpu")
    sequences = captured(10, False, device)
    assert sequences.query_tiles(4).shape == (SEQUENCES + 1, 2)
    for lengths in ((1, 1, 8), (10,), (4, 5, 1), (5, 5)):
        sequences.fill(lengths)
        tiles = [tile for tile in sequences.query_tiles(4).tolist() if tile[0] < SEQUENCES]
        assert len(tiles) == sum(-(-length // 4) for length in lengths)
    assert sequences.query_tiles(8).tolist() == [[0, 0], [1, 0], [SEQUENCES, 0]]


def test_lengths_are_not_known() -> None:
    sequences = captured(4, True, torch.device("cpu"))
    with pytest.raises(AttributeError, match="query_lens"):
        _ = sequences.query_lens
