"""PEANuT against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest

Make = Callable[..., Any]

TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("name", ["llama", "llama_bias"])
def test_networks_of_the_weight_beside_lora(
    name: str, tune: Make, save: Make, as_in_peft: Make
) -> None:
    configs = [
        peft.PeanutConfig(r=4, target_modules=TARGETS),
        peft.PeanutConfig(r=6, depth=2, act_fn="gelu", scaling=0.5, target_modules=TARGETS),
        peft.PeanutConfig(r=3, depth=1, act_fn="silu", target_modules=["lm_head", "up_proj"]),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"depth": 0}, "EXTRA_TENSORS"),
        ({"depth": 2}, "MISSING_TENSORS"),
        ({"depth": 65}, "BAD_FIELD"),
        ({"act_fn": "no such thing"}, "BAD_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", peft.PeanutConfig(r=4, depth=1, target_modules=TARGETS))
    assert refusal("llama", folder, **changes).reason == reason
