"""Rows beside their experts: sorted, and cut into tiles of one expert and one slot."""

import pytest
import torch

from deltamux_kernels import CapturedSegments, Segments
from deltamux_kernels.expert_linear import expert_linear_cuda, expert_linear_torch
from deltamux_kernels.expert_pairs import ExpertPairs, expert_pairs_torch, expert_pairs_triton

SLOTS, EXPERTS = 5, 7
SPANS = {
    "nobody": [],
    "one row": [(4, 0, 1)],
    "all": [(2, 0, 90)],
    "some": [(1, 0, 17), (0, 20, 21), (4, 21, 80)],
}


def paired(
    form: str, chosen: torch.Tensor, segments: Segments
) -> tuple[ExpertPairs, list[tuple[int, ...]]]:
    """The pairs, and their tiles in order."""
    made = expert_pairs_torch if form == "torch" else expert_pairs_triton
    pairs = made(chosen, segments, SLOTS, EXPERTS)
    tiles = [tuple(tile) for tile in pairs.segments.tiles.tolist()]
    return pairs, sorted((t for t in tiles if t[0] != SLOTS * EXPERTS), key=lambda t: t[1])


@pytest.mark.parametrize("rows, k", [(90, 1), (90, 4), (1, 2)])
@pytest.mark.parametrize("spans", SPANS)
def test_pairs_are_in_order_of_their_expert_and_slot(
    spans: str, rows: int, k: int, form: str, device: torch.device
) -> None:
    torch.manual_seed(rows)
    mine = [(slot, start, end) for slot, start, end in SPANS[spans] if end <= rows]
    segments = Segments.build(mine, device)
    chosen = torch.stack([torch.randperm(EXPERTS)[:k] for _ in range(rows)])
    pairs, tiles = paired(form, chosen.to(device), segments)
    slots = torch.full((rows,), SLOTS)
    for slot, start, end in mine:
        slots[start:end] = slot
    each = [(int(e), int(slots[t]), p) for p, (t, e) in enumerate(_pairs(chosen))]
    assert pairs.order.tolist() == [p for _, _, p in sorted(each)]
    assert pairs.experts.tolist() == [e for e, _, _ in sorted(each)]
    counts = chosen.flatten().bincount(minlength=EXPERTS)
    assert pairs.ends.tolist() == counts.cumsum(0).tolist()
    expected = []
    groups = [(e, s) for e, s, _ in sorted(each)]
    for e, s in sorted(set(groups)):
        start, count = groups.index((e, s)), groups.count((e, s))
        if s < SLOTS:
            starts = range(start, start + count, 16)
            expected += [(s * EXPERTS + e, p, min(16, start + count - p)) for p in starts]
    assert tiles == expected


def _pairs(chosen: torch.Tensor) -> list[tuple[int, int]]:
    return [(t, e) for t, experts in enumerate(chosen.tolist()) for e in experts]


@pytest.mark.parametrize("form", ["triton"], indirect=True)
def test_segments_of_a_captured_step_give_the_same_pairs(form: str, device: torch.device) -> None:
    torch.manual_seed(0)
    chosen = torch.randint(EXPERTS, (90, 3), device=device)
    captured = CapturedSegments(CapturedSegments.capacity_for(90, SLOTS), SLOTS, device)
    for spans in SPANS.values():
        step = Segments.build(spans, device)
        assert captured.fill(step)
        given, tiles = paired(form, chosen, captured)
        expected, own = paired(form, chosen, step)
        assert torch.equal(given.order, expected.order) and tiles == own


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_pair_gets_the_product_of_its_expert(
    transposed: bool, biased: bool, device: torch.device, form: str
) -> None:
    torch.manual_seed(0)
    chosen = torch.randint(EXPERTS - 1, (30, 2), device=device)
    pairs, _ = paired(form, chosen, Segments.build([(1, 2, 9)], device))
    x = torch.randn(60, 16, device=device)
    weight = torch.randn(EXPERTS, 16, 24, device=device).transpose(1, 2)
    weight = weight if transposed else weight.contiguous()
    bias = torch.randn(EXPERTS, 24, device=device) if biased else None
    y = (expert_linear_torch if form == "torch" else expert_linear_cuda)(x, weight, bias, pairs)
    expected = torch.einsum("pk,pnk->pn", x.double(), weight.double()[pairs.experts])
    if bias is not None:
        expected += bias[pairs.experts]
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
