"""Rows of the embedding table of each slot, to the bit."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import PackedMatrices, Segments
from deltamux_kernels.embedding_rows import embedding_rows_torch, embedding_rows_triton

SPANS = [(2, 1, 19), (1, 19, 21), (0, 22, 23)]
Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]


@pytest.mark.parametrize("width", [1, 77, 130])
def test_each_row_is_that_of_its_token_in_the_table_of_its_slot(
    width: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(width)
    tables = [torch.randn(rows, width).to(dtype) for rows in (90, 1, 31)]
    given: list[torch.Tensor | None] = [tables[0], None, tables[2]]
    # Of slot 2, some are behind the end of its table.
    ids = torch.randint(40, (25,))
    ids[1:4] = torch.tensor([30, 31, 39])
    before = torch.randn(25, width).to(dtype)
    expected = before.clone()
    for slot, start, end in SPANS:
        if slot != 1:
            expected[start:end] = tables[slot][ids[start:end].clamp(max=len(tables[slot]) - 1)]
    y = as_columns(before.to(device))
    segments = Segments.build(SPANS, device)
    rows = embedding_rows_torch if form == "torch" else embedding_rows_triton
    rows(y, ids.to(device), pack(given, width), segments)
    assert torch.equal(y.cpu(), expected)
