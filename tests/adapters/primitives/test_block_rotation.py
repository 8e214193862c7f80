"""x R for the rows of each slot, before a module or behind it, and the input itself left alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.payloads.rotations import side_by_side
from deltamux.adapters.primitives.block_rotation import (
    InputRotation,
    InputRotationBank,
    OutputRotation,
    OutputRotationBank,
)
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments

Store = Callable[[int], PackedMatrices]


def test_the_module_sees_rotated_rows_and_its_siblings_do_not(
    store: Store, place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = InputRotationBank(store(12))
    small, large, x = torch.randn(4, 3, 3), torch.randn(2, 6, 6), torch.randn(2, 5, 12)
    place(bank, {1: InputRotation(side_by_side(small)), 0: InputRotation(side_by_side(large))})
    before, expected = x.clone(), x.clone().view(10, 12)
    expected[2:4] = expected[2:4] @ torch.block_diag(*small)
    expected[6:] = expected[6:] @ torch.block_diag(*large)
    torch.testing.assert_close(bank.before(x, segments), expected.view(2, 5, 12))
    assert torch.equal(x, before)


def test_the_rows_of_an_output_are_rotated_in_place(
    store: Store, place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = OutputRotationBank(store(12))
    blocks, y = torch.randn(4, 3, 3), torch.randn(10, 12)
    place(bank, {1: OutputRotation(side_by_side(blocks))})
    expected = y.clone()
    expected[2:4] = expected[2:4] @ torch.block_diag(*blocks)
    bank.after(torch.arange(10), y, segments)
    torch.testing.assert_close(y, expected)
