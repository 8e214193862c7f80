"""Low-rank numbers that bfloat16 holds are kept in 16 bits, and served as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deltamux.adapters.payloads.exact_halves import in_exact_halves
from deltamux.adapters.primitives.low_rank import LowRank
from deltamux.adapters.primitives.row_bias import RowBias
from deltamux_kernels import native

Make = Callable[..., Any]


def as_bfloat16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("number", "dtype"),
    [
        (1.0078125, torch.bfloat16),
        (-0.0, torch.bfloat16),
        (1e-45, torch.float32),
        (1.0 + 2**-8, torch.float32),
        (65504.0, torch.float32),
    ],
)
def test_one_number_decides(number: float, dtype: torch.dtype) -> None:
    a, b = torch.ones(2, 5), torch.full((2, 3), 2.0)
    b[1, 1] = number
    (halved,) = in_exact_halves({"site": (LowRank(a, b),)})["site"]
    assert isinstance(halved, LowRank)
    assert halved.a.dtype == torch.bfloat16 and halved.b.dtype == dtype
    assert torch.equal(halved.b.float().view(torch.int32), b.view(torch.int32))


def test_what_is_no_low_rank_stays() -> None:
    bias = RowBias(torch.ones(3))
    assert in_exact_halves({"site": (bias,)}) == {"site": (bias,)}


@pytest.mark.parametrize("alpha", [4, 3])
def test_adapters_saved_in_bfloat16_are_served_as_peft_does(
    alpha: int, save: Make, rewrite: Make, serve: Make, as_in_peft: Make
) -> None:
    """Where the scale is no power of two, B times it needs more bits."""
    whole = save("llama", r=2, lora_alpha=alpha, target_modules="all-linear", seed=1)
    coarse = rewrite(whole, as_bfloat16)
    as_in_peft("llama", [whole, coarse])
    served = serve("llama")
    adapter, other = served.parse(coarse), served.parse(whole)
    dtypes = {p.b.dtype for each in adapter.payloads.values() for p in each}
    assert dtypes == {torch.bfloat16 if alpha == 4 else torch.float32}
    assert all(p.a.dtype == torch.bfloat16 for each in adapter.payloads.values() for p in each)
    if alpha == 4:
        assert 2 * adapter.host_bytes == other.host_bytes
    if native.available():
        assert served.sites.bytes_of(adapter) < served.sites.bytes_of(other)


@pytest.mark.parametrize("fallback", [False, True])
def test_a_slot_takes_the_elements_of_its_own_numbers(
    fallback: bool, save: Make, rewrite: Make, serve: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of both kinds come and go; without a compiler both take 32 bits a number."""
    if fallback:
        monkeypatch.setattr(native, "available", lambda: False)
    whole: Path = save("llama", r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    folders = [whole, rewrite(whole, as_bfloat16)]
    served, ids = serve("llama"), torch.arange(5)[None]
    sizes, answers = [], []
    for folder in [*folders, *folders]:
        adapter = served.load(1, folder)
        sizes.append(served.sites.used_bytes)
        answers.append(served.logits(ids, [1]))
        assert served.sites.bytes_of(adapter) == sizes[-1]
        served.sites.release(1)
        assert served.sites.used_bytes == 0
    assert sizes[:2] == sizes[2:]
    assert sizes[0] == sizes[1] if fallback or not native.available() else sizes[0] > sizes[1]
    assert torch.equal(answers[0], answers[2]) and torch.equal(answers[1], answers[3])
    torch.testing.assert_close(answers[0], answers[1], atol=0.05, rtol=0.05)
