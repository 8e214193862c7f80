"""Drawn places do not change with versions of torch, and lie in the matrix."""

from __future__ import annotations

import torch

from deltamux.adapters.peft.drawn_places import DrawnPlaces
from deltamux.base.structure import SiteSpec


def test_places_are_those_that_peft_drew_in_2025() -> None:
    rows, columns = DrawnPlaces(777).of(SiteSpec("q", "linear", 48, 32), 8)
    assert rows.tolist() == [23, 3, 20, 20, 9, 6, 10, 20]
    assert columns.tolist() == [23, 46, 45, 44, 39, 8, 3, 4]


def test_fewer_places_are_the_first_of_many() -> None:
    places, site = DrawnPlaces(3), SiteSpec("q", "linear", 5, 7)
    many = torch.stack(places.of(site, 35))
    assert torch.equal(torch.stack(places.of(site, 4)), many[:, :4])
    assert sorted(map(tuple, many.T.tolist())) == [(row, c) for row in range(7) for c in range(5)]
