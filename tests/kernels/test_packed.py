"""Matrices in the arena: exact extents, refused writes, forgotten slots."""

import pytest
import torch

from deltamux_kernels import ALIGNMENT, PackedMatrices


def test_a_matrix_takes_its_own_elements_and_nothing_beside_them() -> None:
    arena = torch.full((512,), torch.nan)
    packed = PackedMatrices(arena, slots=2, width=5)
    packed.write(1, 5 * ALIGNMENT, torch.arange(15.0).view(3, 5))
    assert torch.equal(arena[320:335], torch.arange(15.0))
    assert arena[:320].isnan().all() and arena[335:].isnan().all()
    assert packed.rows_of(1) == 3 and packed.rows.tolist() == [0, 3, 0]
    assert packed.offsets[1] == 320
    assert packed.most_rows({0, 1}) == 3 and packed.most_rows({0}) == 0


def test_a_cleared_slot_has_no_matrix() -> None:
    packed = PackedMatrices(torch.zeros(128), slots=2, width=4)
    packed.write(0, 64, torch.ones(2, 4))
    packed.clear(0)
    assert packed.rows_of(0) == 0 and packed.rows.tolist() == [0, 0, 0]
    assert packed.views[0] is None and packed.transposed[0] is None


def test_writing_converts_to_the_arenas_dtype() -> None:
    packed = PackedMatrices(torch.zeros(64, dtype=torch.bfloat16), slots=1, width=4)
    packed.write(0, 0, torch.full((2, 4), 1.0078125, dtype=torch.float64))
    assert packed.views[0] is not None and packed.views[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("offset", "shape"), [(0, (2, 3)), (8, (2, 4)), (-64, (2, 4)), (64, (17, 4))]
)
def test_a_wrong_width_or_extent_is_refused_and_nothing_is_written(
    offset: int, shape: tuple[int, int]
) -> None:
    arena = torch.zeros(128)
    packed = PackedMatrices(arena, slots=1, width=4)
    with pytest.raises(ValueError):
        packed.write(0, offset, torch.ones(shape))
    assert not arena.any() and packed.rows_of(0) == 0
