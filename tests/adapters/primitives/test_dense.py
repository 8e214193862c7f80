"""Rows of each slot get that slot's own product, or its own embeddings."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from deltamux.adapters.primitives.dense import (
    Dense,
    DenseBank,
    DenseDelta,
    DenseDeltaBank,
    DenseEmbedding,
    DenseEmbeddingBank,
)
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments

Store = Callable[[int], PackedMatrices]
Place = Callable[..., None]


def test_a_product_replaces_the_bases_with_and_without_a_bias(
    store: Store, place: Place, segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = DenseBank(store(6), store(9))
    biased, plain = Dense(torch.randn(9, 6), torch.randn(9)), Dense(torch.randn(9, 6))
    place(bank, {0: biased, 1: plain})
    x, y = torch.randn(2, 5, 6), torch.randn(10, 9)
    expected, rows = y.clone(), x.view(10, 6)
    expected[6:] = linear(rows[6:], biased.weight, biased.bias)
    expected[2:4] = linear(rows[2:4], plain.weight)
    bank.after(x, y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])


def test_a_delta_is_added_to_the_bases_product(
    store: Store, place: Place, segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = DenseDeltaBank(store(6))
    payload = DenseDelta(torch.randn(9, 6))
    place(bank, {0: payload})
    x, y = torch.randn(2, 5, 6), torch.randn(10, 9)
    expected = y.clone()
    expected[6:] += linear(x.view(10, 6)[6:], payload.delta)
    bank.after(x, y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[:6], expected[:6])


def test_a_table_replaces_the_bases(store: Store, place: Place, segments: Segments) -> None:
    torch.manual_seed(0)
    bank = DenseEmbeddingBank(store(9))
    payload = DenseEmbedding(torch.randn(13, 9))
    place(bank, {1: payload})
    ids, y = torch.randint(0, 13, (1, 10)), torch.randn(10, 9)
    expected = y.clone()
    expected[2:4] = payload.table[ids[0, 2:4]]
    bank.after(ids, y, segments)
    assert torch.equal(y, expected)
