"""Block-diagonal products against float64, blocks of unequal size, and rows that have none."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import PackedMatrices, Segments
from deltamux_kernels.block_rotate import block_rotate_torch, block_rotate_triton

Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]


@pytest.mark.parametrize(("width", "sizes"), [(1, (1, 1)), (60, (4, 30)), (288, (288, 32))])
def test_rows_are_rotated_by_the_blocks_of_their_own_slot_and_the_others_keep_their_bits(
    width: int,
    sizes: tuple[int, int],
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).to(device)

    blocks = [normal(width // b, b, b) / b**0.5 for b in sizes]
    side_by_side = [part.transpose(0, 1).reshape(-1, width) for part in blocks]
    x, before = normal(25, width), normal(25, width)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected = before.double()
    expected[1:19] = x[1:19].double() @ torch.block_diag(*blocks[1].double())
    expected[22] = x[22].double() @ torch.block_diag(*blocks[0].double())
    y, given = as_columns(before), x.clone()
    packed = pack([side_by_side[0], None, side_by_side[1]], width)
    (block_rotate_torch if form == "torch" else block_rotate_triton)(y, x, packed, segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched]) and torch.equal(x, given)
    assert ((y - expected).abs() <= 16 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
