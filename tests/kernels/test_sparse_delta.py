"""Sparse deltas against the dense product in float64, and rows that have none."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import ALIGNMENT, Segments
from deltamux_kernels.packed import as_elements
from deltamux_kernels.sparse_delta import SparseMatrices, sparse_delta_torch, sparse_delta_triton

Write = Callable[[SparseMatrices, int, torch.Tensor], None]


@pytest.fixture
def arena(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((1 << 15,), torch.nan, dtype=dtype, device=device)


@pytest.fixture
def write(dtype: torch.dtype, device: torch.device) -> Write:
    """write(matrices, slot, dense): one part behind the other."""
    end = ALIGNMENT

    def write(matrices: SparseMatrices, slot: int, dense: torch.Tensor) -> None:
        nonlocal end
        rows, columns = dense.nonzero(as_tuple=True)
        starts = torch.zeros(dense.shape[0] + 1, dtype=torch.int32)
        starts[1:] = torch.bincount(rows, minlength=dense.shape[0]).cumsum(0)
        for store, part in (
            (matrices.values, dense[rows, columns].to(dtype)[:, None]),
            (matrices.columns, as_elements(columns.int(), dtype)),
            (matrices.starts, as_elements(starts, dtype)),
        ):
            store.write(slot, end, part)
            end += -(-part.numel() // ALIGNMENT) * ALIGNMENT
        matrices.placed(slot)

    return write


def sparse(rows: int, columns: int, share: float) -> torch.Tensor:
    return torch.randn(rows, columns) * (torch.rand(rows, columns) < share)


@pytest.mark.parametrize("shape", [(1, 1), (77, 40), (130, 9)])
def test_rows_get_the_product_of_their_own_slot_and_the_others_keep_their_bits(
    shape: tuple[int, int],
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    arena: torch.Tensor,
    write: Write,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(shape[0])
    matrices = SparseMatrices(arena, 4, *shape)
    dense = {0: sparse(*shape, share=0.2), 2: sparse(*shape, share=0.02)}
    dense[2][0, 0] = dense[0][-1, -1] = 1.5
    dense = {slot: matrix.to(dtype) for slot, matrix in dense.items()}
    for slot, matrix in dense.items():
        write(matrices, slot, matrix)
    before = torch.randn(25, shape[0]).to(dtype).to(device)
    x = torch.randn(25, shape[1]).to(dtype).to(device)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected = before.double()
    for slot, start, end in segments.spans:
        if slot in dense:
            expected[start:end] += x[start:end].double() @ dense[slot].double().to(device).T
    y = as_columns(before)
    (sparse_delta_torch if form == "torch" else sparse_delta_triton)(y, x, matrices, segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 16 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


def test_a_cleared_slot_adds_nothing_whatever_comes_to_lie_there(
    form: str, device: torch.device, dtype: torch.dtype, arena: torch.Tensor, write: Write
) -> None:
    matrices = SparseMatrices(arena, 2, 5, 3)
    write(matrices, 0, torch.ones(5, 3))
    for part in (matrices.values, matrices.columns, matrices.starts):
        part.clear(0)
    arena.fill_(torch.nan)
    y, x = torch.zeros(2, 5, dtype=dtype, device=device), torch.ones(2, 3).to(dtype).to(device)
    segments = Segments.build([(0, 0, 2)], device)
    (sparse_delta_torch if form == "torch" else sparse_delta_triton)(y, x, matrices, segments)
    assert y.eq(0).all()


def test_memory_is_that_of_the_non_zeros(
    form: str, dtype: torch.dtype, arena: torch.Tensor, write: Write
) -> None:
    matrices, dense = SparseMatrices(arena, 1, 64, 64), torch.zeros(64, 64)
    dense[3, 7] = dense[9, 1] = 1
    write(matrices, 0, dense)
    taken = sum(part.rows_of(0) for part in (matrices.values, matrices.columns, matrices.starts))
    assert taken * dtype.itemsize == 2 * dtype.itemsize + 2 * 4 + 65 * 4
