"""Deltas of one bit against the dense product in float64, and rows that have none."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import ALIGNMENT, Segments
from deltamux_kernels.sign_delta import (
    SignMatrices,
    pack_signs,
    sign_delta_torch,
    sign_delta_triton,
    unpack_signs,
)

Write = Callable[[SignMatrices, int, torch.Tensor, float], None]


@pytest.fixture
def arena(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((1 << 14,), torch.nan, dtype=dtype, device=device)


@pytest.fixture
def write() -> Write:
    """write(matrices, slot, positive, scale): one part behind the other."""
    end = ALIGNMENT

    def write(matrices: SignMatrices, slot: int, positive: torch.Tensor, scale: float) -> None:
        nonlocal end
        parts = matrices.elements(pack_signs(positive), torch.tensor([scale]))
        for store, part in zip((matrices.words, matrices.scales), parts, strict=True):
            store.write(slot, end, part)
            end += -(-part.numel() // ALIGNMENT) * ALIGNMENT

    return write


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 100])
def test_signs_come_back_from_one_bit_each(columns: int) -> None:
    positive = torch.rand(7, columns) < 0.5
    words = pack_signs(positive)
    assert words.dtype is torch.int32 and words.shape == (7, (columns + 31) // 32)
    assert torch.equal(unpack_signs(words, columns), positive.float() * 2 - 1)
    assert torch.equal(pack_signs(positive.T.contiguous().T), words)


@pytest.mark.parametrize("shape", [(1, 1), (77, 40), (130, 161)])
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
    matrices = SignMatrices(arena, 4, *shape)
    # No half type holds the first scale.
    signs, scales = {slot: torch.rand(shape) < 0.5 for slot in (0, 2)}, {0: 0.100123, 2: -2.0}
    for slot, positive in signs.items():
        write(matrices, slot, positive, scales[slot])
    before = torch.randn(45, shape[0]).to(dtype).to(device)
    x = torch.randn(45, shape[1]).to(dtype).to(device)
    segments = Segments.build([(2, 1, 39), (1, 39, 41), (0, 42, 43)], device)
    expected = before.double()
    for slot, start, end in segments.spans:
        if slot in signs:
            dense = (signs[slot].double() * 2 - 1).to(device) * scales[slot]
            expected[start:end] += x[start:end].double() @ dense.T
    y = as_columns(before)
    (sign_delta_torch if form == "torch" else sign_delta_triton)(y, x, matrices, segments)
    untouched = [0, 39, 40, 41, 43, 44]
    assert torch.equal(y[untouched], before[untouched])
    # Besides the last rounding there is the sum's own, in float32.
    bound = torch.finfo(dtype).eps * (0.1 + expected.abs()) + 1e-5 * shape[1] ** 0.5
    assert ((y - expected).abs() <= bound).all()


def test_a_cleared_slot_adds_nothing_whatever_comes_to_lie_there(
    form: str, device: torch.device, dtype: torch.dtype, arena: torch.Tensor, write: Write
) -> None:
    matrices = SignMatrices(arena, 2, 5, 3)
    write(matrices, 0, torch.ones(5, 3) > 0, 1.0)
    for part in (matrices.words, matrices.scales):
        part.clear(0)
    arena.fill_(torch.nan)
    y, x = torch.zeros(2, 5, dtype=dtype, device=device), torch.ones(2, 3).to(dtype).to(device)
    segments = Segments.build([(0, 0, 2)], device)
    (sign_delta_torch if form == "torch" else sign_delta_triton)(y, x, matrices, segments)
    assert y.eq(0).all()


def test_memory_is_one_bit_a_weight(
    form: str, dtype: torch.dtype, arena: torch.Tensor, write: Write
) -> None:
    matrices = SignMatrices(arena, 1, 64, 64)
    write(matrices, 0, torch.rand(64, 64) < 0.5, 1.0)
    taken = sum(part.rows_of(0) for part in (matrices.words, matrices.scales))
    assert taken * dtype.itemsize == 64 * 64 // 8 + 4
