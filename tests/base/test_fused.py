"""Fused modules: the logits of transformers' own forms, and theirs where they compute otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from deltamux.base import fused
from deltamux.base.fused import fuse
from deltamux.base.load import adopt
from deltamux.base.structure import find_structure
from deltamux_kernels import gated_silu, native, rms_norm, rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On a CPU the fused forms of half types are torch's own operations.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2 if DEVICE.type == "cuda" else 0.0}

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 8, "head_dim": 8}

# A config, and how many norms, gates and rotary embeddings are fused of it in two layers.
MODELS: dict[str, tuple[Callable[[], hf.PreTrainedConfig], tuple[int, int, int]]] = {
    "llama": (lambda: hf.LlamaConfig(**SMALL), (5, 2, 2)),
    "mistral": (lambda: hf.MistralConfig(**SMALL), (5, 2, 2)),
    "qwen3": (lambda: hf.Qwen3Config(**SMALL, head_dim=16), (9, 2, 2)),
    "qwen3_moe": (lambda: hf.Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=8), (9, 0, 2)),
    # Partial rotation, and a gate whose two projections are one.
    "phi3": (lambda: hf.Phi3Config(**SMALL, partial_rotary_factor=0.5), (5, 0, 2)),
    "phi": (lambda: hf.PhiConfig(**SMALL, partial_rotary_factor=0.5), (0, 0, 2)),
    # 1 + weight, and GELU.
    "gemma": (lambda: hf.GemmaConfig(**SMALL, head_dim=8), (5, 0, 2)),
    "gemma2": (lambda: hf.Gemma2Config(**SMALL, **WINDOW, query_pre_attn_scalar=8), (9, 0, 2)),
    # The product with the weight is rounded alone.
    "olmo2": (lambda: hf.Olmo2Config(**SMALL), (9, 2, 2)),
    # Pairs of neighbours are rotated, and layers normed.
    "cohere": (lambda: hf.CohereConfig(**SMALL), (0, 2, 0)),
    "gpt2": (lambda: hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4), (0, 0, 0)),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(MODELS[name][0](), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1 if parameter.dim() == 1 else 0.0, 0.3)
    return model.to(DEVICE, dtype).eval().requires_grad_(False)


def logits(model: hf.PreTrainedModel) -> Tensor:
    ids = torch.arange(3, 40, device=DEVICE)[None]
    positions = torch.arange(ids.shape[1], device=DEVICE)[None] + 5
    with torch.inference_mode():
        rows: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_gives_the_logits_of_before(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype)
    before = logits(model)
    counts = fuse(model)
    assert (counts["norms"], counts["gates"], counts["rotary"]) == MODELS[name][1]
    error = (logits(model).double() - before.double()).norm() / before.double().norm()
    assert error <= TOLERANCE[dtype]


@pytest.mark.skipif(DEVICE.type == "cuda" or not native.available(), reason="C on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_cpu_is_fused_where_there_is_c(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def was_fused() -> bool:
        norm = adopt(build("llama", dtype)).model.model.norm
        return type(norm) is not LlamaRMSNorm

    assert was_fused() == (dtype == torch.float32)
    monkeypatch.setattr(native, "available", lambda: False)
    assert not was_fused()


def test_another_model_of_the_process_notices_nothing() -> None:
    other = build("qwen3")
    classes = [type(module) for module in other.modules()]
    fuse(build("qwen3"))
    assert [type(module) for module in other.modules()] == classes
    assert [type(module) for module in build("qwen3").modules()] == classes


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_names_parameters_and_sites_stay(name: str) -> None:
    model = build(name)
    sites, modules = find_structure(model).sites, dict(model.named_modules())
    state, classes = model.state_dict(), [type(module) for module in model.modules()]
    fuse(model)
    assert find_structure(model).sites == sites
    assert dict(model.named_modules()) == modules
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == {
        key: value.data_ptr() for key, value in state.items()
    }
    for module, own in zip(model.modules(), classes, strict=True):
        assert isinstance(module, own) and type(module).__name__ == own.__name__


def test_a_copy_of_a_fused_norm_reads_its_own_weight() -> None:
    model = build("llama")
    fuse(model)
    norm = model.model.norm
    other = copy.copy(norm)
    other._parameters = {"weight": 2 * norm.weight}
    x = torch.randn(4, 32, device=DEVICE)
    assert torch.equal(other(x), 2 * norm(x))


BROKEN: dict[str, Callable[..., Any]] = {
    "rms_norm": lambda x, weight, epsilon, *rest: rms_norm(x, weight, 2 * epsilon, *rest),
    "gated_silu": lambda gate, up: gated_silu(up, gate),
    "rotary": lambda query, key, cos, sin: rotary(query, key, cos, -sin),
}


@pytest.mark.parametrize(
    "form, kind", [("rms_norm", "norms"), ("gated_silu", "gates"), ("rotary", "rotary")]
)
def test_a_form_that_computes_something_else_is_not_put_in_place(
    form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("qwen3")
    before = logits(model)
    monkeypatch.setattr(fused, form, BROKEN[form])
    counts = fuse(model)
    assert [name for name, count in counts.items() if count == 0] == [kind]
    torch.testing.assert_close(logits(model), before)


class LimitedGate(LlamaMLP):
    """Differs from its class for large numbers only, which no random input may reach."""

    def forward(self, x: Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=50) * self.up_proj(x))


class LimitedSiLU(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x).clamp(max=50)


def test_a_gate_with_a_limit_keeps_its_own_form() -> None:
    model = build("llama")
    model.model.layers[0].mlp = LimitedGate(model.config).to(DEVICE)
    model.model.layers[1].mlp.act_fn = LimitedSiLU()
    assert fuse(model)["gates"] == 0


def test_rotary_of_several_sequences_is_left_to_transformers() -> None:
    model = build("llama")
    ids = torch.arange(3, 43, device=DEVICE).view(2, 20)
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        fuse(model)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)
