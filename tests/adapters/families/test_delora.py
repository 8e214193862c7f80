"""DeLoRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
from torch import Tensor

Make = Callable[..., Any]

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("name", ["llama", "llama_bias"])
def test_bounded_deltas_beside_lora(name: str, tune: Make, save: Make, as_in_peft: Make) -> None:
    configs = [
        peft.DeloraConfig(r=4, delora_lambda=3, target_modules=TARGETS, bias="delora_only"),
        peft.DeloraConfig(
            r=7,
            target_modules=[*TARGETS, "lm_head"],
            rank_pattern={"v_proj": 2},
            lambda_pattern={"q_proj": 8},
        ),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS)])


def test_a_vanishing_direction_is_divided_by_no_less_than_peft_does(
    tune: Make, rewrite: Make, as_in_peft: Make
) -> None:
    def vanishing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t * 1e-6 if k.endswith("delora_A") else t for k, t in tensors.items()}

    folder = tune("llama", peft.DeloraConfig(r=4, delora_lambda=300, target_modules=TARGETS))
    as_in_peft("llama", [rewrite(folder, vanishing)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"rank_pattern": {"k_proj": 4}}, "BAD_FIELD"),
        ({"target_modules": ["q_proj"]}, "EXTRA_TENSORS"),
        ({"bias": "all_of_them"}, "BAD_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", peft.DeloraConfig(r=4, target_modules=TARGETS))
    assert refusal("llama", folder, **changes).reason == reason


def test_the_norms_of_the_base_belong_to_the_file(tune: Make, refusal: Make) -> None:
    def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t for k, t in tensors.items() if not k.endswith("w_norm")}

    folder = tune("llama", peft.DeloraConfig(r=4, target_modules=TARGETS))
    assert refusal("llama", folder, without).reason == "MISSING_TENSORS"
