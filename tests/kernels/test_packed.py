"""Matrices in the arena: exact extents, refused writes, forgotten slots."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deltamux_kernels import ALIGNMENT, PackedMatrices
from deltamux_kernels.packed import DividedMatrices


def test_a_matrix_takes_its_own_elements_and_nothing_beside_them() -> None:
    arena = torch.full((512,), torch.nan)
    packed = PackedMatrices(arena, slots=2, width=5)
    packed.write(1, 5 * ALIGNMENT, torch.arange(15.0).view(3, 5))
    assert torch.equal(arena[320:335], torch.arange(15.0))
    assert arena[:320].isnan().all() and arena[335:].isnan().all()
    assert packed.rows_of(1) == 3 and packed.rows.tolist() == [0, 3, 0]
    assert packed.offsets[1] == 320
    assert packed.most_rows({0, 1}) == 3 and packed.most_rows({0}) == 0


def test_a_store_that_halves_keeps_bfloat16_in_half_the_elements() -> None:
    arena = torch.full((256,), torch.nan)
    packed = PackedMatrices(arena, slots=2, width=5, halves=True)
    matrix = torch.arange(15.0).view(3, 5)
    packed.write(1, 64, matrix.bfloat16())
    assert packed.elements([matrix.bfloat16()]) == 8 and packed.offsets[1] == 65
    assert torch.equal(arena[64:72].view(torch.bfloat16)[:15], torch.arange(15.0).bfloat16())
    assert arena[:64].isnan().all() and arena[72:].isnan().all()
    assert packed.views[1] is not None and torch.equal(packed.views[1].float(), matrix)
    packed.write(1, 64, matrix)
    assert packed.elements([matrix.bfloat16(), matrix]) == 30 and packed.offsets[1] == 64
    assert torch.equal(arena[64:79], torch.arange(15.0)) and arena[79:].isnan().all()


def test_a_cleared_slot_has_no_matrix() -> None:
    packed = PackedMatrices(torch.zeros(128), slots=2, width=4)
    packed.write(0, 64, torch.ones(2, 4))
    packed.clear(0)
    assert packed.rows_of(0) == 0 and packed.rows.tolist() == [0, 0, 0]
    assert packed.views[0] is None and packed.transposed[0] is None


class Operations(TorchDispatchMode):
    """The names of those that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("divided", [False, True])
def test_clearing_a_slot_copies_nothing_from_the_host(divided: bool) -> None:
    """A GPU would have to be waited for."""
    arena = torch.zeros(128)
    packed = DividedMatrices(arena, 2, 32, 2) if divided else PackedMatrices(arena, 2, 32)
    packed.write(1, 0, torch.ones(4, 32))
    with Operations() as operations:
        packed.clear(1)
    assert "zero_" in operations.names and "copy_" not in operations.names
    assert not packed.rows.any() and not (divided and packed.parts.rows.any())


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
