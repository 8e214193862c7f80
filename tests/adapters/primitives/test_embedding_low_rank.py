"""y += A[:, id] B for the rows of each slot, by the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.primitives.embedding_low_rank import EmbeddingLowRank, EmbeddingLowRankBank
from deltamux_kernels.expand import Columns
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


def test_each_row_gets_the_lookup_of_its_own_slot(
    store: Callable[[int], PackedMatrices], place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = EmbeddingLowRankBank(store(13), store(9), Columns(4, torch.device("cpu")))
    payloads = {
        slot: EmbeddingLowRank(torch.randn(rank, 13), torch.randn(rank, 9))
        for slot, rank in ((0, 2), (1, 5))
    }
    place(bank, payloads)
    ids, y = torch.randint(0, 13, (1, 10)), torch.randn(10, 9)
    expected = y.double()
    for slot, start, end in segments.spans:
        if slot in payloads:
            a, b = (tensor.double() for tensor in payloads[slot].tensors)
            expected[start:end] += a[:, ids[0, start:end]].T @ b
    bank.after(ids, y, segments)
    torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
