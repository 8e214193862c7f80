"""SiLU of one product times another, wherever their rows lie."""

import pytest
import torch

from deltamux_kernels.gated_silu import gated_silu_torch, gated_silu_triton


@pytest.mark.parametrize("width", [1, 77, 1500])
def test_the_gate_scales_the_other_product(
    width: int, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(width)
    product = (4 * torch.randn(1, 7, 3 * width)).to(device, dtype)
    gate, up = product[..., :width], product[..., 2 * width :]
    y = (gated_silu_torch if form == "torch" else gated_silu_triton)(gate, up)
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
    compute = gated_silu_torch if form == "torch" else gated_silu_triton
    torch.testing.assert_close(
        compute(gate.T, up.T), compute(gate.T.contiguous(), up.T.contiguous())
    )
