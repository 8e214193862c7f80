"""y = (y - bias) g + bias for the rows of each slot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deltamux.adapters.primitives.row_scale import RowScale, RowScaleBank
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@pytest.mark.parametrize("bias", [None, torch.arange(9.0)])
def test_rows_are_scaled_around_the_bias(
    bias: torch.Tensor | None,
    store: Callable[[int], PackedMatrices],
    place: Callable[..., None],
    segments: Segments,
) -> None:
    torch.manual_seed(0)
    bank = RowScaleBank(store(9), bias)
    scale = torch.rand(9)
    place(bank, {0: RowScale(scale)})
    y = torch.randn(10, 9)
    shift = torch.zeros(9) if bias is None else bias
    expected = y.clone()
    expected[6:] = (y[6:] - shift) * scale + shift
    bank.after(torch.empty(0), y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:6], expected[:6])
