"""Packed linear layers against the plain product in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from deltamux.base.packed_linear import PackedLinear, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 70])
def test_product_is_that_of_the_plain_layer(rows: int, bias: bool) -> None:
    plain = nn.Linear(96, 40, bias=bias).requires_grad_(False)
    x = torch.randn(1, rows, 96)
    exact = linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    torch.testing.assert_close(PackedLinear(plain)(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_rows_may_be_strided() -> None:
    plain = nn.Linear(96, 40).requires_grad_(False)
    x = torch.randn(2, 9, 96)[:, 1::2]
    torch.testing.assert_close(PackedLinear(plain)(x), plain(x), atol=1e-5, rtol=1e-5)


def test_weight_unpacks_to_the_same_bits() -> None:
    plain = nn.Linear(96, 41).requires_grad_(False)
    packed = PackedLinear(plain)
    assert torch.equal(packed.weight, plain.weight)
    assert packed.bias is plain.bias
    assert (packed.in_features, packed.out_features) == (96, 41)


def test_row_does_not_depend_on_how_many_stand_beside_it() -> None:
    packed = PackedLinear(nn.Linear(256, 192).requires_grad_(False))
    x = torch.randn(70, 256)
    together = packed(x)
    for rows in (1, 2, 3, 8, 16, 17, 33):
        assert torch.equal(packed(x[:rows]), together[:rows])


def test_only_float32_linears_are_packed() -> None:
    class Router(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "linear": nn.Linear(8, 8),
            "router": Router(8, 8),
            "bfloat16_linear": nn.Linear(8, 8, dtype=torch.bfloat16),
        }
    )
    pack_linears(model)
    assert {name: type(module) for name, module in model.items()} == {
        "linear": PackedLinear,
        "router": Router,
        "bfloat16_linear": nn.Linear,
    }
    assert len(list(model["linear"].parameters())) == 1
