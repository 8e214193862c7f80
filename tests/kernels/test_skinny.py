"""The candidate for the base's product of a few rows."""

import pytest
import torch
from gpu.skinny import Scratch, Shape, skinny_linear


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("shape", [Shape(32, 32, 1, 4, 3), Shape(32, 64, 4, 4, 3)])
def test_rows_times_a_weight(
    shape: Shape, rows: int, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.float32:
        pytest.skip("of half types")
    torch.manual_seed(0)
    x, weight = (torch.randn(size, 512).to(dtype).to(device) for size in (rows, 96))
    y, scratch = torch.full((rows, 96), torch.nan).to(x), Scratch(x, 96)
    scratch.planes.fill_(torch.nan)
    for _ in range(2):  # counters are back at zero
        skinny_linear(x, weight, y, shape, scratch)
        expected = x.double() @ weight.double().t()
        summed = x.double().abs() @ weight.double().abs().t()
        assert ((y.double() - expected).abs() <= torch.finfo(dtype).eps * summed).all()
    alone = torch.empty(1, 96).to(x)
    skinny_linear(x[-1:], weight, alone, shape, scratch)
    assert torch.equal(alone[0], y[-1])
