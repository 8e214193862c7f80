"""UniLoRA against PEFT, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_few_numbers_beside_lora(
    name: str, saved: bool, tune: Make, save: Make, as_in_peft: Make
) -> None:
    shared = {"target_modules": TARGETS[name], "save_indices": saved, "init_theta_d_bound": 3.0}
    configs = [
        peft.UniLoraConfig(r=3, theta_d_length=64, **shared),
        peft.UniLoraConfig(r=5, theta_d_length=37, proj_seed=3, **shared),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS[name])])


def test_what_the_seed_draws_is_frozen(tune: Make, serve: Make, rewrite: Make) -> None:
    """A numpy that drew other numbers would answer wrong: here are those of PEFT 0.21."""

    def counted(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.arange(8).float() for name in tensors}

    config = peft.UniLoraConfig(r=1, theta_d_length=8, target_modules=["q_proj"])
    adapter = serve("llama").parse(rewrite(tune("llama", config), counted))
    (payload,) = adapter.payloads["model.layers.1.self_attn.q_proj"]
    assert (payload.a[0, :12] * 4).round().int().tolist() == GOLDEN


GOLDEN = [2, 6, 7, 5, 2, 5, 0, 4, 6, 5, 7, 7]


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"theta_d_length": 32}, "BASE_MISMATCH"),
        ({"theta_d_length": 0}, "BAD_FIELD"),
        ({"proj_seed": -1}, "BAD_FIELD"),
        ({"bias": "lora_only"}, "BAD_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    saved: bool, changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    config = peft.UniLoraConfig(r=3, target_modules=TARGETS["llama"], save_indices=saved)
    assert refusal("llama", tune("llama", config), **changes).reason == reason


def test_saved_places_have_to_fit(tune: Make, refusal: Make) -> None:
    config = peft.UniLoraConfig(r=3, target_modules=TARGETS["llama"], save_indices=True)
    folder = tune("llama", config)
    assert refusal("llama", folder, save_indices=False).reason == "EXTRA_TENSORS"


def test_places_outside_are_refused(tune: Make, refusal: Make) -> None:
    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: t + 1 if "indices" in k else t for k, t in tensors.items()}

    config = peft.UniLoraConfig(r=3, target_modules=TARGETS["llama"], save_indices=True)
    assert refusal("llama", tune("llama", config), moved).reason == "BASE_MISMATCH"


def test_modules_that_take_no_adapter_but_count_are_refused(tune: Make, refusal: Make) -> None:
    folder = tune("llama", peft.UniLoraConfig(r=3, target_modules=["q_proj", "v_proj"]))
    error = refusal("llama", folder, target_modules=r".*(q_proj|embed_tokens)")
    assert error.reason == "UNSUPPORTED_FEATURE"
