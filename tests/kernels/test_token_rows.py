"""Rows and columns of single tokens, replaced slot by slot, against a loop in float64."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import ALIGNMENT, Segments, TokenTable
from deltamux_kernels.packed import as_elements
from deltamux_kernels.token_rows import (
    token_columns_torch,
    token_columns_triton,
    token_rows_torch,
    token_rows_triton,
)

SPANS = [(2, 1, 19), (1, 19, 21), (0, 22, 23)]
IDS = {0: [4], 2: [0, 3, 4, 7, 10, 80, 81, 90]}
Fill = Callable[[int], TokenTable]


@pytest.fixture
def fill(dtype: torch.dtype, device: torch.device) -> Fill:
    """fill(width): slots 0 and 2 have the rows of IDS, slot 1 none."""

    def fill(width: int) -> TokenTable:
        torch.manual_seed(width)
        arena = torch.full((1 << 15,), torch.nan, dtype=dtype, device=device)
        table, end = TokenTable(arena, 3, width), 0
        for slot, ids in IDS.items():
            rows = torch.randn(len(ids), width) / width**0.5
            parts = (
                (table.ids, as_elements(torch.tensor(ids, dtype=torch.int32), dtype)),
                (table.rows, rows.to(dtype)),
            )
            for store, part in parts:
                step = ALIGNMENT * store.width
                end = -(-end // step) * step
                store.write(slot, end, part)
                end += part.numel()
            table.placed(slot)
        return table

    return fill


@pytest.mark.parametrize("width", [1, 77, 130])
def test_a_token_that_is_the_slots_own_gets_the_slots_row(
    width: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    table = fill(width)
    tokens = torch.tensor([4] * 5 + list(range(11)) + [80, 90, 91, 4, 4, 4, 4, 7, 0], device=device)
    before = torch.randn(len(tokens), width).to(dtype).to(device)
    expected = as_columns(before)
    for slot, start, end in SPANS:
        for t in range(start, end):
            if (token := int(tokens[t])) in IDS.get(slot, []):
                rows = table.rows.views[slot]
                assert rows is not None
                expected[t] = rows[IDS[slot].index(token)]
    y = as_columns(before)
    op = token_rows_torch if form == "torch" else token_rows_triton
    op(y, tokens, table, Segments.build(SPANS, device))
    assert torch.equal(y, expected)
    assert not torch.equal(y, before)


@pytest.mark.parametrize("width", [1, 77, 130])
def test_the_columns_of_the_slots_own_tokens_are_replaced(
    width: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    table = fill(width)
    x = torch.randn(25, width).to(dtype).to(device)
    before = torch.randn(25, 91).to(dtype).to(device)
    expected = before.double()
    for slot, start, end in SPANS:
        if (rows := table.rows.views[slot]) is not None:
            expected[start:end, IDS[slot]] = x[start:end].double() @ rows.double().T
    y = as_columns(before)
    op = token_columns_torch if form == "torch" else token_columns_triton
    op(y, x, table, Segments.build(SPANS, device))
    untouched = expected == before
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 8 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
