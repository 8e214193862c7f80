"""Each row gets the product of its own slot's matrices of its own expert."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deltamux.adapters.primitives.expert_low_rank import ExpertLowRank, ExpertLowRankBank
from deltamux_kernels.expand import Columns
from deltamux_kernels.packed import ALIGNMENT, DividedMatrices
from deltamux_kernels.segments import Segments

EXPERTS, SLOTS = 3, 4
CPU = torch.device("cpu")


def test_rows_by_slot_and_expert(arena: torch.Tensor, place: Callable[..., None]) -> None:
    torch.manual_seed(0)
    stores = (DividedMatrices(arena, SLOTS, width, EXPERTS) for width in (8, 16))
    bank = ExpertLowRankBank(*stores, Columns(SLOTS * EXPERTS, CPU))
    a = {slot: torch.randn(EXPERTS, rank, 8) for slot, rank in ((0, 8), (3, 16))}
    b = {slot: torch.randn(EXPERTS, matrix.shape[1], 16) for slot, matrix in a.items()}
    place(bank, {slot: ExpertLowRank.of(a[slot], b[slot]) for slot in a})
    x, y = torch.randn(10, 8), torch.randn(10, 16)
    rows = [(0, 0, 1, 2), (3, 1, 2, 5), (0, 2, 5, 6), (3, 0, 7, 10)]
    expected = y.clone()
    for slot, expert, start, end in rows:
        expected[start:end] += x[start:end] @ a[slot][expert].T @ b[slot][expert]
    spans = [(slot * EXPERTS + expert, start, end) for slot, expert, start, end in rows]
    bank.add(y, x, Segments.build(spans, CPU))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize(
    ("width", "out", "rank"), [(32, 96, 3), (48, 32, 4), (7, 5, 2), (64, 128, 5)]
)
def test_every_expert_begins_where_kernels_can_load(width: int, out: int, rank: int) -> None:
    a, b = torch.randn(EXPERTS, rank, width), torch.randn(EXPERTS, rank, out)
    payload = ExpertLowRank.of(a, b)
    padded = len(payload.a) // EXPERTS
    assert padded * width % ALIGNMENT == 0 and padded * out % ALIGNMENT == 0
    assert padded == rank or width % ALIGNMENT or out % ALIGNMENT
    by_expert = [matrix.view(EXPERTS, padded, -1) for matrix in payload.tensors]
    assert torch.equal(by_expert[0][:, :rank], a) and torch.equal(by_expert[1][:, :rank], b)
    assert not by_expert[0][:, rank:].any()
