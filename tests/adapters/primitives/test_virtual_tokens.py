from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.primitives.virtual_tokens import VirtualTokens, VirtualTokensBank
from deltamux_kernels.segments import Segments
from deltamux_kernels.token_rows import TokenTable

WIDTH = 5


def test_rows_of_virtual_tokens_are_the_adapters_own(
    arena: torch.Tensor, place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = VirtualTokensBank(TokenTable(arena, 4, WIDTH))
    payloads = {0: VirtualTokens(torch.randn(3, WIDTH)), 1: VirtualTokens(torch.randn(2, WIDTH))}
    place(bank, payloads)
    # Slot 1 has rows 2 and 3, slot 3 row 4, slot 0 rows 6 to 9.
    ids = torch.tensor([[7, 8, -2, 9, 4, 5, -1, -2, -3, 0]])
    assert bank.before(ids, segments).tolist() == [[7, 8, 0, 9, 4, 5, 0, 0, 0, 0]]
    y = torch.randn(10, WIDTH)
    expected = y.clone()
    expected[2] = payloads[1].rows[1]
    expected[6:9] = payloads[0].rows
    bank.after(ids, y, segments)
    assert torch.equal(y, expected)
