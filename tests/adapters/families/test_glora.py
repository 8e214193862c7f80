"""GLoRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import Tensor

Make = Callable[..., Any]

LINEAR = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", peft.GloraConfig(target_modules=LINEAR, r=3)),
        (
            "llama_bias",
            peft.GloraConfig(
                target_modules="all-linear",
                config_A_B="lora",
                config_C="lora",
                config_D_E="constant",
            ),
        ),
        (
            "llama_bias",
            peft.GloraConfig(
                target_modules=LINEAR, config_A_B="vector", config_C="vector", config_D_E="vector"
            ),
        ),
        (
            "llama_bias",
            peft.GloraConfig(
                target_modules=LINEAR, config_A_B="constant", config_C="none", config_D_E="none"
            ),
        ),
        (
            "llama_bias",
            peft.GloraConfig(
                target_modules=LINEAR, config_A_B="none", config_C="vector", config_D_E="constant"
            ),
        ),
        (
            "llama_bias",
            peft.GloraConfig(
                target_modules=LINEAR, config_A_B="lora", config_C="none", config_D_E="vector"
            ),
        ),
        (
            "gpt_neox",
            peft.GloraConfig(target_modules=["query_key_value", "dense"], config_A_B="vector"),
        ),
    ],
)
def test_weights_and_biases_beside_lora(
    name: str, config: peft.GloraConfig, beside_lora: Make
) -> None:
    beside_lora(name, config)


@pytest.mark.parametrize("scale", [0.0, 0.5, -1.0])
def test_a_weight_that_is_scaled_away_keeps_its_shift(
    scale: float, tune: Make, rewrite: Make, as_in_peft: Make
) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: t * 0 + scale - 1 if "glora_A" in n else t for n, t in tensors.items()}

    config = peft.GloraConfig(target_modules=["q_proj", "down_proj"], config_A_B="vector")
    as_in_peft("llama", [rewrite(tune("llama", config), changed)])


def test_a_path_that_is_off_must_be_zero(tune: Make, refusal_of_part: Make) -> None:
    folder = tune("llama", peft.GloraConfig(target_modules=["q_proj"]))
    error = refusal_of_part("llama", folder, "glora_E.zeros", lambda t: t + 1)
    assert error.reason == "MALFORMED_WEIGHTS"


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama_bias", peft.GloraConfig(target_modules=["q_proj"], r=4))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"config_A_B": "vector"}, "MISSING_TENSORS"),
        ({"config_C": "none"}, "EXTRA_TENSORS"),
        ({"config_D_E": "lora"}, "BAD_FIELD"),
        ({"bias": "all"}, "UNSUPPORTED_FEATURE"),
        ({"target_modules": ["k_proj"]}, "MISSING_TENSORS"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], reason: str, folder: Path, refusal: Make
) -> None:
    assert refusal("llama_bias", folder, **fields).reason == reason


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("glora_A.Xd", lambda t: t[:-1], "BASE_MISMATCH"),
        ("glora_E.X", lambda t: t.repeat(2), "BASE_MISMATCH"),
    ],
)
def test_wrong_tensors_are_refused(
    part: str,
    change: Callable[[Tensor], Tensor],
    reason: str,
    folder: Path,
    refusal_of_part: Make,
) -> None:
    assert refusal_of_part("llama_bias", folder, part, change).reason == reason
