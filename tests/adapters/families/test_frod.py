"""FRoD against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.FrodConfig(target_modules=LINEAR)),
        ("llama", peft.FrodConfig(target_modules=["k_proj", "lm_head"], sparse_rate=0.1)),
        ("llama_bias", peft.FrodConfig(target_modules="all-linear", bias="frod_only")),
        ("gpt2", peft.FrodConfig(target_modules=["c_attn", "mlp.c_proj"])),
        ("gpt_neox", peft.FrodConfig(target_modules=["dense"], bias="all")),
    ],
)
def test_replaced_weights_beside_lora(
    name: str, config: peft.FrodConfig, beside_lora: Make
) -> None:
    beside_lora(name, config)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.FrodConfig(target_modules=["q_proj"], progressbar=False))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"save_projection": False}, "UNSUPPORTED_FEATURE"),
        ({"target_modules": ["k_proj"]}, "EXTRA_TENSORS"),
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
        ("frod_lambda_l", lambda t: t[:-1], "BASE_MISMATCH"),
        ("frod_lambda_s", lambda t: t[:-1], "BASE_MISMATCH"),
        ("frod_V", lambda t: t[:-1], "BASE_MISMATCH"),
        ("frod_s_indices", lambda t: t + 32, "MALFORMED_WEIGHTS"),
        ("frod_s_indices", lambda t: t[:, 1:], "BASE_MISMATCH"),
        ("frod_s_size", lambda t: t + 1, "MALFORMED_WEIGHTS"),
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
