"""ensure_weight_tying against PEFT: an embedding and the head that shares its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from torch import Tensor

from deltamux.errors import DeltamuxError

Make = Callable[..., Any]


@pytest.mark.parametrize("name", ["llama_tied", "gemma3", "llama"])
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": r".*(embed_tokens|q_proj)"},
        {"target_modules": r"lm_head|.*v_proj"},
    ],
)
def test_both_are_trained_as_one(
    name: str, config: dict[str, Any], tune: Make, save: Make, as_in_peft: Make
) -> None:
    tied = tune(name, peft.LoraConfig(r=3, lora_alpha=5, ensure_weight_tying=True, **config))
    as_in_peft(name, [tied, save(name, target_modules=["v_proj", "embed_tokens"])])


def test_names_that_peft_does_not_know_are_not_tied(tune: Make, as_in_peft: Make) -> None:
    config = peft.LoraConfig(r=4, target_modules=["wte"], ensure_weight_tying=True)
    as_in_peft("gpt2", [tune("gpt2", config)])


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_A.weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_B.weight"),
    ],
)
def test_tensors_that_differ_are_refused(
    config: dict[str, Any], part: str, tune: Make, serve: Make, rewrite: Make
) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = f"base_model.model.lm_head.{part}"
        return tensors | {name: tensors[name] + 1}

    folder = tune("llama_tied", peft.LoraConfig(r=3, ensure_weight_tying=True, **config))
    with pytest.raises(DeltamuxError) as caught:
        serve("llama_tied").parse(rewrite(folder, changed))
    assert caught.value.reason == "TIED_TENSORS_DIFFER"
