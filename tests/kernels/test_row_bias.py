"""A bias a slot, added to its rows and to every head of them."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import PackedMatrices, Segments
from deltamux_kernels.row_bias import row_bias_native, row_bias_torch, row_bias_triton

Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]
FORMS = {"torch": row_bias_torch, "native": row_bias_native, "triton": row_bias_triton}

pytestmark = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.mark.parametrize("width", [1, 77, 300])
@pytest.mark.parametrize("heads", [None, 3])
def test_rows_get_the_bias_of_their_slot_and_the_others_keep_their_bits(
    width: int,
    heads: int | None,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(width)
    b = [torch.randn(1, width).to(dtype), None, torch.randn(1, width).to(dtype)]
    before = torch.randn(25, (heads or 1) * width).to(dtype).to(device)
    segments = Segments.build([(2, 1, 19), (1, 19, 21), (0, 22, 23)], device)
    expected = before.double()
    for slot, start, end in segments.spans:
        if (b_s := b[slot]) is not None:
            expected[start:end] += b_s.double().repeat(1, heads or 1).to(device)
    y = as_columns(before)
    given = y if heads is None else y.unflatten(1, (heads, width))
    FORMS[form](given, pack(b, width), segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    # Exact sums, rounded once.
    assert torch.equal(y, expected.to(dtype))
