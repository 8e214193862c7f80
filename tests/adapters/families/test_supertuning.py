"""Super-Tuning against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.SupertuningConfig(target_modules=LINEAR, sparsity=0.9)),
        (
            "llama",
            peft.SupertuningConfig(
                target_modules=["k_proj", "lm_head"], sparsity=0.8, select_top=False
            ),
        ),
        ("llama_bias", peft.SupertuningConfig(target_modules="all-linear", sparsity=0.95, r=3)),
        (
            "gpt_neox",
            peft.SupertuningConfig(
                target_modules=["query_key_value"], r=2, lora_alpha=5, lora_dropout=0.1
            ),
        ),
    ],
)
def test_sparse_deltas_beside_lora(
    name: str, config: peft.SupertuningConfig, beside_lora: Make
) -> None:
    beside_lora(name, config)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.SupertuningConfig(target_modules=["q_proj"], sparsity=0.9))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"save_precomputed_indices": False}, "UNSUPPORTED_FEATURE"),
        ({"sparsity": 0.8}, "BASE_MISMATCH"),
        ({"sparsity": 2}, "BAD_FIELD"),
        ({"r": 2}, "MISSING_TENSORS"),
        ({"lora_alpha": 2}, "BAD_FIELD"),
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
        ("indices", lambda t: t + 1024, "BASE_MISMATCH"),
        ("indices", lambda t: t - 1024, "BASE_MISMATCH"),
        ("indices", lambda t: t[:-1], "BASE_MISMATCH"),
        ("values", lambda t: t[:-1], "BASE_MISMATCH"),
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
