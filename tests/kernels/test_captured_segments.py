"""Launches captured once and replayed for other adapters: what a CUDA graph does, step by step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deltamux_kernels import (
    ALIGNMENT,
    CapturedSegments,
    Columns,
    NormForm,
    PackedMatrices,
    Segments,
    SignMatrices,
    Slice,
    SparseMatrices,
)
from deltamux_kernels.activate import Activations, activate_triton
from deltamux_kernels.block_rotate import block_rotate_triton
from deltamux_kernels.embedding_shrink import embedding_shrink_triton
from deltamux_kernels.expand import expand_triton
from deltamux_kernels.expand_slices import expand_slices_triton
from deltamux_kernels.grouped_dense import dense_delta_triton, grouped_dense_triton
from deltamux_kernels.packed import as_elements
from deltamux_kernels.pair_rotate import PairFactors, distance_elements, pair_rotate_triton
from deltamux_kernels.row_affine import row_affine_triton
from deltamux_kernels.row_bias import row_bias_triton
from deltamux_kernels.row_norm import row_norm_triton
from deltamux_kernels.shrink import shrink_triton
from deltamux_kernels.sign_delta import pack_signs, sign_delta_triton
from deltamux_kernels.sparse_delta import sparse_delta_triton
from deltamux_kernels.token_rows import TokenTable, token_columns_triton, token_rows_triton

# Every op on packed matrices: `compile_kernels.py` knows the same, and attention's two beside them.
EVERY_KERNEL = {
    "shrink_kernel",
    "expand_kernel",
    "activate_kernel",
    "embedding_shrink_kernel",
    "expand_slices_kernel",
    "sparse_delta_kernel",
    "sign_delta_kernel",
    "grouped_dense_kernel",
    "row_affine_kernel",
    "row_bias_kernel",
    "row_norm_kernel",
    "pair_rotate_kernel",
    "block_rotate_kernel",
    "token_rows_kernel",
    "token_columns_kernel",
}
# Of ops in `Site.act`: one launch each, and nothing beside them.
CALLS = 19
# The parameters by which a kernel knows whether a slot has something for it.
HAS_A_MATRIX = {"rows", "ranks", "weight_rows", "word_counts", "non_zeros", "counts"}
Spans = list[tuple[int, int, int]]
ROWS, WIDTH, SLOTS = 36, 64, 5
RANKS = {0: 8, 2: 24, 3: 3, 4: 40}
STEPS: list[Spans] = [
    [(0, 0, 1), (1, 1, 5), (2, 5, 22), (4, 30, 31)],
    [(4, 0, 36)],
    [(slot, slot * 7, slot * 7 + 7) for slot in range(SLOTS)],
    [],
]


class Site:
    """Every op on one site, each with its own slots; `act` is what a graph would capture."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype, self.device, self._end = dtype, device, ALIGNMENT
        self.arena = torch.full((1 << 16,), torch.nan, dtype=dtype, device=device)
        self.x, self.y, self.before, self.z = (self.normal(ROWS, WIDTH) for _ in range(4))
        self.ids = torch.randint(WIDTH, (ROWS,), device=device)
        self.a, self.b = self.stored(RANKS), self.stored(RANKS)
        self.scale = self.stored({1: 1, 2: 1})
        self.norms = self.stored({3: 2, 0: 1})
        self.dense = self.stored({2: WIDTH, 4: WIDTH})
        self.blocks = self.stored({1: 8, 3: 4})
        self.columns = Columns(SLOTS, device)
        self.activations = Activations(self.arena, SLOTS)
        for slot, rank in RANKS.items():
            column = Activations.column(self.normal(rank), "relu")
            self.write(self.activations.packed, slot, column)
        # A row more than the activated product has, for the bias behind it.
        self.up = self.stored({slot: rank + 1 for slot, rank in RANKS.items()})
        self._write_sparse(slot=1)
        self._write_signs(slot=0)
        self._write_factors(slot=3)
        self._write_tokens(slot=2)

    def normal(self, *shape: int) -> torch.Tensor:
        return (torch.randn(*shape) * 0.1).to(self.dtype).to(self.device)

    def write(self, store: PackedMatrices, slot: int, matrix: torch.Tensor) -> None:
        self._end = -(-self._end // ALIGNMENT) * ALIGNMENT
        store.write(slot, self._end, matrix)
        store.extend(matrix.shape[0])
        self._end += matrix.numel() + 1

    def stored(self, rows: dict[int, int]) -> PackedMatrices:
        store = PackedMatrices(self.arena, SLOTS, WIDTH)
        for slot, count in rows.items():
            self.write(store, slot, self.normal(count, WIDTH))
        return store

    def _write_sparse(self, slot: int) -> None:
        self.sparse = SparseMatrices(self.arena, SLOTS, WIDTH, WIDTH)
        by_row = (torch.rand(WIDTH, WIDTH) < 0.05).float().to_sparse_csr()
        self.write(self.sparse.values, slot, by_row.values()[:, None])
        for store, integers in (
            (self.sparse.columns, by_row.col_indices()),
            (self.sparse.starts, by_row.crow_indices()),
        ):
            self.write(store, slot, as_elements(integers.int(), self.dtype))

    def _write_signs(self, slot: int) -> None:
        self.signs = SignMatrices(self.arena, SLOTS, WIDTH, WIDTH)
        words = pack_signs(torch.rand(WIDTH, WIDTH) > 0.5)
        for store, elements in zip(
            (self.signs.words, self.signs.scales),
            self.signs.elements(words, torch.tensor([0.1])),
            strict=True,
        ):
            self.write(store, slot, elements)

    def _write_factors(self, slot: int) -> None:
        self.factors = PairFactors(self.arena, SLOTS, WIDTH)
        self.write(self.factors.factors, slot, self.normal(2, WIDTH))
        self.write(self.factors.distances, slot, distance_elements(16, self.dtype))

    def _write_tokens(self, slot: int) -> None:
        self.tokens = TokenTable(self.arena, SLOTS, WIDTH)
        ids = torch.arange(0, WIDTH, 3)
        self.write(self.tokens.ids, slot, as_elements(ids.int(), self.dtype))
        self.write(self.tokens.rows, slot, self.normal(len(ids), WIDTH))

    def act(self, segments: Segments) -> None:
        x, y = self.x, self.y
        h = shrink_triton(x, self.a, segments)
        expand_triton(y, h, self.b, self.columns, segments)
        a = activate_triton(h, self.activations, segments)
        expand_triton(y, a, self.up, self.columns, segments)
        embedded = embedding_shrink_triton(self.ids, self.a, segments)
        expand_triton(y, embedded, self.b, self.columns, segments)
        expand_slices_triton([Slice(y, self.b, self.columns)], h, segments)
        sparse_delta_triton(y, x, self.sparse, segments)
        sign_delta_triton(y, x, self.signs, segments)
        dense_delta_triton(y, x, self.dense, segments)
        row_affine_triton(y, None, self.scale, segments)
        row_bias_triton(y, self.scale, segments)
        for norm in (NormForm(1e-5), NormForm(1e-5, centred=True)):
            row_norm_triton(y, x, self.norms, norm, segments)
        pair_rotate_triton(y, self.factors, segments)
        token_columns_triton(y, x, self.tokens, segments)
        block_rotate_triton(self.z, y, self.blocks, segments)
        grouped_dense_triton(self.z, y, self.dense, self.scale, segments)
        token_rows_triton(self.z, self.ids, self.tokens, segments)

    def result(self, act: Callable[[], object]) -> torch.Tensor:
        """[ROWS, 2 WIDTH]: what was changed in place, and what was written beside it."""
        self.y.copy_(self.before)
        self.z.zero_()
        act()
        return torch.cat((self.y, self.z), 1)


@pytest.fixture
def captured(device: torch.device) -> CapturedSegments:
    return CapturedSegments(CapturedSegments.capacity_for(ROWS, SLOTS), SLOTS, device)


@pytest.fixture
def site(device: torch.device, dtype: torch.dtype) -> Site:
    return Site(device, dtype)


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
    assert {launch.name for launch in replays} == EVERY_KERNEL
    assert len(replays) == CALLS
    for spans in STEPS:
        step = Segments.build(spans, device)
        expected = site.result(lambda step=step: site.act(step))
        assert captured.fill(step)
        assert torch.equal(
            site.result(lambda: [launch.replay() for launch in replays]), expected
        ), spans


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
        assert set(launch.read) <= {"tiles", "offsets", "columns", "slices", *HAS_A_MATRIX}
        # A tuple of tables and an output: no more than an integer or two of each table.
        assert launch.read["slices"] <= 16 * len(captured.tiles)
        assert not launch.written


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


def test_launches_reach_what_they_were_extended_to() -> None:
    device = torch.device("cpu")
    matrices, captured = PackedMatrices(torch.zeros(512), 2, 4), CapturedSegments(2, 2, device)
    matrices.write(0, 0, torch.ones(8, 4))
    assert captured.most_rows(matrices) == 0
    assert matrices.extend(8) and captured.most_rows(matrices) >= 8
    assert not matrices.extend(8) and not matrices.extend(3)
    assert matrices.extend(40) and captured.most_rows(matrices) >= 40
    assert not matrices.extend(8) and captured.most_rows(matrices) >= 40


def test_what_the_host_reads_is_nobodys_and_must_say_so() -> None:
    device, arena = torch.device("cpu"), torch.zeros(512)
    captured = CapturedSegments(2, 2, device)
    assert captured.owners(PackedMatrices(arena, 2, 4, host_read=True)) == []
    with pytest.raises(AssertionError):
        captured.owners(PackedMatrices(arena, 2, 4))
    with pytest.raises(AttributeError, match="spans"):
        _ = captured.spans
