"""Per-row scales around the bias, and rows that have none."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import PackedMatrices, Segments
from deltamux_kernels.row_affine import (
    row_affine_native,
    row_affine_torch,
    row_affine_triton,
)

Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]
FORMS = {"torch": row_affine_torch, "native": row_affine_native, "triton": row_affine_triton}

pytestmark = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.mark.parametrize("width", [1, 77, 300])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_are_scaled_around_the_bias_and_the_others_keep_their_bits(
    width: int,
    with_bias: bool,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(width)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype).to(device)

    g = [normal(1, width), None, normal(1, width)]
    bias = normal(width) if with_bias else None
    before = normal(25, width)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected, shift = before.double(), 0 if bias is None else bias.double()
    for slot, start, end in segments.spans:
        if (g_s := g[slot]) is not None:
            expected[start:end] = (expected[start:end] - shift) * g_s.double() + shift
    y = as_columns(before)
    FORMS[form](y, bias, pack(g, width), segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 8 * torch.finfo(dtype).eps * (1 + expected.abs())).all()
