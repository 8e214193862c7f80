"""HiRA against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.HiraConfig(target_modules=LINEAR, r=3)),
        (
            "llama_bias",
            peft.HiraConfig(target_modules="all-linear", r=4, rank_pattern={"q_proj": 2}),
        ),
        ("llama", peft.HiraConfig(target_modules=["k_proj", "lm_head", "embed_tokens"], r=2)),
        ("gemma3", peft.HiraConfig(target_modules=["embed_tokens", "o_proj"], r=2)),
        ("gpt_neox", peft.HiraConfig(target_modules=["query_key_value", "dense_h_to_4h"], r=6)),
    ],
)
def test_scaled_weights_beside_lora(name: str, config: peft.HiraConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.HiraConfig(target_modules=["q_proj"], r=4))


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
        ("hira_A", lambda t: t[:, :-1], "BASE_MISMATCH"),
        ("hira_B", lambda t: t[:-1], "BASE_MISMATCH"),
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
