"""Keys and values land in their slots, and nothing else changes."""

from contextlib import nullcontext

import pytest
import torch

from deltamux_kernels.write_kv import write_kv_native, write_kv_torch, write_kv_triton

FORMS = {"torch": write_kv_torch, "native": write_kv_native, "triton": write_kv_triton}
pytestmark = pytest.mark.parametrize("form", FORMS, indirect=True)


def caches(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.full((5, 16, 3, 20), -1.0, dtype=dtype, device=device),
        torch.full((5, 16, 3, 8), -1.0, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("order", ["rows", "heads", "numbers"])
def test_rows_land_in_their_slots_and_negative_slots_are_not_stored(
    order: str, form: str, dtype: torch.dtype, device: torch.device
) -> None:
    key_cache, value_cache = caches(device, dtype)
    key, value = torch.randn(6, 3, 20), torch.randn(6, 3, 8)
    if order == "heads":  # as rotary embedding leaves them: [heads, T, D] in memory
        key = key.transpose(0, 1).contiguous().transpose(0, 1)
    if order == "numbers":
        key, value = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (key, value))
    key, value = key.to(dtype).to(device), value.to(dtype).to(device)
    slots = torch.tensor([79, -1, 16, 15, 0, 33], device=device)
    FORMS[form](key, value, key_cache, value_cache, slots)
    stored = slots >= 0
    for cache, rows in ((key_cache, key), (value_cache, value)):
        expected = torch.full_like(cache, -1.0)
        expected.flatten(0, 1)[slots[stored]] = rows[stored]
        assert torch.equal(cache, expected)


def test_a_slot_beyond_the_cache_touches_nothing(
    form: str, dtype: torch.dtype, device: torch.device
) -> None:
    memory = caches(device, dtype)
    key_cache, value_cache = (cache[:4] for cache in memory)  # what follows belongs to others
    key, value = (torch.zeros_like(cache[0, :1]) for cache in memory)
    slots = torch.tensor([64], device=device)
    with nullcontext() if form == "triton" else pytest.raises(IndexError):
        FORMS[form](key, value, key_cache, value_cache, slots)
    assert all((cache == -1).all() for cache in memory)
