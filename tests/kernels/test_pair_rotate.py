"""Rotated pairs against float64, groups of unequal size, and rows that have no factors."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import ALIGNMENT, PairFactors, Segments
from deltamux_kernels.pair_rotate import distance_elements, pair_rotate_torch, pair_rotate_triton


@pytest.mark.parametrize(("width", "distances"), [(2, (1, 1)), (24, (3, 12)), (384, (16, 192))])
def test_pairs_of_their_own_slot_are_rotated_and_the_other_rows_keep_their_bits(
    width: int,
    distances: tuple[int, int],
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(width)
    extent = ALIGNMENT * width
    arena = torch.full((8 * extent,), torch.nan, dtype=dtype, device=device)
    factors = {slot: torch.randn(2, width).to(dtype) for slot in (0, 2)}
    pairs = PairFactors(arena, 3, width)
    for place, (slot, distance) in enumerate(zip(factors, distances, strict=True)):
        pairs.factors.write(slot, 2 * place * extent, factors[slot])
        pairs.distances.write(slot, (6 + place) * extent, distance_elements(distance, dtype))
        pairs.placed(slot)
    before = torch.randn(25, width).to(dtype).to(device)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected = before.double()
    for rows, slot, d in ((slice(1, 19), 2, distances[1]), (slice(22, 23), 0, distances[0])):
        partner = torch.arange(width).view(-1, 2, d).flip(1).flatten()
        own, other = factors[slot].double().to(device)
        given = before[rows].double()
        expected[rows] = given * own + given[:, partner] * other
    y = as_columns(before)
    (pair_rotate_torch if form == "torch" else pair_rotate_triton)(y, pairs, segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 8 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
