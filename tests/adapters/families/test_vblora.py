"""VB-LoRA against PEFT, whole logits and mixtures only, mixed with LoRA and plain rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

Make = Callable[..., Any]

TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def vblora(name: str = "llama", **config: Any) -> peft.VBLoRAConfig:
    small = {"r": 3, "num_vectors": 20, "vector_length": 8, "init_vector_bank_bound": 0.5}
    return peft.VBLoRAConfig(**{"target_modules": TARGETS[name], **small, **config})


@pytest.mark.parametrize("mixtures", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_mixtures_of_the_bank_beside_lora(
    name: str, mixtures: bool, tune: Make, save: Make, as_in_peft: Make
) -> None:
    configs = [
        vblora(name, save_only_topk_weights=mixtures),
        vblora(name, r=5, topk=3, num_vectors=300, save_only_topk_weights=mixtures),
    ]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS[name])])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"r": 2}, "BASE_MISMATCH"),
        ({"num_vectors": 21}, "BASE_MISMATCH"),
        ({"vector_length": 4}, "BASE_MISMATCH"),
        ({"topk": 21}, "BAD_FIELD"),
        ({"topk": 0}, "BAD_FIELD"),
        ({"save_only_topk_weights": True}, "EXTRA_TENSORS"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    assert refusal("llama", tune("llama", vblora()), **changes).reason == reason


def test_vectors_have_to_divide_the_module(tune: Make, refusal: Make) -> None:
    def shorter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        shapes = {"vblora_logits_A": (3, 6, 20), "vblora_logits_B": (6, 3, 20)}
        shapes["vblora_vector_bank"] = (20, 5)
        return {name: torch.ones(shapes[name.rpartition(".")[2]]) for name in tensors}

    folder = tune("llama", vblora(target_modules=["q_proj"]))
    assert refusal("llama", folder, shorter, vector_length=5).reason == "BASE_MISMATCH"


PART = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_B"


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("_topk_indices", lambda t: t + 20),
        ("_topk_indices", lambda t: t * 0),
        ("_topk_indices", lambda t: t[..., :1]),
        ("_topk_weights", lambda t: t * 0 + 1.5),
        ("_topk_weights", lambda t: t * 0 - 0.5),
    ],
)
def test_broken_mixtures_are_refused(
    part: str, change: Callable[[Tensor], Tensor], tune: Make, refusal: Make
) -> None:
    def changed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, PART + part: change(tensors[PART + part])}

    folder = tune("llama", vblora(save_only_topk_weights=True))
    assert refusal("llama", folder, changed).reason == "MALFORMED_WEIGHTS"
