"""BitFit through PEFT's LoraConfig: trained biases, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from torch import Tensor

from deltamux.adapters.primitives.row_bias import RowBias
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]


@pytest.mark.parametrize("name", ["llama_bias", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}])
def test_trained_biases_beside_lora(
    name: str, bias: str, variant: dict[str, bool], tune: Make, save: Make, as_in_peft: Make
) -> None:
    if name == "gpt2" and "lora_bias" in variant:
        pytest.skip("PEFT has no lora_bias for Conv1D")
    targets = {"llama_bias": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}.get(name, ["dense"])
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, bias=bias, **variant)
    as_in_peft(name, [tune(name, config, 1), save(name, r=4, target_modules=targets)])


def test_a_bias_that_was_not_moved_takes_nothing(save: Make, serve: Make) -> None:
    adapter = serve("gpt2").parse(save("gpt2", r=2, target_modules=["c_attn"], bias="all"))
    payloads = [payload for site in adapter.payloads.values() for payload in site]
    assert not any(isinstance(payload, RowBias) for payload in payloads)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_without_biases_in_the_base_there_is_nothing_to_train(
    bias: str, tune: Make, as_in_peft: Make
) -> None:
    as_in_peft("llama", [tune("llama", peft.LoraConfig(target_modules="all-linear", bias=bias))])


BIAS = "base_model.model.model.layers.0.mlp.up_proj.bias"
HEAD = "base_model.model.lm_head.bias"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: {k: t for k, t in tensors.items() if k != BIAS}, "MISSING_TENSORS"),
        (lambda tensors: tensors | {BIAS: tensors[BIAS][1:]}, "BASE_MISMATCH"),
        (lambda tensors: tensors | {BIAS: tensors[BIAS][None]}, "SHAPE_MISMATCH"),
        (lambda tensors: tensors | {HEAD: tensors[BIAS].clone()}, "UNSUPPORTED_FEATURE"),
    ],
)
def test_wrong_biases_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    reason: str,
    save: Make,
    serve: Make,
    rewrite: Make,
) -> None:
    folder = save("llama_bias", r=2, target_modules=["q_proj"], bias="all")
    with pytest.raises(DeltamuxError) as caught:
        serve("llama_bias").parse(rewrite(folder, change))
    assert caught.value.reason == reason
