"""A change of a weight takes the smaller of its two exact forms."""

from __future__ import annotations

import pytest
import torch

from deltamux.adapters.payloads.low_rank_delta import smallest
from deltamux.adapters.primitives.dense import DenseDelta
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.base.structure import SiteSpec
from deltamux.errors import FailedPrecondition

SITE = SiteSpec("linear", "linear", in_features=12, out_features=6)


@pytest.mark.parametrize(("rank", "kind"), [(3, LowRank), (4, DenseDelta), (0, type(None))])
def test_factors_are_multiplied_out_where_the_matrix_is_smaller(rank: int, kind: type) -> None:
    a, b = torch.randn(rank, 12), torch.randn(6, rank)
    payload = smallest(SITE, (a, b))
    assert type(payload) is kind
    if isinstance(payload, LowRank):
        torch.testing.assert_close(payload.b.T @ payload.a, b @ a)
    if isinstance(payload, DenseDelta):
        torch.testing.assert_close(payload.delta, b @ a)


def test_a_change_of_another_size_is_refused() -> None:
    for change in (torch.zeros(12, 6), (torch.zeros(2, 12), torch.zeros(12, 2))):
        with pytest.raises(FailedPrecondition) as caught:
            smallest(SITE, change)
        assert caught.value.reason == "BASE_MISMATCH"
