"""HRA against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.HRAConfig(target_modules=LINEAR, r=3)),
        ("llama", peft.HRAConfig(target_modules=["k_proj", "lm_head"], r=4, apply_GS=True)),
        ("llama_bias", peft.HRAConfig(target_modules="all-linear", r=2, bias="hra_only")),
        ("gpt_neox", peft.HRAConfig(target_modules=["query_key_value"], r=2, bias="all")),
    ],
)
def test_reflected_inputs_beside_lora(name: str, config: peft.HRAConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.HRAConfig(target_modules=["q_proj"], r=4))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"r": 0}, "BAD_FIELD"),
        ({"bias": "lora_only"}, "BAD_FIELD"),
        ({"target_modules": ["k_proj"]}, "MISSING_TENSORS"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    fields: dict[str, Any], reason: str, folder: Path, refusal: Make
) -> None:
    assert refusal("llama", folder, **fields).reason == reason


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("hra_u", lambda t: t[:-1], "BASE_MISMATCH"),
        ("hra_u", lambda t: t * 0, "NON_FINITE"),
    ],
)
def test_wrong_tensors_are_refused(
    part: str,
    change: Callable[[Tensor], Tensor],
    reason: str,
    folder: Path,
    refusal_of_part: Make,
) -> None:
    assert refusal_of_part("llama", folder, part, change).reason == reason
