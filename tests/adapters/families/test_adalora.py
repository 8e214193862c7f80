"""AdaLoRA against PEFT, its ranks whole and cut, mixed with LoRA and rows without adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest

Make = Callable[..., Any]

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "llama_bias": ["v_proj"]}


def adalora(name: str = "llama", **config: Any) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        **{"init_r": 6, "total_step": 10, "target_modules": TARGETS[name], **config}
    )


def kept(rows: list[int], layer: int = 0) -> dict[str, list[bool]]:
    return {f"model.layers.{layer}.self_attn.q_proj.lora_E": [i in rows for i in range(6)]}


@pytest.mark.parametrize("name", TARGETS)
def test_whole_ranks_beside_lora(name: str, tune: Make, save: Make, as_in_peft: Make) -> None:
    configs = [adalora(name), adalora(name, init_r=3, lora_alpha=5, bias="all")]
    folders = [tune(name, config, seed) for seed, config in enumerate(configs)]
    as_in_peft(name, [*folders, save(name, r=4, target_modules=TARGETS[name])])


def test_cut_ranks_keep_the_scale_of_the_first(tune: Make, serve: Make, as_in_peft: Make) -> None:
    config = adalora(rank_pattern={**kept([0, 3]), **kept([], 1)}, lora_alpha=9)
    folder = tune("llama", config)
    as_in_peft("llama", [folder])
    payloads = serve("llama").parse(folder).payloads
    assert payloads["model.layers.0.self_attn.q_proj"][0].a.shape == (2, 32)
    assert "model.layers.1.self_attn.q_proj" not in payloads


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"init_r": 7}, "BASE_MISMATCH"),
        ({"init_r": None}, "BAD_FIELD"),
        ({"init_r": 5000}, "RANK_TOO_LARGE"),
        ({"rank_pattern": kept([1, 2])}, "BASE_MISMATCH"),
        ({"rank_pattern": {"model.layers.0.mlp.up_proj.lora_E": [True] * 6}}, "BAD_FIELD"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 5}}, "BAD_FIELD"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 6}}, "BAD_FIELD"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj": [True] * 6}}, "BAD_FIELD"),
        ({"use_dora": True}, "UNSUPPORTED_FEATURE"),
        ({"alpha_pattern": {"q_proj": 3}}, "UNSUPPORTED_FEATURE"),
        ({"a_new_field": 3}, "UNKNOWN_FIELD"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], reason: str, tune: Make, refusal: Make
) -> None:
    assert refusal("llama", tune("llama", adalora()), **changes).reason == reason
