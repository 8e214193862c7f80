"""Modules that were trained whole and are in a checkpoint twice, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file

from deltamux.adapters.checkpoint.files import WEIGHTS
from deltamux.errors import DeltamuxError

Make = Callable[..., Any]

HEAD = "base_model.model.lm_head"


def lora(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules=["q_proj"], **fields)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("phi", lora(bias="all", modules_to_save=["final_layernorm", "k_proj"])),
        ("llama_bias", lora(bias="all", modules_to_save=["o_proj", "embed_tokens"])),
    ],
)
def test_all_biases_beside_modules_that_were_trained_whole(
    name: str, config: peft.LoraConfig, tune: Make, as_in_peft: Make
) -> None:
    folder = tune(name, config)
    assert any("original_module.bias" in tensor for tensor in load_file(folder / WEIGHTS))
    as_in_peft(name, [folder])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "config",
    [
        lora(modules_to_save=["embed_tokens", "lm_head"]),
        lora(trainable_token_indices=[*range(30)]),
        peft.LNTuningConfig(target_modules=["input_layernorm"], modules_to_save=["embed_tokens"]),
        peft.TrainableTokensConfig(token_indices=[*range(40)], target_modules=["embed_tokens"]),
    ],
)
def test_embedding_and_head_saved_besides(
    name: str, config: peft.PeftConfig, tune: Make, as_in_peft: Make
) -> None:
    as_in_peft(name, [tune(name, config, save_embedding_layers=True)])


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", lora(modules_to_save=["lm_head"]), save_embedding_layers=True)


@pytest.mark.parametrize(
    ("copy", "reason"),
    [("modules_to_save", "EXTRA_TENSORS"), ("original_module", "UNSUPPORTED_FEATURE")],
)
def test_copies_that_are_none_are_refused(
    copy: str, reason: str, folder: Path, serve: Make, rewrite: Make
) -> None:
    name = f"{HEAD}.{copy}.weight"
    with pytest.raises(DeltamuxError) as caught:
        serve("llama").parse(rewrite(folder, lambda t: t | {name: t[name] + 1}))
    assert caught.value.reason == reason
