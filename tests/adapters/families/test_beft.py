"""BEFT against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.BeftConfig(target_modules=LINEAR)),
        ("llama_bias", peft.BeftConfig(target_modules="all-linear")),
        ("gpt_neox", peft.BeftConfig(target_modules=["dense_h_to_4h"])),
    ],
)
def test_added_biases_beside_lora(name: str, config: peft.BeftConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.BeftConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
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
        ("beft_bias", lambda t: t[:, :-1], "BASE_MISMATCH"),
        ("beft_bias", lambda t: t[0], "SHAPE_MISMATCH"),
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
