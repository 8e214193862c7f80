"""Attention within each sequence against the formula, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deltamux.engine.step.packed_attention import PackedAttention

LENGTHS = (5, 1, 12, 7)
HEADS, WIDTH = 3, 8


def formula(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """softmax(q k^T scale) v over the places less than `window` away; [H, n, D] each."""
    places = torch.arange(query.shape[1])
    scores = (query @ key.transpose(1, 2)) * scale
    scores[:, (places[:, None] - places).abs() >= window] = float("-inf")
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_sequences_see_themselves_alone(window: int | None, scale: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, sum(LENGTHS), WIDTH)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    attention = PackedAttention()
    attention.begin(LENGTHS)
    got, weights = attention(
        nn.Module(), query, key, value, None, scaling=scale, sliding_window=window, dropout=0.0
    )
    assert weights is None and got.shape == (1, sum(LENGTHS), HEADS, WIDTH)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        expected = formula(
            query[0, :, rows],
            key[0, :, rows],
            value[0, :, rows],
            WIDTH**-0.5 if scale is None else scale,
            window or 1000,
        )
        torch.testing.assert_close(got[0, rows].transpose(0, 1), expected)
        start += length
