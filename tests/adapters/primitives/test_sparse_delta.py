"""y += x S^T for the rows of each slot, against the dense product."""

from __future__ import annotations

import torch

from deltamux.adapters.primitives.sparse_delta import SparseDelta, SparseDeltaBank
from deltamux_kernels.segments import Segments
from deltamux_kernels.sparse_delta import SparseMatrices


def test_each_row_gets_the_product_of_its_own_slot(arena: torch.Tensor, segments: Segments) -> None:
    torch.manual_seed(0)
    bank = SparseDeltaBank(SparseMatrices(arena, 4, 9, 6))
    rows, columns = torch.tensor([8, 0, 3, 3]), torch.tensor([5, 1, 0, 0])
    payload = SparseDelta.of(rows, columns, torch.tensor([1.0, 2.0, 3.0, 4.0]), 9)
    for extent, (store, part) in enumerate(bank.pieces(payload)):
        store.write(0, 64 * extent, part)
    bank.placed(0, [0, 0, 0])
    dense = torch.zeros(9, 6)
    dense[8, 5], dense[0, 1], dense[3, 0] = 1, 2, 7
    x, y = torch.randn(2, 5, 6), torch.randn(10, 9)
    expected = y.clone()
    expected[6:] += x.view(10, 6)[6:] @ dense.T
    bank.after(x, y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:6], expected[:6])
