"""Rows of each slot go through the norm with that slot's own parameters."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import layer_norm

from deltamux.adapters.primitives.norm_parameters import NormParameters, NormParametersBank
from deltamux.base.structure import SiteSpec
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.segments import Segments


def test_each_row_is_normed_with_the_parameters_of_its_own_slot(
    arena: torch.Tensor, segments: Segments
) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(9).requires_grad_(False)
    bank = NormParametersBank(norm, SiteSpec("norm", "norm", 9, 9), PackedMatrices(arena, 4, 9))
    payload = NormParameters(torch.randn(9), torch.randn(9))
    ((store, weight), (_, bias)) = bank.pieces(payload)
    store.write(0, 9 * 64, torch.cat((weight, bias)))
    bank.placed(0, [0, 1])
    x = torch.randn(2, 5, 9)
    y = norm(x).view(10, 9)
    expected = y.clone()
    expected[6:] = layer_norm(x.view(10, 9)[6:], (9,), payload.weight, payload.bias)
    bank.after(x, y, segments)
    assert torch.equal(y, expected)
    assert norm.weight.eq(1).all()
