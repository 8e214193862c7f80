"""What a Llama block computes next has the same bits with the expand inside it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu.arms import Fused
from gpu.consumers import consumer
from gpu.correctness import fused_is_apart
from gpu.shapes import TINY, SiteShape, Step
from gpu.weights import exact

SITES = (*TINY, SiteShape("o", 64, (144,)))
# Several tiles and blocks of ranks of one slot, one rank not a multiple of anything.
STEP = Step("decode", 43, "mixed", (8, 40, 3, 16), bare=5)


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_a_block_goes_on_with_the_bits_of_an_expand_apart(
    site: SiteShape, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("not rounded between its operations, which compilers fuse as they like")
    torch.manual_seed(0)
    weights = exact(site, STEP, dtype, device)
    x = torch.randn(STEP.rows, site.width).to(dtype).to(device)
    before = torch.randn(STEP.rows, sum(site.outputs)).to(dtype).to(device)
    before[-1] = -0.0
    assert fused_is_apart(weights, STEP, Fused([weights], STEP), x, before)


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
def test_a_layer_takes_ten_launches_between_its_products(
    form: str, dtype: torch.dtype, device: torch.device, traced: Callable[[], Any]
) -> None:
    """Four shrinks, and six that a layer without adapters needs seven for."""
    counts = {}
    for site in SITES:
        arm = Fused([exact(site, STEP, dtype, device)], STEP)
        x = torch.zeros(STEP.rows, site.width, dtype=dtype, device=device)
        y = torch.zeros(STEP.rows, sum(site.outputs), dtype=dtype, device=device)
        with traced() as launches:
            arm.before(0, x)
            arm.consume(0, y, consumer(site, STEP.rows, y))
        counts[site.name] = len(launches)
    assert counts == {"qkv": 2, "o": 3, "gate_up": 2, "down": 3}
