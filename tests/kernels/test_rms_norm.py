"""Root mean square norms of long and short rows, in any layout."""

import pytest
import torch

from deltamux_kernels.rms_norm import rms_norm_native, rms_norm_torch, rms_norm_triton

FORMS = {"torch": rms_norm_torch, "native": rms_norm_native, "triton": rms_norm_triton}
pytestmark = pytest.mark.parametrize("form", FORMS, indirect=True)

LAYOUTS = {
    "rows": lambda width: torch.randn(5, width),
    "one sequence": lambda width: torch.randn(1, 9, width),
    "heads, columns of a wider product": lambda width: torch.randn(1, 5, 8 * width)[
        ..., width : 4 * width
    ].view(1, 5, 3, width),
    "heads before tokens": lambda width: torch.randn(1, 5, 3, width).transpose(1, 2),
    "two sequences": lambda width: torch.randn(2, 3, 7, width)[:, :, 1:],
    "features apart": lambda width: torch.randn(width, 5).T,
}


# What is added to the weight, and whether only the product is rounded: Llama's, OLMo's, Gemma's.
ROUNDINGS = [(0.0, False), (0.0, True), (1.0, True), (1.0, False)]


@pytest.mark.parametrize("offset, once", ROUNDINGS)
@pytest.mark.parametrize("width", [1, 96, 1100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_row_is_divided_by_its_root_mean_square(
    layout: str,
    width: int,
    offset: float,
    once: bool,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    torch.manual_seed(width)
    x = LAYOUTS[layout](width).to(device, dtype)
    # So that epsilon counts in some rows.
    x[..., 0, :] *= 1e-3
    weight = torch.randn(width).to(device, dtype)
    y = FORMS[form](x, weight, 1e-6, offset, once)
    exact = x.double()
    exact = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (weight.double() + offset)
    info = torch.finfo(dtype)
    assert y.dtype == dtype
    assert ((y - exact).abs() <= 4 * info.eps * (exact.abs() + info.tiny)).all()


@pytest.mark.parametrize("offset, once", ROUNDINGS)
def test_the_quotient_is_rounded_before_it_is_multiplied_or_not(
    offset: float, once: bool, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 200).to(device, dtype), torch.randn(200).to(device, dtype)
    y = FORMS[form](x, weight, 1e-5, offset, once)
    wide = x.double()
    quotient = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    factor = weight.double() + offset
    rounded = (factor * (quotient if once else quotient.to(dtype).double())).to(dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(y, rounded, rtol=1e-6, atol=1e-12)
    else:
        assert (y == rounded).float().mean() > 0.99


@pytest.mark.parametrize("shape", [(0, 40), (1, 0, 40), (1, 0, 3, 40)])
def test_there_may_be_no_rows(shape: tuple[int, ...], form: str, device: torch.device) -> None:
    x, weight = torch.randn(shape).to(device), torch.randn(40).to(device)
    assert FORMS[form](x, weight, 1e-5).shape == shape


def test_a_wider_weight_widens_a_result_that_is_rounded_twice(
    form: str, device: torch.device
) -> None:
    if form == "native":
        pytest.skip("the C form is of float32")
    x, weight = torch.randn(3, 40).half().to(device), torch.randn(40).to(device)
    y = FORMS[form](x, weight, 1e-5)
    torch.testing.assert_close(y, rms_norm_torch(x.cpu(), weight.cpu(), 1e-5).to(device))
    once = FORMS[form](x, weight, 1e-5, once=True)
    assert once.dtype == torch.float16
