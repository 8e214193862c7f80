"""OSF against PEFT, mixed with LoRA and rows without adapter."""

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
        ("llama", peft.OSFConfig(target_modules=LINEAR)),
        ("llama", peft.OSFConfig(target_modules=["k_proj", "lm_head"], effective_rank=0.75)),
        (
            "llama_bias",
            peft.OSFConfig(
                target_modules="all-linear", effective_rank=12, rank_pattern={"q_proj": 30}
            ),
        ),
    ],
)
def test_trained_tails_beside_lora(name: str, config: peft.OSFConfig, beside_lora: Make) -> None:
    beside_lora(name, config)


@pytest.fixture
def folder(tune: Make) -> Path:
    return tune("llama", peft.OSFConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"target_svd_config": {"q_proj": 3}}, "UNSUPPORTED_FEATURE"),
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
        ("U_low", lambda t: t[:-1], "BASE_MISMATCH"),
        ("V_low", lambda t: t[:-1], "BASE_MISMATCH"),
        ("S_low", lambda t: t.repeat(3), "BASE_MISMATCH"),
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


def test_more_singular_values_than_a_weight_has_are_refused(folder: Path, refusal: Make) -> None:
    repeats = {"U_low": (1, 3), "S_low": (3,), "V_low": (3, 1)}

    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.repeat(repeats[name.rpartition(".")[2]]) for name, t in tensors.items()}

    assert refusal("llama", folder, changed).reason == "BASE_MISMATCH"
