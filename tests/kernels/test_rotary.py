"""Rotary embedding to the bit of transformers', which rounds each of its operations."""

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltamux_kernels.rotary import rotary_native, rotary_torch, rotary_triton

FORMS = {"torch": rotary_torch, "native": rotary_native, "triton": rotary_triton}
pytestmark = pytest.mark.parametrize("form", FORMS, indirect=True)

Tensors = tuple[torch.Tensor, ...]


def inputs(dim: int, heads: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensors:
    """Query and key as columns of one product, as an attention module views them."""
    torch.manual_seed(dim)
    product = torch.randn(1, 5, (sum(heads) + 1) * dim).to(device, dtype)
    query, key, _ = product.split([heads[0] * dim, heads[1] * dim, dim], dim=-1)
    angles = torch.randn(2, 1, 5, dim).to(device, dtype)
    as_heads = (x.view(1, 5, -1, dim).transpose(1, 2) for x in (query, key))
    return (*as_heads, *angles)


@pytest.mark.parametrize("dim, heads", [(2, (1, 1)), (6, (9, 4)), (80, (11, 2)), (128, (8, 8))])
def test_queries_and_keys_are_rotated_to_the_bit(
    dim: int, heads: tuple[int, int], form: str, dtype: torch.dtype, device: torch.device
) -> None:
    given = inputs(dim, heads, dtype, device)
    rotated = FORMS[form](*given)
    for ours, theirs in zip(rotated, apply_rotary_pos_emb(*given), strict=True):
        assert ours.dtype == dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dim, heads", [(6, (9, 4)), (128, (8, 2))])
def test_a_rotation_is_that_of_float64(
    dim: int, heads: tuple[int, int], form: str, dtype: torch.dtype, device: torch.device
) -> None:
    given = inputs(dim, heads, dtype, device)
    cos, sin = (angles.double()[:, None] for angles in given[2:])
    rotated = FORMS[form](*given)
    for ours, x in zip(rotated, (part.double() for part in given[:2]), strict=True):
        exchanged = torch.cat((-x[..., dim // 2 :], x[..., : dim // 2]), dim=-1)
        summands = x * cos, exchanged * sin
        size = summands[0].abs() + summands[1].abs()
        assert ((ours - sum(summands)).abs() <= 2 * torch.finfo(dtype).eps * size).all()


def test_the_heads_of_a_token_lie_side_by_side(form: str, device: torch.device) -> None:
    if form == "torch":
        pytest.skip("the torch form keeps the layout that it is given")
    query, key, cos, sin = inputs(6, (9, 4), torch.float32, device)
    for rotated in FORMS[form](query.contiguous(), key.contiguous(), cos, sin):
        assert rotated.transpose(1, 2).is_contiguous()
