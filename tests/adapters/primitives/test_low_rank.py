"""y += (x A^T) B for the rows of each slot, by the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deltamux.adapters.primitives.low_rank import LowRank, LowRankBank, SharedInput
from deltamux_kernels.expand import Columns
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


@pytest.fixture
def shared(store: Callable[[int], PackedMatrices]) -> SharedInput:
    return SharedInput(store(6), 6)


def bank_of(shared: SharedInput, last: bool, store: Callable[[int], PackedMatrices]) -> LowRankBank:
    return LowRankBank(shared, last, store(9), Columns(4, torch.device("cpu")))


def test_each_row_gets_the_product_of_its_own_slot(
    shared: SharedInput,
    store: Callable[[int], PackedMatrices],
    place: Callable[..., None],
    segments: Segments,
) -> None:
    torch.manual_seed(0)
    payloads = {
        slot: LowRank(torch.randn(rank, 6), torch.randn(rank, 9)) for slot, rank in ((0, 2), (1, 5))
    }
    bank = bank_of(shared, True, store)
    place(bank, payloads)
    x, y = torch.randn(2, 5, 6), torch.randn(10, 9)
    expected = y.double()
    for slot, start, end in segments.spans:
        if slot in payloads:
            a, b = (tensor.double() for tensor in payloads[slot].tensors)
            expected[start:end] += x.view(10, 6)[start:end].double() @ a.T @ b
    untouched = y[[0, 1, 4, 5]].clone()
    bank.after(x, y, segments)
    torch.testing.assert_close(y, expected.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(y[[0, 1, 4, 5]], untouched)


def test_a_new_input_is_never_taken_for_the_former_one(
    shared: SharedInput,
    store: Callable[[int], PackedMatrices],
    place: Callable[..., None],
    segments: Segments,
) -> None:
    """The last site of a group may not be called: then the next input finds an old product."""
    first = bank_of(shared, False, store)
    place(first, {0: LowRank(torch.ones(1, 6), torch.ones(1, 9))})
    once, twice = torch.zeros(10, 9), torch.zeros(10, 9)
    first.after(torch.ones(10, 6), once, segments)
    first.after(2 * torch.ones(10, 6), twice, segments)
    assert torch.equal(twice, 2 * once)
    assert once[6:].eq(6).all()


def test_the_sites_of_a_group_are_in_use_together(
    shared: SharedInput, store: Callable[[int], PackedMatrices]
) -> None:
    assert bank_of(shared, False, store).slots is bank_of(shared, True, store).slots
