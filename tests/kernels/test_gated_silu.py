"""SiLU of one product times another, wherever their rows lie."""

import pytest
import torch

from deltamux_kernels.gated_silu import gated_silu_native, gated_silu_torch, gated_silu_triton

FORMS = {"torch": gated_silu_torch, "native": gated_silu_native, "triton": gated_silu_triton}
pytestmark = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.mark.parametrize("width", [1, 77, 1500])
def test_the_gate_scales_the_other_product(
    width: int, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(width)
    product = (4 * torch.randn(1, 7, 3 * width)).to(device, dtype)
    gate, up = product[..., :width], product[..., 2 * width :]
    y = FORMS[form](gate, up)
    exact = gate.double() * torch.sigmoid(gate.double()) * up.double()
    assert y.dtype == dtype and y.shape == gate.shape
    info = torch.finfo(dtype)
    # A GPU rounds the exponent before it raises to it.
    roundings = 16 if dtype == torch.float32 else 4
    assert ((y - exact).abs() <= roundings * info.eps * (exact.abs() + info.tiny)).all()
    silu = (gate.double() * torch.sigmoid(gate.double())).to(dtype)
    if dtype != torch.float32:
        assert (y == silu * up).float().mean() > 0.99


def test_features_may_lie_apart(form: str, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    gate, up = (torch.randn(40, 6).to(device, dtype) for _ in range(2))
    apart = FORMS[form](gate.T, up.T)
    torch.testing.assert_close(apart, FORMS[form](gate.T.contiguous(), up.T.contiguous()))


# The interpreter is numpy, which warns.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_numbers_may_be_large(form: str, dtype: torch.dtype, device: torch.device) -> None:
    gate = torch.tensor([-torch.inf, -2e4, -95, -88, -1e-40, 0, 88, 95, 2e4, torch.inf, torch.nan])
    gate = gate.to(device, dtype)
    y = FORMS[form](gate[None], torch.ones_like(gate)[None])
    torch.testing.assert_close(y[0], torch.nn.functional.silu(gate), equal_nan=True)
