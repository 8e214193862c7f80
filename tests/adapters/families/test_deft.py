"""DEFT and PaRa against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest

Make = Callable[..., Any]

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.mark.parametrize("name", TARGETS)
def test_subspaces_beside_lora(name: str, tune: Make, save: Make, as_in_peft: Make) -> None:
    shared = {"target_modules": TARGETS[name]}
    configs = [
        peft.DeftConfig(r=4, **shared),
        peft.DeftConfig(r=5, alpha=3, decomposition_method="qr", **shared),
        peft.DeftConfig(r=3, para=True, decomposition_method="qr", **shared),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, **shared)])


def test_trained_biases(tune: Make, as_in_peft: Make) -> None:
    config = peft.DeftConfig(r=4, target_modules=["v_proj", "down_proj"], bias="deft_only")
    as_in_peft("llama_bias", [tune("llama_bias", config)])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 3}, "BASE_MISMATCH"),
        ({"para": True}, "EXTRA_TENSORS"),
        ({"decomposition_method": "svd"}, "BAD_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    folder = tune("llama", peft.DeftConfig(r=4, target_modules=TARGETS["llama"]))
    error = refusal("llama", folder, **changes)
    assert error.reason == reason
