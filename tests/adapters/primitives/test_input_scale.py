"""x * g for the rows of each slot, and the input itself left alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.primitives.input_scale import InputScale, InputScaleBank
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


def test_the_module_sees_scaled_rows_and_its_siblings_do_not(
    store: Callable[[int], PackedMatrices], place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = InputScaleBank(store(9))
    scale, x = torch.rand(9), torch.randn(2, 5, 9)
    place(bank, {1: InputScale(scale)})
    before, expected = x.clone(), x.clone().view(10, 9)
    expected[2:4] *= scale
    assert torch.equal(bank.before(x, segments), expected.view(2, 5, 9))
    assert torch.equal(x, before)
