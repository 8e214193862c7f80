"""shrink and expand against the formula in float64: mixed ranks, slices, gaps and poison."""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from deltamux_kernels import (
    ALIGNMENT,
    Columns,
    PackedMatrices,
    Segments,
    Slice,
    native,
)
from deltamux_kernels.expand import expand, expand_torch
from deltamux_kernels.expand_slices import expand_slices
from deltamux_kernels.shrink import (
    SPLIT_ROWS,
    Shrunk,
    shrink_native,
    shrink_torch,
    shrink_triton,
)

Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]
PackInOne = Callable[..., list[PackedMatrices]]
# The package's own name `shrink` is the function.
shrink_module = importlib.import_module("deltamux_kernels.shrink")
every_form = pytest.mark.parametrize("form", ["torch", "native", "triton"], indirect=True)
RANKS = (1, 2, 3, 4, 7, 8, 16, 17, 24, 40)


@dataclass
class Case:
    """One site: adapters with 1 to 3 slices that share x, and the spans of a step."""

    x: torch.Tensor
    ys: list[torch.Tensor]
    a: list[torch.Tensor | None]  # per slot, slices stacked
    b: list[list[torch.Tensor | None]]  # per slice, per slot
    columns: list[list[int]]
    segments: Segments


def draw(
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    width: int | None = None,
    rank: int | None = None,
) -> Case:
    """A random step; `rank` is the first slot's in its first slice."""
    pick, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    width = width or pick.choice((1, 5, 33, 64, 130, 600))
    outputs = [pick.choice((1, 17, 64, 129, 200)) for _ in range(pick.randint(1, 3))]
    slots = 2 if rank else pick.randint(1, 6)
    a: list[torch.Tensor | None] = []
    b: list[list[torch.Tensor | None]] = [[] for _ in outputs]
    columns: list[list[int]] = [[] for _ in outputs]
    for slot in range(slots):
        # A slice of rank 0 is a layer that the adapter leaves alone.
        ranks = [pick.choice((0, *RANKS)) for _ in outputs]
        if rank and slot == 0:
            ranks[0] = rank
        a.append(normal(sum(ranks), width) if sum(ranks) else None)
        for index, (n, rank) in enumerate(zip(outputs, ranks, strict=True)):
            b[index].append(normal(rank, n) if rank else None)
            columns[index].append(sum(ranks[:index]))
    spans, row = [], 0
    for slot in pick.sample(range(slots), k=slots):
        row += pick.choice((0, 0, 1, 5))
        rows = pick.choice((0, 1, 1, 2, 15, 16, 17, 33))
        spans.append((slot, row, row + rows))
        row += rows
    row += pick.choice((1, 3))
    return Case(
        normal(row, width),
        [normal(row, n) for n in outputs],
        a,
        b,
        columns,
        Segments.build(spans, device),
    )


def packed(case: Case, pack_in_one: PackInOne) -> tuple[PackedMatrices, list[Slice]]:
    """A and the slices of the site, with copies of what is in their outputs."""
    slots, widths = len(case.a), [y.shape[1] for y in case.ys]
    a, *bs = pack_in_one((case.a, case.x.shape[1]), *zip(case.b, widths, strict=True))
    slices = []
    for y, b, first in zip(case.ys, bs, case.columns, strict=True):
        columns = Columns(slots, case.x.device)
        for slot, column in enumerate(first):
            columns.set(slot, column)
        slices.append(Slice(y.clone(), b, columns))
    return a, slices


def run(
    case: Case, form: str, pack_in_one: PackInOne, split_rows: int = SPLIT_ROWS
) -> list[torch.Tensor]:
    """One shrink, then an expand for each slice."""
    a, slices = packed(case, pack_in_one)
    h = shrunk(case, form, a, split_rows)
    for y, b, columns in slices:
        expand(y, h, b, columns, case.segments)
    return [part.y for part in slices]


def shrunk(case: Case, form: str, a: PackedMatrices, split_rows: int = SPLIT_ROWS) -> Shrunk:
    if form == "torch":
        return shrink_torch(case.x, a, case.segments)
    if form == "native":
        return shrink_native(case.x, a, case.segments)
    return shrink_triton(case.x, a, case.segments, split_rows)


def run_site(case: Case, form: str, pack_in_one: PackInOne) -> list[torch.Tensor]:
    """One shrink, then all expands at once."""
    a, slices = packed(case, pack_in_one)
    expand_slices(slices, shrunk(case, form, a), case.segments)
    return [part.y for part in slices]


def check(case: Case, ys: list[torch.Tensor], dtype: torch.dtype) -> None:
    """Each error within a few roundings of the absolute values that were summed."""
    for before, y, matrices, first in zip(case.ys, ys, case.b, case.columns, strict=True):
        expected, summed = before.double(), before.double().abs()
        untouched = torch.ones(len(before), dtype=torch.bool, device=before.device)
        for slot, start, end in case.segments.spans:
            a, b = case.a[slot], matrices[slot]
            if a is None or b is None:
                continue
            rows = a[first[slot] : first[slot] + len(b)].double().t()
            x = case.x[start:end].double()
            expected[start:end] += x @ rows @ b.double()
            summed[start:end] += x.abs() @ rows.abs() @ b.double().abs()
            untouched[start:end] = False
        bits = torch.int32 if dtype == torch.float32 else torch.int16
        assert torch.equal(y[untouched].view(bits), before[untouched].view(bits))
        assert ((y.double() - expected).abs() <= 2 * torch.finfo(dtype).eps * summed).all()


@pytest.fixture
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge between shrink and expand starts as NaN: nothing unwritten may be read."""
    new = shrink_module.new_products
    monkeypatch.setattr(shrink_module, "new_products", lambda *a: new(*a).fill_(torch.nan))


@every_form
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.usefixtures("poisoned_scratch")
def test_random_steps_agree_with_the_formula(
    seed: int, form: str, dtype: torch.dtype, device: torch.device, pack_in_one: PackInOne
) -> None:
    case = draw(seed, device, dtype)
    check(case, run(case, form, pack_in_one), dtype)


@every_form
@pytest.mark.parametrize("seed", [0, 3, 9, 99])
@pytest.mark.usefixtures("poisoned_scratch")
def test_a_site_at_once_is_the_shrink_and_its_expands_to_the_bit(
    seed: int, form: str, dtype: torch.dtype, device: torch.device, pack_in_one: PackInOne
) -> None:
    case = draw(seed, device, dtype, width=1100 if seed == 99 else None)
    expected, ys = run(case, form, pack_in_one), run_site(case, form, pack_in_one)
    assert all(torch.equal(y, e) for y, e in zip(ys, expected, strict=True))
    check(case, ys, dtype)


@every_form
@pytest.mark.parametrize("rows", [1, 2])
def test_decode_steps_of_many_adapters_agree_with_the_formula(
    rows: int, form: str, dtype: torch.dtype, device: torch.device, pack_in_one: PackInOne
) -> None:
    """One or two rows a span, side by side, rows without an adapter after them."""
    case = draw(3, device, dtype)
    slots = [slot for slot, a in enumerate(case.a) if a is not None]
    spans = [(slot, i * rows, (i + 1) * rows) for i, slot in enumerate(slots)]
    total = len(slots) * rows + 2
    decode = replace(
        case,
        x=case.x[:1].expand(total, -1)
        * torch.arange(1, total + 1, device=device)[:, None].to(dtype),
        ys=[y[:1].expand(total, -1).contiguous() for y in case.ys],
        segments=Segments.build(spans, device),
    )
    assert len(slots) >= 4
    check(decode, run(decode, form, pack_in_one), dtype)


@pytest.mark.parametrize("form", ["torch", "native"], indirect=True)
def test_repeated_and_changed_spans_each_get_their_own_rows(
    form: str, pack: Pack, dtype: torch.dtype
) -> None:
    """Spans are kept for the next step, and matrices are found where they are then."""
    shrink = shrink_native if form == "native" else shrink_torch
    a, b = [torch.eye(4)[:2] for _ in range(6)], [torch.full((2, 3), float(s)) for s in range(6)]
    packed_a, packed_b, columns = pack(a, 4), pack(b, 3), Columns(6, torch.device("cpu"))
    x = torch.ones(5, 4, dtype=dtype)
    for slots in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [5, 4, 3, 2, 1]):
        segments = Segments.build([(s, i, i + 1) for i, s in enumerate(slots)], x.device)
        y = torch.zeros(5, 3, dtype=dtype)
        expand(y, shrink(x, packed_a, segments), packed_b, columns, segments)
        assert y[:, 0].tolist() == [2.0 * slot for slot in slots]
    packed_b.write(5, ALIGNMENT, torch.full((2, 3), 9.0))
    columns.set(5, 0)
    y = torch.zeros(5, 3, dtype=dtype)
    expand(y, shrink(x, packed_a, segments), packed_b, columns, segments)
    assert y[0, 0] == 18.0


@pytest.mark.parametrize("form", ["torch", "native"], indirect=True)
def test_a_slot_that_lost_its_matrix_at_one_slice_is_left_alone_there(
    form: str, pack: Pack, dtype: torch.dtype
) -> None:
    """The next adapter of a slot may act at a sibling only; the spans stay the same."""
    shrink = shrink_native if form == "native" else shrink_torch
    a, b = [torch.eye(4)[:2] for _ in range(4)], [torch.ones(2, 3) for _ in range(4)]
    packed_a, packed_b, columns = pack(a, 4), pack(b, 3), Columns(4, torch.device("cpu"))
    x, y = torch.ones(4, 4, dtype=dtype), torch.zeros(4, 3, dtype=dtype)
    segments = Segments.build([(slot, slot, slot + 1) for slot in range(4)], x.device)
    expand(y, shrink(x, packed_a, segments), packed_b, columns, segments)
    packed_a.write(1, 0, torch.full((3, 4), 5.0, dtype=dtype))
    packed_b.clear(1)
    expand(y, shrink(x, packed_a, segments), packed_b, columns, segments)
    assert y[:, 0].tolist() == [4.0, 2.0, 4.0, 4.0]


@every_form
@pytest.mark.parametrize("split_rows", [0, 256])
@pytest.mark.usefixtures("poisoned_scratch")
def test_rank_256_and_several_chunks_agree_with_the_formula(
    split_rows: int,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack_in_one: PackInOne,
) -> None:
    case = draw(99, device, dtype, width=1100, rank=256)
    for _ in range(2):  # what the first time has counted must be zero again
        check(case, run(case, form, pack_in_one, split_rows), dtype)
    assert not case.segments.counters.any()


@every_form
def test_a_step_without_adapters_changes_nothing(
    form: str, dtype: torch.dtype, device: torch.device, pack_in_one: PackInOne
) -> None:
    case = draw(1, device, dtype)
    case.segments = Segments.build([], device)
    for y, before in zip(run(case, form, pack_in_one), case.ys, strict=True):
        assert torch.equal(y, before)


@pytest.mark.parametrize("form", ["native", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float32", "float16"], indirect=True)
def test_a_rows_bits_depend_on_neither_neighbours_nor_the_size_of_the_batch(
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack_in_one: PackInOne,
) -> None:
    case = draw(3, device, dtype, width=1100, rank=24)
    slot, rows = 0, 21
    case.x = torch.randn(rows, case.x.shape[1]).to(case.x)
    case.ys = [torch.randn(rows, y.shape[1]).to(y) for y in case.ys]
    case.segments = Segments.build([(slot, 0, rows)], device)
    together = run(case, form, pack_in_one)
    unsplit = run(case, form, pack_in_one, split_rows=0)
    case.x, case.ys = case.x[17:18], [y[17:18] for y in case.ys]
    case.segments = Segments.build([(slot, 0, 1)], device)
    alone = run(case, form, pack_in_one)
    for one, many, whole in zip(alone, together, unsplit, strict=True):
        assert torch.equal(one[0], many[17])
        assert torch.equal(many, whole)


@pytest.mark.skipif(not native.available(), reason="there is no C compiler")
@pytest.mark.parametrize(("width", "columns"), [(37, 70), (16, 133), (100, 2100)])
def test_a_rows_bits_do_not_depend_on_how_many_rows_its_span_has(width: int, columns: int) -> None:
    """Any cut into chunks, tiles and single rows, for ranks that are cut in every way as well."""
    arena = torch.empty(70 * (width + columns) + 2 * ALIGNMENT)
    a, b = PackedMatrices(arena, 1, width), PackedMatrices(arena, 1, columns)
    x, before, first = torch.randn(70, width), torch.randn(70, columns), Columns(1, arena.device)

    def answer(start: int, end: int) -> torch.Tensor:
        segments = Segments.build([(0, 0, end - start)], arena.device)
        y = before[start:end].clone()
        expand(y, shrink_native(x[start:end], a, segments), b, first, segments)
        return y

    for rank in range(1, 71):
        a.write(0, 0, torch.randn(rank, width))
        b.write(0, -(-70 * width // ALIGNMENT) * ALIGNMENT, torch.randn(rank, columns))
        alone = torch.cat([answer(row, row + 1) for row in range(70)])
        for rows in range(1 + rank % 5, 71, 5):
            assert torch.equal(answer(0, rows), alone[:rows])


@pytest.mark.skipif(not native.available(), reason="there is no C compiler")
@pytest.mark.parametrize(("width", "columns"), [(1540, 512), (769, 2500)])
def test_a_rows_bits_do_not_depend_on_the_threads(width: int, columns: int) -> None:
    """Any cut of the work leaves every row of 70, of 1 and of none in a slot as it is."""
    arena = torch.randn(1 << 18)
    a, b = PackedMatrices(arena, 3, width), PackedMatrices(arena, 3, columns)
    for slot, rank in ((0, 13), (1, 20)):
        a.write(slot, slot << 15, torch.randn(rank, width))
        b.write(slot, (2 + slot) << 16, torch.randn(rank, columns))
    segments = Segments.build([(0, 0, 70), (1, 71, 72), (2, 73, 75)], arena.device)
    x, before = torch.randn(75, width), torch.randn(75, columns)
    answers = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        answers.append(y := before.clone())
        expand(y, shrink_native(x, a, segments), b, Columns(3, arena.device), segments)
    torch.set_num_threads(threads)
    assert all(torch.equal(y, answers[0]) for y in answers)


@pytest.mark.skipif(not native.available(), reason="there is no C compiler")
@pytest.mark.parametrize(
    ("width", "columns"), [(37, 70), (16, 133), (100, 2100), (1, 31), (768, 512)]
)
def test_bfloat16_numbers_give_the_bits_that_they_give_as_floats(width: int, columns: int) -> None:
    """Side by side with a slot of floats, as many rows and ranks as are cut in any way."""
    x, before = torch.randn(83, width), torch.randn(83, columns)
    segments = Segments.build([(0, 0, 1), (2, 1, 6), (1, 8, 40), (3, 40, 83)], x.device)
    ranks = (1, 7, 9, 38)
    a = [torch.randn(rank, width).bfloat16() for rank in ranks]
    b = [torch.randn(rank, columns).bfloat16() for rank in ranks]
    answers = []
    for halves in (False, True):
        arena = torch.full((55 * (width + columns) + 8 * ALIGNMENT,), torch.nan)
        stores = [PackedMatrices(arena, 4, n, halves=halves) for n in (width, columns)]
        end = 0
        for store, matrices in zip(stores, (a, b), strict=True):
            for slot, matrix in enumerate(matrices):
                store.write(slot, end, matrix.float() if slot == 2 else matrix)
                end += -(-matrix.numel() // ALIGNMENT) * ALIGNMENT
        h = shrink_native(x, stores[0], segments)
        expand(y := before.clone(), h, stores[1], Columns(4, x.device), segments)
        answers.append(y)
    assert torch.equal(*answers) and not answers[0].isnan().any()


@pytest.mark.skipif(not native.available(), reason="there is no C compiler")
def test_an_output_whose_columns_are_apart_is_computed_all_the_same() -> None:
    arena = torch.randn(1000)
    a, b = PackedMatrices(arena, 1, 5), PackedMatrices(arena, 1, 6)
    a.write(0, 0, torch.randn(3, 5))
    b.write(0, 64, torch.randn(3, 6))
    x, segments = torch.randn(4, 5), Segments.build([(0, 1, 3)], arena.device)
    whole, columns = torch.zeros(4, 6), Columns(1, arena.device)
    apart = torch.zeros(6, 4).t()
    for y in (whole, apart):
        expand(y, shrink_native(x, a, segments), b, columns, segments)
    torch.testing.assert_close(apart, whole)
    assert whole[1:3].all()


def test_without_a_compiler_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    arena = torch.zeros(200)
    a, b = PackedMatrices(arena, 1, 4), PackedMatrices(arena, 1, 3)
    a.write(0, 0, torch.ones(2, 4))
    b.write(0, 64, torch.ones(2, 3))
    segments = Segments.build([(0, 0, 1)], arena.device)
    h = importlib.import_module("deltamux_kernels.shrink").shrink(torch.ones(1, 4), a, segments)
    assert isinstance(h, list)
    expand_torch(y := torch.zeros(1, 3), h, b, Columns(1, arena.device), segments)
    assert y.tolist() == [[8.0, 8.0, 8.0]]
