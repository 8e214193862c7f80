"""Pairs of output features are mixed for the rows of each slot."""

from __future__ import annotations

from collections.abc import Callable

import torch

from deltamux.adapters.primitives.pair_rotation import PairRotation, PairRotationBank
from deltamux_kernels.pair_rotate import PairFactors
from deltamux_kernels.segments import Segments


def test_each_slot_pairs_features_at_its_own_distance(
    arena: torch.Tensor, place: Callable[..., None], segments: Segments
) -> None:
    torch.manual_seed(0)
    bank = PairRotationBank(PairFactors(arena, 4, 12))
    near, far = PairRotation(torch.randn(2, 12), 1), PairRotation(torch.randn(2, 12), 6)
    place(bank, {1: near, 0: far})
    y = torch.randn(10, 12)
    expected = y.clone()
    for rows, payload in ((slice(2, 4), near), (slice(6, 10), far)):
        partner = torch.arange(12).view(-1, 2, payload.distance).flip(1).flatten()
        own, other = payload.factors
        expected[rows] = y[rows] * own + y[rows][:, partner] * other
    bank.after(torch.randn(10, 5), y, segments)
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[[0, 1, 4, 5]], expected[[0, 1, 4, 5]])
