"""RandLoRA against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.RandLoraConfig(target_modules=LINEAR, r=4, randlora_alpha=2)),
        (
            "llama",
            peft.RandLoraConfig(
                target_modules=["k_proj", "lm_head"], r=5, randlora_alpha=2, sparse=True
            ),
        ),
        (
            "llama_bias",
            peft.RandLoraConfig(
                target_modules="all-linear", r=8, randlora_alpha=4, bias="randlora_only"
            ),
        ),
        (
            "llama",
            peft.RandLoraConfig(target_modules=["o_proj"], r=8, randlora_alpha=4, very_sparse=True),
        ),
        ("gpt2", peft.RandLoraConfig(target_modules=["c_attn", "c_fc"], r=8, randlora_alpha=2)),
    ],
)
def test_full_rank_deltas_beside_lora(
    name: str, config: peft.RandLoraConfig, beside_lora: Make
) -> None:
    beside_lora(name, config)


def test_bases_are_no_trained_numbers(tune: Make, serve: Make) -> None:
    config = peft.RandLoraConfig(target_modules=["q_proj"], r=4)
    assert serve("llama").parse(tune("llama", config)).parameters == 2 * (4 * 8 + 8 * 32)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.RandLoraConfig(target_modules=["q_proj"], r=4, randlora_alpha=2))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"save_projection": False}, "UNSUPPORTED_FEATURE"),
        ({"target_modules": ["o_proj"]}, "MISSING_TENSORS"),
        ({"target_modules": "dummy-target-modules"}, "NO_TARGETS"),
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
        ("base_model.randlora_A", lambda t: t[:, :, :-1], "BASE_MISMATCH"),
        ("1.self_attn.q_proj.randlora_B", lambda t: t + 1, "MALFORMED_WEIGHTS"),
        ("randlora_B", lambda t: t[:-1], "BASE_MISMATCH"),
        ("randlora_gamma", lambda t: t[:-1], "BASE_MISMATCH"),
        ("randlora_lambda", lambda t: t[:-1], "BASE_MISMATCH"),
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
