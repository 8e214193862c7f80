"""What only some encoders have: positions that leave padding out."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from deltamux.base.encoders import padded_positions

PADDING = 1


def test_positions_count_what_is_no_padding_in_each_sequence() -> None:
    ids = torch.tensor([5, 6, PADDING, 7, 8, PADDING, 9])
    positions = padded_positions(ids, torch.tensor([0, 4, 7]), PADDING)
    assert positions.tolist() == [2, 3, 1, 4, 2, 1, 3]


def test_positions_ask_for_no_number_of_a_tensor() -> None:
    """On a GPU, the host would have to wait for it."""
    with FakeTensorMode():
        ids, starts = torch.zeros(7, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        assert padded_positions(ids, starts, PADDING).shape == (7,)
