"""y += c for the rows of each slot."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.primitives.row_bias import RowBias, RowBiasBank
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


def test_each_row_gets_the_bias_of_its_own_slot(
    store: Callable[[int], PackedMatrices], place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = RowBiasBank(store(9))
    payloads = {0: RowBias(torch.randn(9)), 1: RowBias(torch.randn(9))}
    place(bank, payloads)
    y = torch.randn(10, 9)
    expected = y.clone()
    expected[6:] += payloads[0].bias
    expected[2:4] += payloads[1].bias
    bank.after(torch.empty(0), y, segments)
    assert torch.equal(y, expected)
