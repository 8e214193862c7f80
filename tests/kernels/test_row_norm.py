"""Norms with the parameters of each slot, of rows and of heads, in any layout."""

from collections.abc import Callable

import pytest
import torch

from deltamux_kernels import NormForm, PackedMatrices, Segments
from deltamux_kernels.row_norm import row_norm_torch, row_norm_triton

Pack = Callable[[list[torch.Tensor | None], int], PackedMatrices]
ROWS = 25
SPANS = [(2, 1, 19), (1, 19, 21), (0, 22, 23)]

LAYOUTS = {
    "rows": lambda width: torch.randn(ROWS, width),
    "columns of a wider product": lambda width: torch.randn(ROWS, 3 * width)[:, width : 2 * width],
    "heads": lambda width: torch.randn(ROWS, 5 * width)[:, width : 4 * width].unflatten(1, (3, -1)),
    "heads before tokens": lambda width: torch.randn(3, ROWS, width).transpose(0, 1),
    "features apart": lambda width: torch.randn(width, ROWS).T,
}


FORMS = {
    "root mean square": NormForm(1e-5),
    "OLMo's": NormForm(1e-5, once=True),
    "Gemma's": NormForm(1e-5, offset=1.0, once=True),
    "layer": NormForm(1e-5, centred=True),
}


def formula(x: torch.Tensor, p: torch.Tensor, form: NormForm) -> torch.Tensor:
    c, p = x.double(), p.double().to(x.device)
    if form.centred:
        c = c - c.mean(-1, keepdim=True)
    scaled = (p[0] + form.offset) * c / (c.pow(2).mean(-1, keepdim=True) + form.epsilon).sqrt()
    return scaled if p.shape[0] == 1 else scaled + p[1]


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("width", [7, 300, 1100])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_normed_with_the_parameters_of_their_slot_and_the_others_keep_their_bits(
    layout: str,
    width: int,
    norm: NormForm,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    pack: Pack,
    as_columns: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    torch.manual_seed(width)
    x = LAYOUTS[layout](width).to(device, dtype)
    # So that epsilon counts in some rows.
    x[2:4] *= 1e-3
    p = [torch.randn(1 + norm.centred, width), None, torch.randn(1, width)]
    p = [None if matrix is None else matrix.to(dtype) for matrix in p]
    before = torch.randn(x.shape).to(device, dtype)
    y = as_columns(before.flatten(1)).unflatten(1, x.shape[1:])
    segments = Segments.build(SPANS, device)
    expected = before.double()
    for slot, start, end in SPANS:
        if (matrix := p[slot]) is not None:
            expected[start:end] = formula(x[start:end], matrix, norm)
    (row_norm_torch if form == "torch" else row_norm_triton)(y, x, pack(p, width), norm, segments)
    untouched = [0, 19, 20, 21, 23, 24]
    assert torch.equal(y[untouched], before[untouched])
    assert ((y - expected).abs() <= 4 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


@pytest.mark.parametrize("norm", FORMS.values(), ids=FORMS)
def test_both_forms_round_where_torch_and_transformers_do(
    norm: NormForm, form: str, dtype: torch.dtype, device: torch.device, pack: Pack
) -> None:
    torch.manual_seed(0)
    x = torch.randn(ROWS, 200).to(device, dtype)
    p = torch.randn(1 + norm.centred, 200).to(dtype)
    y = torch.zeros_like(x)
    segments = Segments.build([(0, 0, ROWS)], device)
    (row_norm_torch if form == "torch" else row_norm_triton)(y, x, pack([p], 200), norm, segments)
    quotient = formula(x, torch.full((1, 200), 1 - norm.offset), norm)
    weight, bias = p[0].to(device), p[1:].sum(0).to(device).double()
    if not (norm.centred or norm.once):
        quotient = quotient.to(dtype).double()
    rounded = ((weight.double() + norm.offset) * quotient + bias).to(dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(y, rounded, rtol=1e-5, atol=1e-6)
    else:
        assert (y == rounded).float().mean() > 0.99
