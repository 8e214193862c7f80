"""Sublayers of tiny random models: where residuals go around them, and where that is not so."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from deltamux.base.structure import find_structure
from deltamux.base.sublayers import Sublayer

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def sublayers(
    config: transformers.PreTrainedConfig, dtype: torch.dtype = torch.float32
) -> list[Sublayer]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return list(find_structure(model).sublayers.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**GATED, attention_bias=True),
        transformers.MistralConfig(**GATED),
        transformers.Qwen3Config(**GATED, head_dim=8),
    ],
)
def test_a_layer_that_norms_first_has_two(
    config: transformers.PreTrainedConfig, dtype: torch.dtype
) -> None:
    assert sublayers(config, dtype) == [
        found
        for layer in ("model.layers.0.", "model.layers.1.")
        for found in (
            Sublayer(f"{layer}self_attn.o_proj", f"{layer}input_layernorm", None),
            Sublayer(f"{layer}mlp.down_proj", f"{layer}post_attention_layernorm", None),
        )
    ]


def test_conv1d_ends_a_sublayer_too() -> None:
    found = sublayers(transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4))
    assert found == [
        Sublayer("transformer.h.0.attn.c_proj", "transformer.h.0.ln_1", None),
        Sublayer("transformer.h.0.mlp.c_proj", "transformer.h.0.ln_2", None),
    ]


def test_a_layer_that_norms_last_names_its_norms() -> None:
    config = transformers.BertConfig(**SMALL, intermediate_size=48, is_decoder=True)
    layer = "bert.encoder.layer.1."
    assert sublayers(config)[2:] == [
        Sublayer(
            f"{layer}attention.output.dense",
            f"{layer}attention.self.query",
            f"{layer}attention.output.LayerNorm",
        ),
        Sublayer(f"{layer}output.dense", f"{layer}intermediate.dense", f"{layer}output.LayerNorm"),
    ]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(transformers.Gemma2Config(**GATED, head_dim=8), id="norm of the output"),
        pytest.param(transformers.GraniteConfig(**GATED, residual_multiplier=0.5), id="scaled"),
        pytest.param(transformers.GPTNeoXConfig(**SMALL, intermediate_size=48), id="side by side"),
        pytest.param(transformers.PhiConfig(**SMALL, intermediate_size=48), id="one norm"),
    ],
)
def test_other_layers_have_none(config: transformers.PreTrainedConfig) -> None:
    assert sublayers(config) == []


def test_the_output_of_experts_is_no_linear_module() -> None:
    config = transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2)
    assert [found.output[-6:] for found in sublayers(config)] == ["o_proj"] * 2
