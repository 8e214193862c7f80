"""Launches captured once and replayed for other adapters: what a CUDA graph does, step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltamux_kernels import CapturedSegments, Columns, PackedMatrices, Segments, Slice
from deltamux_kernels.expand import expand_triton
from deltamux_kernels.grouped_dense import grouped_dense_triton
from deltamux_kernels.low_rank_site import SiteCounters, low_rank_site_triton
from deltamux_kernels.row_affine import row_affine_triton
from deltamux_kernels.shrink import shrink_triton

PackInOne = Callable[..., list[PackedMatrices]]
Spans = list[tuple[int, int, int]]
ROWS, WIDTH, SLOTS = 40, 96, 5
RANKS = (8, 0, 24, 3, 40)
STEPS: list[Spans] = [
    [(0, 0, 1), (1, 1, 5), (2, 5, 22), (4, 30, 31)],
    [(4, 0, 40)],
    [(3, 2, 3)],
    [(slot, slot * 8, slot * 8 + 8) for slot in range(SLOTS)],
    [],
]


class Site:
    """Every kind of op on one site; `act` is what a graph would capture."""

    def __init__(self, device: torch.device, dtype: torch.dtype, pack_in_one: PackInOne) -> None:
        torch.manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape) * 0.1).to(dtype).to(device)

        def per_slot(rows: tuple[int, ...]) -> list[torch.Tensor | None]:
            return [normal(count, WIDTH) if count else None for count in rows]

        self.x, self.y, self.before = normal(ROWS, WIDTH), normal(ROWS, WIDTH), normal(ROWS, WIDTH)
        rows = (RANKS, RANKS, (0, 1, 1, 0, 0), (0, 0, WIDTH, 0, WIDTH))
        stores = pack_in_one(*((per_slot(each), WIDTH) for each in rows))
        self.a, self.b, self.scale, self.dense = stores
        self.columns = Columns(SLOTS, device)
        self.counters = SiteCounters(CapturedSegments.capacity_for(ROWS, SLOTS), device)

    def act(self, segments: Segments) -> None:
        h = shrink_triton(self.x, self.a, segments)
        expand_triton(self.y, h, self.b, self.columns, segments)
        part = Slice(self.y, self.b, self.columns)
        low_rank_site_triton([part], self.x, self.a, segments, self.counters)
        row_affine_triton(self.y, None, self.scale, segments)
        grouped_dense_triton(self.y, self.x, self.dense, self.scale, segments)

    def result(self, act: Callable[[], object]) -> torch.Tensor:
        self.y.copy_(self.before)
        act()
        return self.y.clone()


@pytest.fixture
def captured(device: torch.device) -> CapturedSegments:
    return CapturedSegments(CapturedSegments.capacity_for(ROWS, SLOTS), SLOTS, device)


@pytest.fixture
def site(device: torch.device, dtype: torch.dtype, pack_in_one: PackInOne) -> Site:
    return Site(device, dtype, pack_in_one)


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
def test_one_capture_serves_any_adapters_to_the_bit(
    form: str,
    device: torch.device,
    site: Site,
    captured: CapturedSegments,
    traced: Callable[[], Any],
) -> None:
    with traced() as launches:
        site.act(captured)
    replays = list(launches)
    assert len(replays) == 5
    for spans in STEPS:
        step = Segments.build(spans, device)
        expected = site.result(lambda step=step: site.act(step))
        assert captured.fill(step)
        assert torch.equal(
            site.result(lambda: [launch.replay() for launch in replays]), expected
        ), spans
    assert not captured.outgrown


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
def test_a_rows_bits_do_not_depend_on_its_neighbours_in_any_op(
    form: str, device: torch.device, site: Site
) -> None:
    spans = [(0, 0, 1), (4, 1, 5), (2, 5, 22), (1, 22, 23)]
    together = site.result(lambda: site.act(Segments.build(spans, device)))
    for slot, row in ((0, 0), (4, 3), (2, 20), (1, 22)):
        alone = Segments.build([(slot, row, row + 1)], device)
        assert torch.equal(site.result(lambda alone=alone: site.act(alone))[row], together[row])


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_programs_of_no_tile_read_their_tile_and_leave(
    form: str,
    device: torch.device,
    site: Site,
    captured: CapturedSegments,
    traced: Callable[[], Any],
) -> None:
    captured.fill(Segments.build([], device))
    with traced() as launches:
        site.act(captured)
    for launch in launches:
        assert set(launch.read) <= {"tiles", "rows", "ranks", "weight_rows", "counters"}
        assert set(launch.written) <= {"counters"}


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32"], indirect=True)
def test_a_step_without_adapters_launches_nothing(
    form: str, device: torch.device, site: Site, traced: Callable[[], Any]
) -> None:
    """So that the second set of graphs, captured without rows, has no node of an adapter."""
    with traced() as launches:
        site.act(Segments.build([], device))
    assert launches == []


@pytest.mark.parametrize(("rows", "slots", "most"), [(1, 8, 1), (16, 1, 1), (17, 1, 2), (64, 4, 7)])
def test_the_capacity_is_that_of_the_worst_spans(rows: int, slots: int, most: int) -> None:
    device = torch.device("cpu")
    assert CapturedSegments.capacity_for(rows, slots) == most
    spans = min(rows, slots)
    worst = [(slot, slot, slot + 1) for slot in range(spans - 1)]
    worst.append((spans - 1, spans - 1, rows))
    assert len(Segments.build(worst, device).tile_list) <= most


def test_too_many_tiles_are_refused_and_the_same_ones_not_copied_again() -> None:
    device = torch.device("cpu")
    captured = CapturedSegments(2, 3, device)
    step = Segments.build([(0, 0, 1), (1, 1, 2)], device)
    assert captured.fill(step)
    captured.tiles.zero_()
    assert captured.fill(step) and not captured.tiles.any()
    assert not captured.fill(Segments.build([(0, 0, 1), (1, 1, 2), (2, 2, 3)], device))
    assert captured.fill(Segments.build([(2, 4, 7)], device))
    assert captured.tiles.tolist() == [[2, 4, 3], [3, 0, 0]]


def test_a_taller_matrix_outgrows_the_capture() -> None:
    device = torch.device("cpu")
    matrices, captured = PackedMatrices(torch.zeros(512), 2, 4), CapturedSegments(2, 2, device)
    matrices.write(0, 0, torch.ones(8, 4))
    assert captured.most_rows(matrices) == 8
    matrices.write(1, 64, torch.ones(8, 4))
    assert not captured.outgrown
    matrices.write(1, 64, torch.ones(9, 4))
    assert captured.outgrown
