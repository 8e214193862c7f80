"""y += a (x D^T) for the rows of each slot, against the dense product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.primitives.sign_delta import SignDelta, SignDeltaBank
from deltamux_kernels.segments import Segments
from deltamux_kernels.sign_delta import SignMatrices, pack_signs


def test_each_row_gets_the_product_of_its_own_slot(
    arena: torch.Tensor, segments: Segments, place: Callable[..., None]
) -> None:
    torch.manual_seed(0)
    bank = SignDeltaBank(SignMatrices(arena, 4, 9, 40))
    positive, scale = torch.rand(9, 40) < 0.5, torch.tensor([0.1])
    place(bank, {0: SignDelta(pack_signs(positive), scale)})
    x, y = torch.randn(2, 5, 40), torch.randn(10, 9)
    expected = y.clone()
    expected[6:] += 0.1 * x.view(10, 40)[6:] @ torch.where(positive, 1.0, -1.0).T
    bank.after(x, y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:6], expected[:6])
