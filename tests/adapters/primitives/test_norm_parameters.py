"""Rows of each slot go through the norm with that slot's own parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import layer_norm, rms_norm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from deltamux.adapters.primitives.norm_parameters import (
    CopiedNormBank,
    NormParameters,
    NormParametersBank,
)
from deltamux.base.structure import SiteSpec
from deltamux_kernels.packed import PackedMatrices
from deltamux_kernels.row_norm import NormForm
from deltamux_kernels.segments import Segments


class SquaredWeight(LlamaRMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = super().forward(x) * self.weight
        return normed


SPEC = SiteSpec("norm", "norm", 9, 9)
Normed = Callable[[torch.Tensor, NormParameters], torch.Tensor]


def check(
    bank: NormParametersBank | CopiedNormBank,
    payload: NormParameters,
    normed: Normed,
    segments: Segments,
) -> None:
    pieces = bank.pieces(payload)
    pieces[0][0].write(0, 9 * 64, torch.cat([vector for _, vector in pieces]))
    bank.placed(0, [0, 1])
    x, y = torch.randn(2, 5, 9), torch.randn(10, 9)
    expected = y.clone()
    expected[6:] = normed(x.view(10, 9)[6:], payload)
    bank.after(x, y, segments)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(y[:6], expected[:6])


def test_rows_of_a_layer_norm(arena: torch.Tensor, segments: Segments) -> None:
    torch.manual_seed(0)
    bank = NormParametersBank(NormForm(1e-5, centred=True), SPEC, PackedMatrices(arena, 4, 9))
    payload = NormParameters(torch.randn(9), torch.randn(9))
    check(bank, payload, lambda x, p: layer_norm(x, (9,), p.weight, p.bias), segments)


def test_rows_of_a_root_mean_square_norm(arena: torch.Tensor, segments: Segments) -> None:
    torch.manual_seed(0)
    bank = NormParametersBank(NormForm(1e-5), SPEC, PackedMatrices(arena, 4, 9))
    payload = NormParameters(torch.randn(9))
    check(bank, payload, lambda x, p: rms_norm(x, (9,), p.weight, 1e-5), segments)


def test_rows_of_a_norm_that_computes_something_else(
    arena: torch.Tensor, segments: Segments
) -> None:
    torch.manual_seed(0)
    norm: nn.Module = SquaredWeight(9, eps=1e-5).requires_grad_(False)
    bank = CopiedNormBank(norm, SPEC, PackedMatrices(arena, 4, 9, host_read=True))
    payload = NormParameters(torch.randn(9))
    check(bank, payload, lambda x, p: rms_norm(x, (9,), p.weight**2, 1e-5), segments)
    assert norm.weight.eq(1).all()
