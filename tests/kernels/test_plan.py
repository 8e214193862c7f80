"""The model of launches and bytes against launches that really run, load and store."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from gpu.arms import Deltamux
from gpu.plan import FORMS, Machine, adapter_bytes, floor_seconds, launches, traffic
from gpu.shapes import LLAMA, SiteShape, Step
from gpu.weights import exact

SITES = (SiteShape("qkv", 544, (160, 48, 48)), SiteShape("down", 64, (144,)))
STEP = Step("decode", 40, "mixed", (8, 3, 24, 40))
# Kernel parameters whose loads and stores are nobody's matrices.
TABLES = {"tiles", "rows", "ranks", "offsets", "columns", "counters"}


@pytest.mark.parametrize("form", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16"], indirect=True)
@pytest.mark.parametrize("called", FORMS)
def test_a_layer_launches_and_moves_what_the_plan_says(
    called: str,
    form: str,
    dtype: torch.dtype,
    device: torch.device,
    traced: Callable[[], Any],
) -> None:
    for site in SITES:
        weights = exact(site, STEP, dtype, device)
        arm = Deltamux([weights], STEP, called)
        x = torch.zeros(STEP.rows, site.width, dtype=dtype, device=device)
        y = torch.zeros(STEP.rows, sum(site.outputs), dtype=dtype, device=device)
        with traced() as found:
            arm.before(0, x)
            arm.after(0, x, y)
        assert len(found) == launches(called, site)
        if device.type == "cuda":
            continue  # only the interpreter sees loads and stores
        read = sum((launch.read for launch in found), Counter())
        written = sum((launch.written for launch in found), Counter())
        plan = traffic(site, STEP, dtype.itemsize)
        tables = sum(read.pop(name, 0) for name in TABLES)
        # A tuple of slices is one parameter: y, and each slot's offset, rank and first column.
        in_slices = read.pop("slices", 0)
        assert read.pop("arena") == plan.a + plan.b
        assert read.pop("x") == plan.x
        assert read.pop("h") + read.pop("planes", 0) == plan.h_read
        assert not read.keys() - {"y"}
        if called == "apart":
            assert read["y"] == plan.y and written["y"] == plan.y
        else:
            assert written["slices"] == plan.y
            assert plan.y <= in_slices < plan.y + 64 * len(site.outputs) * STEP.rows
        assert written["h"] + written["planes"] == plan.h_written
        assert tables < 0.1 * sum(asdict(plan).values())


def test_llama_takes_eleven_launches_a_layer_or_eight() -> None:
    assert [sum(launches(form, site) for site in LLAMA) for form in FORMS] == [11, 8]


def test_the_floor_is_the_weights_of_the_adapters_that_have_rows() -> None:
    """2.62 MB a layer for rank 16, 32 of them in 19.5 us at 4.3 TB/s."""
    assert adapter_bytes(LLAMA, [16]) == 2_621_440
    step, h200 = Step("decode", 32, "16", (16,) * 32), Machine(4.3e12, 788e12)
    assert floor_seconds(LLAMA, step, h200, fused=True) == pytest.approx(19.51e-6, rel=1e-3)
    assert floor_seconds(LLAMA, step, h200, fused=False) == pytest.approx(21.2e-6, rel=1e-2)
    prompt = Step("prefill", 8192, "16", (16,))
    assert floor_seconds(LLAMA, prompt, h200, fused=True) == pytest.approx(27.25e-6, rel=1e-3)
