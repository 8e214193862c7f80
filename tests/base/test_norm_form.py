"""Norms of transformers and torch: which form each has, whatever its own parameters are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from deltamux.base.norm_form import find_norm_form
from deltamux_kernels import NormForm


class SquaredWeight(LlamaRMSNorm):
    """Differs in what the weight does, which is 1 in it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.abs()


class UnnamedEpsilon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, (64,), self.weight, 1e-5)


RMS, LAYER = NormForm(1e-5), NormForm(1e-5, centred=True)
GEMMA = NormForm(1e-5, offset=1.0, once=True)
NORMS: dict[str, tuple[Callable[[], nn.Module], NormForm | None]] = {
    "Llama": (lambda: LlamaRMSNorm(64, eps=1e-5), RMS),
    "Qwen3": (lambda: Qwen3RMSNorm(64, eps=1e-5), RMS),
    "torch, with a bias": (lambda: nn.LayerNorm(64), LAYER),
    "torch, without": (lambda: nn.LayerNorm(64, bias=False), LAYER),
    "Cohere": (lambda: CohereLayerNorm(64, eps=1e-5), LAYER),
    "Gemma": (lambda: GemmaRMSNorm(64, eps=1e-5), GEMMA),
    "weight squared": (lambda: SquaredWeight(64, eps=1e-5), None),
    "no epsilon": (UnnamedEpsilon, None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NORMS)
def test_the_form_is_what_the_module_computes(name: str, dtype: torch.dtype) -> None:
    make, form = NORMS[name]
    assert find_norm_form(make().requires_grad_(False).to(dtype)) == form


def test_another_order_of_rounding_is_another_form_in_16_bits() -> None:
    """OLMo 2 rounds after the product with the weight, others before."""
    norm = Olmo2RMSNorm(64, eps=1e-5).requires_grad_(False)
    assert find_norm_form(norm) == RMS
    for dtype in (torch.bfloat16, torch.float16):
        assert find_norm_form(norm.to(dtype)) == NormForm(1e-5, once=True)
