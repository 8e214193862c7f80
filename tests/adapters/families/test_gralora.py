"""GraLoRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.mark.parametrize("name", TARGETS)
def test_blocks_with_and_without_a_hybrid_beside_lora(
    name: str, tune: Make, save: Make, as_in_peft: Make
) -> None:
    shared = {"target_modules": TARGETS[name]}
    configs = [
        peft.GraloraConfig(r=4, gralora_k=2, alpha=5, **shared),
        peft.GraloraConfig(r=8, gralora_k=4, alpha=9, hybrid_r=3, bias="gralora_only", **shared),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, **shared)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 6}, "BASE_MISMATCH"),
        ({"gralora_k": 3}, "BAD_FIELD"),
        ({"gralora_k": 4}, "BASE_MISMATCH"),
        ({"r": 12, "gralora_k": 3}, "BASE_MISMATCH"),
        ({"r": 2048, "gralora_k": 4}, "RANK_TOO_LARGE"),
        ({"hybrid_r": 2}, "MISSING_TENSORS"),
        ({"hybrid_r": -1}, "BAD_FIELD"),
        ({"alpha": 0}, "BAD_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    config = peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS["llama"])
    assert refusal("llama", tune("llama", config), **changes).reason == reason


def test_blocks_that_do_not_divide_the_module_are_refused(tune: Make, refusal: Make) -> None:
    def cut(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = {"gralora_A": (3, 10, 6), "gralora_B": (3, 6, 10)}
        return {name: torch.ones(shapes[name.rpartition(".")[2]]) for name in tensors}

    config = peft.GraloraConfig(r=4, gralora_k=2, target_modules=["q_proj"])
    error = refusal("llama", tune("llama", config), cut, r=6, gralora_k=3)
    assert error.reason == "BASE_MISMATCH"
